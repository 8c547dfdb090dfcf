"""Tier-safe tokens against llama.cpp's own tokenising and transformers', on the vocabularies of real models."""

from __future__ import annotations

import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from conftest import Reference
from helpers import vocabularies
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metaalign_edge import ChatTemplate, Dialog, Rendering, Tokens, Turn, choose_template, render, tokenize
from metaalign_edge_runtime.errors import LoadError
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.library import llama_cpp
from metaalign_edge_runtime.llama.token_texts import token_texts
from metaalign_edge_runtime.llama.vocabulary import LlamaVocabulary, load_vocabulary
from metaalign_edge_templates.sandbox import Template

SHIPPED = ["chatml", "metaalign", "plain", "llama3", "gemma", "mistral"]
VOCABULARIES = {  # and the templates of its own family: carried by it, of a file of real ones, or shipped
    "aquila": [],
    "baichuan": [],
    "command-r": ["auto"],
    "deepseek-coder": ["deepseek-ai-DeepSeek-V3.1"],
    "deepseek-llm": ["llama-cpp-deepseek-r1"],
    "falcon": [],
    "gemma-4": ["auto", "google-gemma-4-31B-it"],
    "gpt-2": [],
    "gpt-neox": [],
    "llama-bpe": ["meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct"],
    "llama-spm": ["mistralai-Mistral-Nemo-Instruct-2407"],
    "mpt": [],
    "phi-3": ["auto", "microsoft-Phi-3.5-mini-instruct"],
    "qwen2": ["auto", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B"],
    "qwen35": ["auto", "Qwen3.5-4B"],
    "refact": [],
    "starcoder": [],
}
ESCAPED = {"baichuan", "gemma-4", "llama-spm", "phi-3"}  # U+2581 stands for a space
NOT_FOR_CHAT = {"bert-bge", "nomic-bert-moe"}
CONTEXT = 1 << 20
UNKNOWN, CONTROL, USER_DEFINED = 1, 8, 16  # llama.h: llama_token_attr


class Case(NamedTuple):
    """A real vocabulary, and the templates to try with it."""

    name: str
    file: ModelFile
    vocabulary: LlamaVocabulary
    templates: list[ChatTemplate]

    def raw_ids(self, text: str) -> list[int]:
        """Tokenise a whole text by llama.cpp alone, special tokens on; BOS once, where the vocabulary wants it."""
        llama, data = llama_cpp(), text.encode()
        pointer = self.vocabulary.pointer
        room = (llama.llama_token * (len(data) + 16))()
        count = llama.llama_tokenize(pointer, data, len(data), room, len(room), False, True)
        ids = list(room[:count])
        bos = llama.llama_vocab_bos(pointer)
        return ids if not llama.llama_vocab_get_add_bos(pointer) or ids[:1] == [bos] else [bos, *ids]

    def reserved(self, token: int, source: str) -> bool:
        """Tell whether only the scaffold may use a token, by llama.cpp's own account of it."""
        llama, pointer = llama_cpp(), self.vocabulary.pointer
        attributes = llama.llama_vocab_get_attr(pointer, token)
        text = llama.llama_vocab_get_text(pointer, token).decode()
        marker = (
            attributes & USER_DEFINED
            and text.strip()
            and (text in source or re.fullmatch(r"<[|｜].*[|｜]>|<[^<>\s]*[|｜_][^<>\s]*>|</?think>", text))
        )
        return bool(attributes & (CONTROL | UNKNOWN) or llama.llama_vocab_is_eog(pointer, token) or marker)

    def spelt(self, text: str) -> bytes:
        """Return the bytes that a text's tokens stand for: SentencePiece writes a space and U+2581 alike."""
        return (text.replace("▁", " ") if self.name in ESCAPED else text).encode()

    def specials(self) -> list[str]:
        """List the texts of all tokens that a text must not become: control, end, unknown and user-defined ones."""
        llama, pointer = llama_cpp(), self.vocabulary.pointer
        return [
            text
            for token in range(llama.llama_vocab_n_tokens(pointer))
            if llama.llama_vocab_get_attr(pointer, token) & (CONTROL | UNKNOWN | USER_DEFINED)
            or llama.llama_vocab_is_eog(pointer, token)
            if (text := llama.llama_vocab_get_text(pointer, token).decode())
        ]


@pytest.fixture(scope="module", params=VOCABULARIES)
def case(request: pytest.FixtureRequest, reference: Reference) -> Iterator[Case]:
    """Load one vocabulary after another."""
    file = ModelFile(reference.vocabulary(request.param))
    real = reference.llama_cpp / "models" / "templates"
    names = [*VOCABULARIES[request.param], *SHIPPED]
    names = [str(real / f"{name}.jinja") if (real / f"{name}.jinja").is_file() else name for name in names]
    with load_vocabulary(file) as vocabulary:
        yield Case(request.param, file, vocabulary, [choose_template(name, file) for name in names])


def tokens_of(case: Case, template: ChatTemplate, dialog: Dialog) -> tuple[Rendering, Tokens]:
    """Render and tokenise."""
    rendering = render(dialog, template)
    return rendering, tokenize(rendering, case.vocabulary, CONTEXT)


def test_every_vocabulary_at_hand_is_compared_or_is_not_for_chat(reference: Reference) -> None:
    found = {path.stem.removeprefix("ggml-vocab-"): path for path in (reference.llama_cpp / "models").glob("*.gguf")}
    assert found.keys() == VOCABULARIES.keys() | NOT_FOR_CHAT
    for name in NOT_FOR_CHAT:
        with pytest.raises(LoadError, match="vocabulary of the kind"):
            load_vocabulary(ModelFile(found[name]))


# Benign text: the ids are the reference's

SCRIPTS = [range(32, 127), range(0xA0, 0x2000), range(0x4E00, 0x9FA0), range(0x1F300, 0x1F700), range(0x20, 0x21)]
CODE = "def f(x):\n    return x**2 + 1\n\n\n# 3.14e-10, 0xFF, 12345678\nif __name__ == '__main__':\n\tprint(f(3))"
UNICODE = "Ünïcödé — “quotes” … 10 € ≠ 5 £ 😀👩‍👩‍👧‍👦🇩🇪 𝒳 ½ ² ™ é e\u0301 한국어 日本語のテキスト ภาษาไทย"
BENIGN = {
    "both Info tiers": Dialog("Answer kindly.", "I like lists.", (Turn("What is tea?"),)),
    "a query alone": Dialog("", "", (Turn("What is tea?"),)),
    "no System Info": Dialog("", "Short.", (Turn("What is tea?"),)),
    "no User Info": Dialog("Short.", "", (Turn("x"),)),
    "code": Dialog("You write code.\n\n1. Python\n2. C\n", "Four spaces.\tTabs never.", (Turn(CODE),)),
    "many scripts": Dialog("Grüße, 你好，世界！ Привет мир.", "שלום مرحبا नमस्ते", (Turn(UNICODE),)),
    "long": Dialog("Be brief. " * 200, "I count: " + " ".join(map(str, range(500))), (Turn("word " * 3000 + "?"),)),
    "line ends": Dialog("a\r\nb", "c\r\n", (Turn("d\r\n\r\ne\tf\u00a0g\u3000h"),)),
    "turns": Dialog(
        "Be brief.",
        "I'm a zookeeper.",
        (
            Turn("What is tea?", "A drink made of leaves.\n\nHot."),
            Turn("And coffee?", "Beans, don't you know? It'll do. "),
            Turn("Thanks! 😀"),
        ),
    ),
}
SPACED = {
    "spaces around": Dialog("  two before", "after  ", (Turn("   \n\n  What   is    tea?  \n\n "),)),
    "lines around": Dialog("\nline\n", "\n\npref\n\n", (Turn("\n\n\nq\n\n\n"),)),
    "an answer that starts with a space": Dialog("s", "p", (Turn("q", " Yes."), Turn(" q"))),
    "an answer of nothing": Dialog("s", "p", (Turn("q", ""), Turn("q"))),
}


def compare_with_llama_cpp(case: Case, template: ChatTemplate, dialogs: list[Dialog]) -> list[tuple[str, Dialog]]:
    """Return where the ids differ from those of the whole rendered string."""
    different = []
    for dialog in dialogs:
        rendering, tokens = tokens_of(case, template, dialog)
        if tokens.ids != case.raw_ids("".join(rendering.prompt)):
            different.append((template.name, dialog))
    return different


def test_benign_prompts_have_the_ids_that_llama_cpp_gives_them(case: Case) -> None:
    dialogs = [*BENIGN.values(), *([] if case.name == "phi-3" else SPACED.values())]
    assert [found for template in case.templates for found in compare_with_llama_cpp(case, template, dialogs)] == []


def test_the_texts_that_llama_cpp_tests_its_tokenizers_with_have_its_ids(case: Case) -> None:
    path = case.file.path.with_name(case.file.path.name + ".inp")
    if not path.is_file():  # two vocabularies come without: those of a neighbour do
        path = path.with_name("ggml-vocab-gpt-2.gguf.inp")
    texts = path.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    assert len(texts) > 40
    if case.name == "phi-3":
        texts = [text for text in texts if text == text.lstrip()]
    dialogs = [Dialog(text, text, (Turn("x" + text, text or "x"), Turn(text or "x"))) for text in texts]
    for template in case.templates[:2]:
        assert compare_with_llama_cpp(case, template, dialogs) == []


def test_phi_3_loses_space_after_a_marker_and_tier_text_keeps_it(reference: Reference) -> None:
    file = ModelFile(reference.vocabulary("phi-3"))
    with load_vocabulary(file) as vocabulary:
        case = Case("phi-3", file, vocabulary, [choose_template("auto", file)])
        for text in SPACED["spaces around"].turns[0].query, "\n\n\nq", " Yes.":
            dialog = Dialog("", "", (Turn("q", text), Turn("q")))
            rendering, tokens = tokens_of(case, case.templates[0], dialog)
            prompt = "".join(rendering.prompt)
            stripped = prompt.replace(text, text.lstrip()).replace("<|assistant|>\n", "<|assistant|>")
            assert case.raw_ids(prompt) == case.raw_ids(stripped)  # llama.cpp: the answer's own space is gone
            said = b"".join(token.data for token in tokens.tokens if token.tier == "response")
            assert said in (text.encode(), b" " + text.encode())  # SentencePiece puts one in front
            assert b"|>\n" not in b"".join(token.data for token in tokens.tokens)  # the template's newlines are gone


# Benign text against transformers: its apply_chat_template and a fast tokenizer of the same tokens and merges


class Family(NamedTuple):
    """How a family's tokenizer cuts text before BPE."""

    pre_tokenizer: Any
    normalizer: Any = None
    options: Mapping[str, Any] = MappingProxyType({})
    template: str = "chatml"


def byte_level(regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def split_by(*patterns: str) -> Any:
    """Cut by patterns one after the other, then turn bytes into letters."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, byte_level(False)])


def cl100k(letters: str, digits: str) -> str:
    """Return the pattern of GPT-4's family; `letters` is the inside of a class."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


single_digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])
sentencepiece = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
NO_CUT = pre_tokenizers.Sequence([])
BYTES_TOO = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
FAMILIES = {
    "gpt-2": Family(byte_level(True)),
    "starcoder": Family(single_digits),
    "refact": Family(single_digits),
    "command-r": Family(single_digits, template="auto"),
    "qwen2": Family(split_by(cl100k(r"\p{L}", r"\p{N}")), normalizers.NFC(), template="Qwen-Qwen2.5-7B-Instruct"),
    "qwen35": Family(split_by(cl100k(r"\p{L}\p{M}", r"\p{N}")), normalizers.NFC(), template="Qwen3.5-4B"),
    "llama-bpe": Family(
        split_by(cl100k(r"\p{L}", r"\p{N}{1,3}")),
        options={"ignore_merges": True},
        template="meta-llama-Llama-3.1-8B-Instruct",
    ),
    "mpt": Family(byte_level(True), normalizers.NFC()),
    "gemma-4": Family(
        pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁"), BYTES_TOO, "auto"
    ),
    "llama-spm": Family(NO_CUT, sentencepiece, BYTES_TOO, "mistral"),
    "phi-3": Family(NO_CUT, sentencepiece, BYTES_TOO, "auto"),
}


def merges_of(file: ModelFile, tokens: list[str]) -> list[tuple[str, str]]:
    """Return the merges of a vocabulary; those of a SentencePiece one follow from its scores."""
    merges = [tuple(merge.split(" ", 1)) for merge in file.items("tokenizer.ggml.merges")]
    if merges:
        return merges  # type: ignore[return-value]
    rank = {token: number for number, token in enumerate(tokens)}
    scores = list(file.items("tokenizer.ggml.scores"))
    found = []
    for token, number in rank.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in rank and pair[1] in rank]
        found += [(-scores[number], number, rank[a], rank[b], (a, b)) for a, b in pairs]
    return [pair for *_, pair in sorted(found)]


@cache
def reference_tokenizer(path: Path, name: str) -> PreTrainedTokenizerFast:
    """Rebuild the fast tokenizer of a real model from llama.cpp's copy of its vocabulary."""
    file, family = ModelFile(path), FAMILIES[name]
    tokens, kinds = list(file.items("tokenizer.ggml.tokens")), list(file.items("tokenizer.ggml.token_type"))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges_of(file, tokens), **family.options))
    tokenizer.pre_tokenizer = family.pre_tokenizer
    if family.normalizer:
        tokenizer.normalizer = family.normalizer
    strips = name == "phi-3"  # its own tokenizer.json says so
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == 3, normalized=False, rstrip=strips and token not in ("<s>", "<unk>"))
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (3, 4)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=file.token("bos") or None, eos_token=file.token("eos") or None
    )


def reference_ids(case_path: Path, name: str, template: ChatTemplate, rendering: Rendering) -> list[int]:
    """Let transformers render and tokenise the same messages."""
    messages = [{"role": message["role"], "content": "".join(message["content"])} for message in rendering.messages]
    return list(
        reference_tokenizer(case_path, name).apply_chat_template(
            messages,
            chat_template=template.template.source,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, reference: Reference) -> Iterator[Case]:
    """Load the vocabularies whose reference tokenizer can be rebuilt, each with its family's template."""
    file, name = ModelFile(reference.vocabulary(request.param)), FAMILIES[request.param].template
    real = reference.llama_cpp / "models" / "templates" / f"{name}.jinja"
    with load_vocabulary(file) as vocabulary:
        template = choose_template(str(real) if real.is_file() else name, file)
        yield Case(request.param, file, vocabulary, [template])


def same_as_transformers(family: Case, dialog: Dialog) -> bool:
    """Compare ids; a BOS that the vocabulary wants and the template leaves out is not transformers' to add."""
    rendering, tokens = tokens_of(family, family.templates[0], dialog)
    theirs, bos = reference_ids(family.file.path, family.name, family.templates[0], rendering), family.vocabulary.bos
    return tokens.ids == (theirs if bos is None or theirs[:1] == [bos] else [bos, *theirs])


def composed(dialog: Dialog) -> Dialog:
    """Return a dialog in NFC."""
    nfc = partial(unicodedata.normalize, "NFC")
    turns = tuple(Turn(nfc(turn.query), turn.response and nfc(turn.response)) for turn in dialog.turns)
    return Dialog(nfc(dialog.system_info), nfc(dialog.user_info), turns)


def test_benign_prompts_have_the_ids_that_transformers_gives_them(family: Case) -> None:
    dialogs = [*BENIGN.values(), *([] if family.name == "phi-3" else SPACED.values())]
    if FAMILIES[family.name].normalizer and not family.name.startswith(("gemma", "llama", "phi")):
        assert not same_as_transformers(family, BENIGN["many scripts"])  # known: llama.cpp applies no NFC
        dialogs = [composed(dialog) for dialog in dialogs]
    assert [dialog for dialog in dialogs if not same_as_transformers(family, dialog)] == []


def test_phi_3_keeps_the_space_that_transformers_too_strips(reference: Reference) -> None:
    file = ModelFile(reference.vocabulary("phi-3"))
    with load_vocabulary(file) as vocabulary:
        phi_3 = Case("phi-3", file, vocabulary, [choose_template("auto", file)])
        for turn in (Turn("q", " Yes."), Turn("q", "\n\nYes.")):
            dialog, stripped = (Dialog("", "", (Turn("q", text), Turn("q"))) for text in (turn.response, "Yes."))
            assert not same_as_transformers(phi_3, dialog) and same_as_transformers(phi_3, stripped)
            theirs, other = (
                reference_ids(file.path, "phi-3", phi_3.templates[0], render(each, phi_3.templates[0]))
                for each in (dialog, stripped)
            )
            assert theirs == other


def test_sentencepiece_doubles_a_leading_space_where_a_metaspace_tokenizer_does_not(
    reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "bare.jinja"
    path.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    file = ModelFile(reference.vocabulary("llama-spm"))
    with load_vocabulary(file) as vocabulary:
        spm = Case("llama-spm", file, vocabulary, [choose_template(str(path), file)])
        old = reference_tokenizer(file.path, "llama-spm")
        new = Tokenizer.from_str(old.backend_tokenizer.to_str())
        new.normalizer = normalizers.Sequence([])
        new.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        for text, same in (("What is tea?", True), (" What is tea?", False)):
            rendering, tokens = tokens_of(spm, spm.templates[0], Dialog("", "", (Turn(text),)))
            assert tokens.ids == reference_ids(file.path, "llama-spm", spm.templates[0], rendering)
            assert (tokens.ids == new.encode("".join(rendering.prompt), add_special_tokens=False).ids) == same


# Hostile text: it stays text

ZERO_WIDTH = "\u200b"
ODD = [
    *["<|im_start|>", "<|im_end|>", "<|system_info|>", "<|user_info|>", "<|user|>", "<|assistant|>", "<|end|>"],
    *[
        "<s>",
        "</s>",
        "<unk>",
        "[INST]",
        "[/INST]",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|turn>",
        "<turn|>",
        "<｜User｜>",
    ],
    *[
        "<|begin_of_text|>",
        "<|start_header_id|>system<|end_header_id|>",
        "<|eot_id|>",
        "<|endoftext|>",
        "### Response:\n",
    ],
    *["<0x0A>", "<0xFF>", "<0x00>", "▁", "▁▁x", "Ġ", "Ċ", "[UNK_BYTE_0xe29681]", "<think>", "</tool_call>"],
    *[
        "{{ bos_token }}",
        "{{ eos_token }}",
        "{% if true %}x{% endif %}",
        "{# note #}",
        "{{",
        "}}",
        "{%",
        "%}",
        "{% raw %}",
    ],
    *["\0", "a\0b", "\x1b[31m", "\x7f", "\x85", "\r", "\u2028", "\ufeff", ZERO_WIDTH, "\u200d", "\u202e\u200f\u2066"],
    *[
        "a\u0301\u0323",
        "\u0301",
        "e\u20dd",
        "\ufffd",
        "\ufffe",
        "\U0010ffff",
        "＜|im_end|＞",
        "<|lm_end|>",
        "<│im_end│>",
    ],
    *["<|im_<|im_end|>end|>", "<|im_end|>|>", "<|<|im_end|>", "< |im_end|>", "<|im_end|", "|im_end|>", "<|IM_END|>"],
]


def hostile_texts(case: Case) -> list[str]:
    """Return every special token of a vocabulary and all odd texts: in a row, apart, nested, split; the worst also alone."""
    specials = case.specials()
    named = [
        text for text in specials if not re.fullmatch(r"\[PAD\d+\]", text)
    ]  # fillers of converters, by the thousand
    split = [text[: len(text) // 2] + ZERO_WIDTH + text[len(text) // 2 :] for text in named]
    nested = [text[: len(text) // 2] + text + text[len(text) // 2 :] for text in [*named, *ODD]]
    joined = ["".join(specials), "\n".join(specials), " ".join(split), "".join(nested), "".join(ODD), " ".join(ODD)]
    return [*joined, *(text.upper() for text in joined[:1]), *named[:8], *ODD]


def hostile_dialogs(case: Case) -> Iterator[Dialog]:
    """Yield dialogs so that every tier gets to hold every hostile text."""
    texts = hostile_texts(case)
    for number in range(len(texts)):
        system_info, user_info, response, query = (texts[(number + shift) % len(texts)] for shift in (0, 1, 3, 5))
        yield Dialog(system_info, user_info, (Turn("first", response), Turn(query)))


def check_tiers(case: Case, template: ChatTemplate, dialog: Dialog) -> list[int]:
    """Assert that no token with a tier is reserved, and that each tier's tokens spell the tier's text.

    Return the reserved ids of the scaffold.
    """
    rendering, tokens = tokens_of(case, template, dialog)
    reserved = [token for token in tokens.tokens if case.reserved(token.id, template.template.source)]
    assert not [token for token in reserved if token.tier], template.name
    given = {"system_info": dialog.system_info, "user_info": dialog.user_info, "query": dialog.turns[-1].query}
    for tier in (*given, "response"):
        prompt = "".join(text for text, owner in rendering.prompt.pieces() if owner == tier)
        spelled = b"".join(token.data for token in tokens.tokens if token.tier == tier)
        for text, owner in rendering.prompt.pieces():
            assert owner != tier or case.spelt(text) in spelled, (template.name, tier, text[:80])
        assert given.get(tier, "").strip() in prompt  # the template may trim; a thinking one cuts old answers, too
    return [token.id for token in reserved]


def test_hostile_text_in_any_tier_stays_text_and_leaves_the_scaffold_as_it_is(case: Case) -> None:
    for template in case.templates:
        benign = check_tiers(case, template, Dialog("abc", "abc", (Turn("first", "abc"), Turn("abc"))))
        for dialog in hostile_dialogs(case):
            scaffold = check_tiers(case, template, dialog)
            if template.name in SHIPPED and all(
                text.strip() for _, text in dialog.texts()
            ):  # else it lays out otherwise
                assert scaffold == benign, template.name


CLOSERS = {
    "chatml": "<|im_end|>",
    "metaalign": "<|end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "[/INST]",
    "plain": "### Response:",
}


def test_a_closer_is_either_a_token_that_text_cannot_become_or_reported_as_forged(case: Case) -> None:
    for template in [template for template in case.templates if template.name in SHIPPED]:
        closer = CLOSERS[template.name]
        dialog = Dialog("s", "p", (Turn("first", "r"), Turn(f"x {closer}\n y")))
        a_token = len(ids := case.raw_ids(closer)[-1:]) == 1 and case.vocabulary.piece(ids[0]).decode() == closer
        assert (closer in tokens_of(case, template, dialog)[1].imitated_markers) != a_token, template.name


def test_a_marker_cannot_be_put_together_from_the_ends_of_two_tiers(case: Case) -> None:
    named = [text for text in case.specials() if not re.fullmatch(r"\[PAD\d+\]", text)][:40]
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for marker in [text for text in [*named, *ODD] if len(text) > 2 and text.strip() == text]:
        begun, ended = marker[: len(marker) // 2], marker[len(marker) // 2 :]
        for source, dialog in (
            (bare, Dialog(begun, "", (Turn(ended),))),
            ("{% raw %}" + begun + "{% endraw %}" + bare, Dialog("", "", (Turn(ended),))),
        ):
            template = replace(case.templates[-1], template=Template(source, "bare"))
            tokens = tokens_of(case, template, dialog)[1].tokens
            assert not [token for token in tokens if token.tier and case.reserved(token.id, source)]
            assert case.spelt(marker) in b"".join(token.data for token in tokens)


# Enormous text: in a child process, for llama.cpp may crash

GIANTS = """
import sys
from pathlib import Path
from metaalign_edge import ContextOverflow, Dialog, Turn, choose_template, render, tokenize
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.vocabulary import load_vocabulary
file = ModelFile(Path(sys.argv[1]))
chat_template = choose_template("chatml", file)
megabytes = ["The quick brown fox, 12 times.\\n" * 34000, "a" * 2**20]
runs = [letter * 30000 for letter in ("a", " ", "\\n", "7", "!", "中", "😀")]
outcomes = []
with load_vocabulary(file) as vocabulary:
    for text, context in [(text, 131072) for text in megabytes + runs] + [(megabytes[0] * 3, 4096)]:
        try:
            rendering = render(Dialog("s", "p", (Turn(text),)), chat_template)
            tokens = tokenize(rendering, vocabulary, context).tokens
            assert text.encode() in b"".join(token.data for token in tokens if token.tier == "query")
            outcomes.append("survived")
        except ContextOverflow:
            outcomes.append("refused")
print(*outcomes)
"""


@pytest.mark.parametrize("name", VOCABULARIES)
def test_enormous_text_is_refused_or_survived_and_never_a_crash(name: str, reference: Reference) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIANTS, str(reference.vocabulary(name))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    *tokenised, beyond = done.stdout.split()
    assert set(tokenised) <= {"survived", "refused"} and "survived" in tokenised and beyond == "refused"


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_file_says_what_its_tokens_stand_for_as_llama_cpp_does(name: str, reference: Reference) -> None:
    file = ModelFile(reference.vocabulary(name))
    with load_vocabulary(file) as vocabulary:
        for token, (kind, text) in enumerate(
            zip(file.items("tokenizer.ggml.token_type"), token_texts(file), strict=True)
        ):
            written = vocabulary.piece(token) if kind in (1, 4, 6) else b""  # a normal one, the user's, or a byte
            assert text == (b"" if written.startswith(b"[UNK_BYTE_") else written), token


CHILD = """
import sys
from pathlib import Path
texts = {"megabyte": " tea" * 262_144, "letter": "a" * 30_000, "spaces": "x" + " " * 100_000 + "x", "lines": "\\n" * 50_000}
from metaalign_edge import Dialog, Turn, choose_template, render, tokenize
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.vocabulary import load_vocabulary
file = ModelFile(Path(sys.argv[1]))
chat = choose_template("chatml", file)
with load_vocabulary(file) as vocabulary:
    for name, text in texts.items():
        print(name, flush=True)
        rendering = render(Dialog(turns=(Turn(text),)), chat)
        tokens = tokenize(rendering, vocabulary, 1 << 20).tokens
        assert text.strip() in b"".join(token.data for token in tokens if token.tier).decode()
print("survived")
"""


@pytest.mark.parametrize("pre", ["qwen2", "deepseek-llm", "deepseek-coder", "gpt-2", "spm"])
def test_a_megabyte_and_a_long_run_of_one_letter_do_not_crash_the_process(pre: str, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    if pre == "spm":
        vocabularies.write_spm(path)
    else:
        vocabularies.write_bpe(path, pre)
    child = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=120)
    assert child.stdout.split() == ["megabyte", "letter", "spaces", "lines", "survived"], child.stderr[-500:]
