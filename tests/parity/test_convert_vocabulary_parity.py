"""Vocabularies against llama.cpp's own fixtures, its converter, and the libraries that models are trained with."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import sentencepiece
from helpers.checkpoints import CONFIG, edit_json, write_json
from helpers.vocabularies import FLAGS, GEMMA, LEGACY, METASPACE, model_proto, spm_tokenizer
from tokenizers import Tokenizer
from transformers import GemmaTokenizer, LlamaTokenizer

from metaalign_edge_convert import ARCHITECTURES
from metaalign_edge_convert.chat import read_templates
from metaalign_edge_convert.describe import add_vocabulary, write_head
from metaalign_edge_convert.folder import Folder
from metaalign_edge_convert.pretokenizers import DEEPSEEK_CODER, DEEPSEEK_LLM, SENTENCEPIECE_PRE, TABLE
from metaalign_edge_convert.prove import TEXTS, tokenize_with_llama, write_vocabulary
from metaalign_edge_convert.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from conftest import Reference

Json = dict[str, Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SENTENCEPIECE = (  # classes whose vocabularies the reference reads from tokenizer.model
    *("LlamaForCausalLM", "GraniteForCausalLM", "Qwen2ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM"),
    *("Gemma3ForCausalLM", "Phi3ForCausalLM", "InternLM2ForCausalLM", "InternLM3ForCausalLM"),
)
SHELL = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, "decoder": None}


def vocabulary_of(folder: Path, rows: int, name: str = "LlamaForCausalLM") -> Vocabulary:
    """Read a folder's vocabulary as the class ``name`` does."""
    config = json.loads((folder / "config.json").read_text())
    return read_vocabulary(Folder(folder), rows, config, ARCHITECTURES[name].vocabulary)


def as_gguf(folder: Path, rows: int, name: str = "LlamaForCausalLM") -> Path:
    """Write a folder's vocabulary into a file beside it."""
    vocabulary = vocabulary_of(folder, rows, name)
    pre = SENTENCEPIECE_PRE
    if vocabulary.signature is not None:
        assert vocabulary.signature.row is not None, str(vocabulary.signature)
        pre = vocabulary.signature.row.name
    path = folder.parent / f"{folder.name}.gguf"
    write_vocabulary(path, "llama", vocabulary, pre)
    return path


# -- llama.cpp's fixtures ---------------------------------------------------------------------------------------------


def isolate(*regexes: str) -> list[Json]:
    """Split with each regular expression in turn."""
    return [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in regexes
    ]


def byte_level(words: bool) -> Json:
    """Turn bytes into letters, after cutting words or not."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}


def of_row(name: str) -> list[Json]:
    """Split as the table's row for llama.cpp's name ``name`` says."""
    row = next(row for row in TABLE if row.name == name)
    return [*isolate(row.parts[0].removeprefix("split(").removesuffix(")")), byte_level(False)]


EACH_DIGIT = {"type": "Digits", "individual_digits": True}
FIXTURES: dict[str, tuple[list[Json], Json]] = {  # vocabulary -> the model's pre-tokenizers, further keys of its model
    "gpt-2": ([byte_level(True)], {}),
    "mpt": ([byte_level(True)], {}),
    "starcoder": ([EACH_DIGIT, byte_level(True)], {}),
    "refact": ([EACH_DIGIT, byte_level(True)], {}),
    "command-r": ([EACH_DIGIT, byte_level(True)], {}),
    "llama-bpe": (of_row("llama-bpe"), {"ignore_merges": True}),
    "qwen2": (of_row("qwen2"), {}),
    "qwen35": (of_row("qwen35"), {}),
    "deepseek-llm": ([*isolate(*DEEPSEEK_LLM), EACH_DIGIT, byte_level(False)], {}),
    "deepseek-coder": ([*isolate(*DEEPSEEK_CODER), EACH_DIGIT, byte_level(False)], {}),
}


def fixture(reference: Reference, name: str) -> tuple[Json, list[str], list[list[int]]]:
    """Return a vocabulary's keys, the texts to tokenize, and the tokens that they must become."""
    path = reference.vocabulary(name)
    fields = gguf.GGUFReader(path).fields
    keys = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()}
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().split("\n")[: len(texts)]
    return keys, texts, [[int(number) for number in line.split()] for line in lines]


@pytest.mark.parametrize("name", FIXTURES)
def test_real_byte_level_vocabularies_give_the_tokens_of_llama_cpps_fixtures(
    name: str, reference: Reference, tmp_path: Path
) -> None:
    keys, texts, wanted = fixture(reference, name)
    steps, model = FIXTURES[name]
    tokens, types = keys["tokens"], keys["token_type"]
    holes = {number for number, token in enumerate(tokens) if token == f"[PAD{number}]"}
    added = [
        {"id": number, "content": token, **FLAGS, "special": types[number] == CONTROL}
        for number, token in enumerate(tokens)
        if types[number] != NORMAL and number not in holes
    ]
    vocab = {token: number for number, token in enumerate(tokens) if types[number] == NORMAL}
    tokenizer = {
        **SHELL,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {"type": "BPE", "vocab": vocab, "merges": [merge.split(" ") for merge in keys["merges"]], **model},
    }
    folder = tmp_path / name
    folder.mkdir()
    write_json(folder / "config.json", {"eos_token_id": keys["eos_token_id"]})
    write_json(folder / "tokenizer.json", tokenizer)
    assert tokenize_with_llama(as_gguf(folder, len(tokens)), texts) == wanted


def real_llama(reference: Reference, folder: Path, name: str = "llama-spm") -> tuple[Path, list[str], list[list[int]]]:
    """Rebuild the files of Llama 2 or Phi-3 from llama.cpp's copy of its vocabulary."""
    keys, texts, wanted = fixture(reference, name)
    base = 32000
    kinds = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * (base - 259))]
    found = list(zip(keys["tokens"][:base], keys["scores"][:base], kinds, strict=True))
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model_proto(found))
    tokenizer = spm_tokenizer(found)
    extra = [
        {"id": number, "content": token, **FLAGS, "special": True}
        for number, token in enumerate(keys["tokens"])
        if number >= base and not token.startswith("[PAD")
    ]
    tokenizer["added_tokens"] += extra
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "config.json", {"bos_token_id": 1, "eos_token_id": 2})
    return folder, texts, wanted


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_real_sentencepiece_vocabularies_give_the_tokens_of_llama_cpps_fixtures(
    name: str, reference: Reference, tmp_path: Path
) -> None:
    folder, texts, wanted = real_llama(reference, tmp_path / "real", name)
    rows = 32064 if name == "phi-3" else 32000
    for missing in (None, "tokenizer.model"):
        if missing:
            (folder / missing).unlink()
        assert tokenize_with_llama(as_gguf(folder, rows), texts) == wanted


# -- with tokenizer.model and without it ------------------------------------------------------------------------------

SYLLABLES = {
    "latin": "the and ing tion er on re at en nd ti es or te of ed is it al ar st to nt ha ve co ma ro li ch qu é ü ñ",
    "cyrillic": "при вет ст ого на ен то ра ко не по ро во ть ил ло го мо ск че жу ща",
    "greek": "και του της ον ος αι με να θα εν ση τη",
    "han": "的 一 是 不 了 人 我 在 有 他 这 中 大 来 上 国 你 好 世 界 今 天",
    "kana": "の に は を た が で て と し れ さ カ タ ナ ン ス ル",
    "hangul": "안녕 하세 요 세계 입니 다 그리 고 사람",
    "arabic": "ال من في على ما لا ان هذا كان",
    "hindi": "न म स् ते दु नि या है और के",
}
SIGNS = (". ", ", ", "! ", "? ", "\n", "\n\n", "  ", "    ", "\t", " - ", "...", "'s ", " (", ") ", '"', "/", "1", "23", "2024", "🙂", "👩‍👩‍👧", "¿", "…")  # fmt: skip


@cache
def corpus(count: int, seed: int) -> tuple[str, ...]:
    """Make up lines in many scripts, none of which begins with a space."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        line = ""
        for _ in range(draw.randrange(3, 14)):
            script = draw.choice(list(SYLLABLES.values())).split()
            word = "".join(draw.choices(script, k=draw.randrange(1, 5)))
            line += draw.choice((word, word.capitalize(), word.upper(), word)) + draw.choice((" ", " ", " ", *SIGNS))
        lines.append(line.lstrip(" ") if draw.random() < 0.5 else line.strip())
    return tuple(line for line in lines if line)


@cache
def trained(prefix: bool = True) -> bytes:
    """Train a SentencePiece BPE model of 4,000 pieces."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(8000, 1)),
        model_writer=file,
        model_type="bpe",
        vocab_size=4000,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.995,
        num_threads=1,
        minloglevel=2,
        # as Gemma has them: pieces that the tokenizer is told to keep whole
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
    )
    return file.getvalue()


def pieces_of(data: bytes) -> list[tuple[str, float, int]]:
    """Ask the sentencepiece library for a model's pieces."""
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    checks = ((model.IsUnknown, 2), (model.IsControl, 3), (model.IsByte, 6))
    kinds = [next((kind for check, kind in checks if check(number)), 1) for number in range(len(model))]
    return [(model.IdToPiece(number), model.GetScore(number), kind) for number, kind in enumerate(kinds)]


def trained_folder(folder: Path, *, style: Json = LEGACY, name: str = "LlamaForCausalLM", rows: int = 4096) -> Path:
    """Write what transformers 4 saved of a tokenizer trained with SentencePiece."""
    folder.mkdir(parents=True)
    found = pieces_of(trained(style is not GEMMA))
    count = len(found)
    tokenizer = spm_tokenizer(found, style=style)
    (folder / "tokenizer.model").write_bytes(trained(style is not GEMMA))
    if name == "InternLM2ForCausalLM":  # its added tokens are in the place of pieces that it kept for them
        kept = [(f"[UNUSED_TOKEN_{number}]", 0.0, 1) for number in range(rows - count - 1)]
        (folder / "tokenizer.model").write_bytes(model_proto([*found, *kept, ("\0", 0.0, 1)]))
    turns = [tokenizer["model"]["vocab"][text] for text in ("<start_of_turn>", "<end_of_turn>")]
    tokenizer["added_tokens"] += [
        {"id": turns[0], "content": "<start_of_turn>", **FLAGS, "special": True},
        {"id": turns[1], "content": "<end_of_turn>", **FLAGS, "special": True},
        {"id": count, "content": "<|im_end|>", **FLAGS, "special": True},
        {"id": count + 1, "content": "<tool>", **FLAGS, "special": False},
        {"id": count + 2, "content": "<|looks|>", **FLAGS, "special": False},
    ]
    write_json(folder / "tokenizer.json", tokenizer)
    config = {**CONFIG, "architectures": [name], "vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2}
    config |= {"model_type": MODEL_TYPES[name], "head_dim": 16}
    write_json(folder / "config.json", config)
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in tokenizer["added_tokens"]}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": decoder,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": {"content": "</s>", **FLAGS, "__type": "AddedToken"},
        "chat_template": "{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>{% endfor %}",
    }
    write_json(folder / "tokenizer_config.json", settings)
    return folder


MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "GraniteForCausalLM": "granite",
    "Qwen2ForCausalLM": "qwen2",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "internlm3",
}


@pytest.mark.parametrize("style", [LEGACY, METASPACE, GEMMA], ids=["legacy", "metaspace", "gemma"])
def test_a_trained_vocabulary_gives_the_same_tokens_without_its_tokenizer_model(style: Json, tmp_path: Path) -> None:
    lines = [*corpus(6000, 2), *(text for text in TEXTS if not text.startswith(" "))]
    folder = trained_folder(tmp_path / "tiny", style=style)
    (folder / "generation_config.json").write_text("{}")
    with_it = tokenize_with_llama(as_gguf(folder, 4096), lines)
    (folder / "tokenizer.model").unlink()
    without = tokenize_with_llama(as_gguf(folder, 4096), lines)
    assert len(lines) >= 5000
    assert with_it == without
    assert with_it == sentencepiece.SentencePieceProcessor(model_proto=trained(style is not GEMMA)).Encode(lines)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert with_it == [found.ids for found in tokenizer.encode_batch(lines, add_special_tokens=False)]


def test_llama_2_gives_the_same_tokens_without_its_tokenizer_model(reference: Reference, tmp_path: Path) -> None:
    folder, _, _ = real_llama(reference, tmp_path / "llama-2")
    lines = corpus(6000, 3)
    with_it = tokenize_with_llama(as_gguf(folder, 32000), lines)
    (folder / "tokenizer.model").unlink()
    assert tokenize_with_llama(as_gguf(folder, 32000), lines) == with_it


# -- llama.cpp's converter --------------------------------------------------------------------------------------------

DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf
for source, output in json.load(sys.stdin):
    sys.argv = ["convert", source, "--outfile", output, "--vocab-only"]
    try:
        convert_hf_to_gguf.main()
    except BaseException as error:
        print(json.dumps([source, f"{type(error).__name__}: {error}"]))
"""


def convert_vocabularies(reference: Reference, folders: list[Path]) -> dict[Path, str]:
    """Convert the vocabulary of each folder with llama.cpp's converter; return its errors by folder."""
    command = [sys.executable, "-c", DRIVER, str(reference.llama_cpp)]
    jobs = json.dumps([[str(folder), str(theirs(folder))] for folder in folders])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, input=jobs, text=True, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {Path(source): error for source, error in map(json.loads, done.stdout.splitlines())}


def theirs(folder: Path) -> Path:
    """Return where llama.cpp's converter writes the vocabulary of a folder."""
    return folder.parent / f"{folder.name}-theirs.gguf"


def tokenizer_keys(path: Path) -> list[tuple[str, Any, Any]]:
    """Return the tokenizer's keys in the order of the file: name, type, value."""
    fields = gguf.GGUFReader(path).fields.values()
    return [(field.name, field.types, field.contents()) for field in fields if field.name.startswith("tokenizer.")]


def plain(folder: Path) -> None:
    """Leave the folder as it is."""


def fewer_files(folder: Path) -> None:
    """Have tokenizer.model alone, as the first Llamas had."""
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=None, pad_token=None)


def older_lists(folder: Path) -> None:
    """List the added tokens as transformers did before its version 4.34."""
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=None)
    write_json(folder / "added_tokens.json", {"<tool>": 4001, "<|im_end|>": 4000})


def settings(**changes: Any) -> Any:
    """Change tokenizer_config.json."""
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


CASES: dict[str, tuple[str, int, Any]] = {
    **{name: (name, 4096, plain) for name in SENTENCEPIECE if name != "InternLM2ForCausalLM"},
    # every row has a piece, as its converter expects
    "InternLM2": ("InternLM2ForCausalLM", 4006, plain),
    "no tokenizer.json": ("LlamaForCausalLM", 4096, fewer_files),
    "added_tokens.json": ("LlamaForCausalLM", 4096, older_lists),
    "space": ("LlamaForCausalLM", 4096, settings(add_prefix_space=True)),
    "space in InternLM3": ("InternLM3ForCausalLM", 4096, settings(add_prefix_space=True)),
    "no bos": ("LlamaForCausalLM", 4096, settings(add_bos_token=False)),
    "rows of Code Llama": ("LlamaForCausalLM", 32016, plain),
    "rows of Granite": ("GraniteForCausalLM", 49152, plain),
}


def test_the_keys_are_those_of_the_reference_converter_wherever_that_works(
    reference: Reference, tmp_path: Path
) -> None:
    folders = {}
    for case, (name, rows, change) in CASES.items():
        style = GEMMA if "Gemma" in name else LEGACY
        folder = trained_folder(tmp_path / case.replace(" ", "-"), style=style, name=name, rows=rows)
        change(folder)
        folders[case] = (folder, rows, name)
    errors = convert_vocabularies(reference, [folder for folder, _, _ in folders.values()])
    assert errors == {}
    for case, (folder, rows, name) in folders.items():
        vocabulary = vocabulary_of(folder, rows, name)
        writer = gguf.GGUFWriter(None, "llama")
        add_vocabulary(writer, vocabulary, SENTENCEPIECE_PRE, read_templates(Folder(folder)))
        ours = folder.parent / f"{folder.name}-ours.gguf"
        with ours.open("wb") as file:
            write_head(writer, file)
        assert tokenizer_keys(ours) == tokenizer_keys(theirs(folder)), case


def test_folders_saved_by_transformers_5_convert_right_where_the_reference_does_not(
    reference: Reference, tmp_path: Path
) -> None:
    wanted, folders = {}, {}
    lines = [line for line in corpus(6000, 4) if not line.startswith(" ")]
    for kind, name, style in (
        (LlamaTokenizer, "LlamaForCausalLM", LEGACY),
        (GemmaTokenizer, "Gemma2ForCausalLM", GEMMA),
        (GemmaTokenizer, "Gemma3ForCausalLM", GEMMA),
        (LlamaTokenizer, "Phi3ForCausalLM", LEGACY),
    ):
        old = trained_folder(tmp_path / f"{name}-4", style=style, name=name)
        wanted[name] = tokenize_with_llama(as_gguf(old, 4096, name), lines)
        new = folders[name] = tmp_path / f"{name}-5"
        kind.from_pretrained(old).save_pretrained(new)
        (new / "config.json").write_text((old / "config.json").read_text())
        assert not (new / "tokenizer.model").exists()
        assert "added_tokens_decoder" not in json.loads((new / "tokenizer_config.json").read_text())
        assert tokenize_with_llama(as_gguf(new, 4096, name), lines) == wanted[name]
        assert [vocabulary_of(new, 4096, name).types[number] for number in (4000, 4001)] == [CONTROL, USER_DEFINED]
    errors = convert_vocabularies(reference, list(folders.values()))
    assert "tokenizer.model" in errors[folders["Gemma2ForCausalLM"]]
    assert "BPE pre-tokenizer was not recognized" in errors[folders["Gemma3ForCausalLM"]]
    assert "Missing" in errors[folders["Phi3ForCausalLM"]]
    assert folders["LlamaForCausalLM"] not in errors
    broken = {name: value for name, _, value in tokenizer_keys(theirs(folders["LlamaForCausalLM"]))}
    assert set(broken["tokenizer.ggml.scores"]) == {-1000.0}
    assert len(broken["tokenizer.ggml.tokens"]) < 4096
