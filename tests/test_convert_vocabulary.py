"""The checkpoint's own vocabulary: which kind it is, what becomes of it in GGUF, and what llama.cpp makes of that."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import gguf_files
from helpers.checkpoints import BYTE_LEVEL, CONFIG, ROWS, edit_json, make_checkpoint, write_json, write_tokenizer
from helpers.vocabularies import FLAGS, GEMMA, LEGACY, METASPACE, model_proto, pieces, write_sentencepiece
from tokenizers import Tokenizer

from metaalign_edge_convert import open_checkpoint, prove_pre_tokenizer, write_gguf
from metaalign_edge_convert.folder import Folder
from metaalign_edge_convert.pretokenizers import DISTINCT, TABLE
from metaalign_edge_convert.prove import TEXTS, choose_pre_tokenizer, tokenize_with_llama
from metaalign_edge_convert.sentencepiece import parse_model
from metaalign_edge_convert.vocabulary import Vocabulary, VocabularyRules, read_vocabulary
from metaalign_edge_runtime.errors import LoadError

LLAMA = {**CONFIG, "bos_token_id": 1, "eos_token_id": 2}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
WORDS = ("hello world", "the thing's and 12 other stories....", "    spaces", "Привет 你好 🙂", "é\n\tü")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint with a SentencePiece vocabulary in both of its files."""
    return write_sentencepiece(make_checkpoint(tmp_path / "tiny", bos_token_id=1, eos_token_id=2))


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    """A tiny checkpoint with byte-level BPE."""
    return make_checkpoint(tmp_path / "tiny")


def convert(folder: Path) -> Path:
    """Convert a folder into a file beside it, without the proof."""
    output = folder.parent / "out.gguf"
    write_gguf(open_checkpoint(folder), output, outtype="f16", force=True, check=False)
    return output


def keys(path: Path) -> dict[str, Any]:
    """Read the tokenizer's keys of a GGUF file."""
    found = gguf_files.keys(path).items()
    return {name.split(".")[-1]: value for name, value in found if name.startswith("tokenizer.")}


def read(folder: Path, rows: int = ROWS, config: dict[str, Any] = LLAMA, **rules: Any) -> Vocabulary:
    """Read a folder's vocabulary by some rules."""
    return read_vocabulary(Folder(folder), rows, config, VocabularyRules(**rules))


def add(folder: Path, *texts: str, **flags: Any) -> None:
    """Add tokens to tokenizer.json, behind those that are there."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added, vocab = tokenizer["added_tokens"], tokenizer["model"]["vocab"]
    number = len(vocab.keys() | {token["content"] for token in added})
    for place, text in enumerate(texts):
        added.append({"id": number + place, "content": text, **FLAGS, "special": False, **flags})
    edit_json(folder / "tokenizer.json", added_tokens=added)


# -- SentencePiece ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [LEGACY, METASPACE, GEMMA], ids=["legacy", "metaspace", "gemma"])
def test_the_vocabulary_is_the_same_with_and_without_tokenizer_model(style: dict[str, Any], folder: Path) -> None:
    texts = [text for text in (*TEXTS, *WORDS) if style is not METASPACE or not text.startswith(" ")]
    found = []
    for model, json_style in ((True, style), (False, style), (True, None)):
        write_sentencepiece(folder, model=model, style=json_style)
        if json_style is None:
            data = model_proto(pieces(), prefix=style is not GEMMA)
            (folder / "tokenizer.model").write_bytes(data)
        found.append(tokenize_with_llama(convert(folder), texts))
    assert found[0] == found[1] == found[2]
    write_sentencepiece(folder, style=style)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert found[0] == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_pieces_have_their_scores_and_types_and_rows_without_one_are_filled(folder: Path) -> None:
    found = keys(convert(folder))
    count = len(pieces())
    assert (found["model"], found["pre"]) == ("llama", "default")
    assert len(found["tokens"]) == len(found["scores"]) == len(found["token_type"]) == ROWS
    assert found["tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert found["token_type"][:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert found["scores"][:count] == [score for _, score, _ in pieces()]
    assert (found["tokens"][count], found["scores"][count]) == (f"[PAD{count}]", -10000)
    assert found["token_type"][259 : count + 1] == [NORMAL] * (count - 259) + [UNUSED]
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    assert (found["add_bos_token"], found["add_eos_token"], found["add_sep_token"]) == (True, False, False)
    assert "merges" not in found
    assert "add_space_prefix" not in found  # llama.cpp's default is right


def test_scores_without_tokenizer_model_are_the_places_of_the_merges(folder: Path) -> None:
    write_sentencepiece(folder, model=False)
    found = keys(convert(folder))
    by_text = dict(zip(found["tokens"], found["scores"], strict=True))
    assert (by_text["▁t"], by_text["he"], by_text["▁the"]) == (0, -1, -2)
    lowest = min(found["scores"])
    assert by_text["a"] == by_text["<s>"] == by_text["<0x00>"] == by_text[f"[PAD{ROWS - 1}]"] == lowest < by_text["▁an"]
    assert found["token_type"][:4] == [CONTROL, CONTROL, CONTROL, BYTE]


def test_a_space_before_the_text_is_written_where_llama_cpp_would_guess_wrong(folder: Path) -> None:
    for model in (True, False):
        write_sentencepiece(folder, model=model, style=GEMMA)
        assert keys(convert(folder))["add_space_prefix"] is False
    edit_json(folder / "tokenizer_config.json", add_prefix_space=True)  # a class's word, and not what the file does
    assert keys(convert(folder))["add_space_prefix"] is False
    write_sentencepiece(folder)
    edit_json(folder / "tokenizer_config.json", add_prefix_space=True)
    found = keys(convert(folder))
    assert found["add_space_prefix"] is True
    assert next(iter(found)) == "add_space_prefix"


def test_added_tokens_lie_over_the_pieces_whichever_file_has_them(folder: Path) -> None:
    count = len(pieces())
    write_json(folder / "added_tokens.json", {"<tool>": count, "<|im_end|>": count + 1})
    decoder = {count + 1: ("<|im_end|>", True), count + 2: ("▁▁x", False), count + 3: ("<|looks|>", False)}
    settings = {
        str(number): {"content": text, **FLAGS, "special": special} for number, (text, special) in decoder.items()
    }
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=settings)
    found = keys(convert(folder))
    tokens, types = found["tokens"], found["token_type"]
    assert tokens[count : count + 4] == ["<tool>", "<|im_end|>", "  x", "<|looks|>"]
    assert types[count : count + 4] == [USER_DEFINED, CONTROL, USER_DEFINED, CONTROL]
    assert set(found["scores"][count : count + 4]) == {-1000}
    assert types[:3] == [UNKNOWN, CONTROL, CONTROL]
    assert {"<tool>", "<|im_end|>", "▁▁x", "<s>"} <= open_checkpoint(folder).tokens


@pytest.mark.parametrize("model", [True, False])
def test_tokens_that_only_tokenizer_json_adds_are_not_lost(model: bool, folder: Path) -> None:
    write_sentencepiece(folder, model=model)
    add(folder, "<|user|>", "<|end|>", special=True)
    add(folder, "<think>")
    path = convert(folder)
    found, count = keys(path), len(pieces())
    assert found["tokens"][count : count + 3] == ["<|user|>", "<|end|>", "<think>"]
    assert found["token_type"][count : count + 3] == [CONTROL, CONTROL, USER_DEFINED]
    assert tokenize_with_llama(path, ["<|user|>", "<think>"]) == [[count], [count + 2]]
    assert "texts become the same tokens" in prove_pre_tokenizer(open_checkpoint(folder), "default")


def test_a_piece_that_an_added_token_replaces_is_reported(folder: Path) -> None:
    number = next(number for number, piece in enumerate(pieces()) if piece[0] == "Z")
    settings = {str(number): {"content": "<|z|>", **FLAGS, "special": True}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=settings)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.vocabulary.tokens[number] == "<|z|>"
    assert checkpoint.vocabulary.notes == (
        f"added tokens replace pieces of tokenizer.model: 'Z' ({number}) by '<|z|>'",
    )


def test_what_llama_cpp_does_not_do_to_a_text_is_said(folder: Path) -> None:
    data = model_proto(pieces(), charsmap=b"x")
    (folder / "tokenizer.model").write_bytes(data[:-1] + b"\x01")
    notes = " ".join(read(folder).notes)
    assert "does not normalise Unicode as tokenizer.model does" in notes
    assert "keeps spaces that tokenizer.model takes out" in notes
    write_sentencepiece(folder, model=False, style=METASPACE)
    assert "a space before text that follows a special token" in read(folder).notes[0]
    nfkc = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, GEMMA["normalizer"]]}
    edit_json(folder / "tokenizer.json", normalizer=nfkc)
    assert "does not normalise Unicode (NFKC)" in read(folder).notes[0]


def test_the_proof_covers_sentencepiece_and_names_what_it_leaves_out(folder: Path) -> None:
    said = prove_pre_tokenizer(open_checkpoint(folder), "default")
    assert said.startswith("SentencePiece vocabulary: 46 of 46")
    assert said.endswith("texts become the same tokens")
    write_sentencepiece(folder, model=False, style=METASPACE)
    said = prove_pre_tokenizer(open_checkpoint(folder), "default")
    assert said.endswith("texts become the same tokens; texts that begin with a space were left out")
    write_sentencepiece(folder, style=None)
    said = prove_pre_tokenizer(open_checkpoint(folder), "default")
    assert said == "SentencePiece vocabulary loads, not tried out: there is no tokenizer.json to compare it with"


def test_a_tokenizer_model_of_another_vocabulary_does_not_pass_the_proof(folder: Path) -> None:
    found = [(text, -score if kind == 1 else score, kind) for text, score, kind in pieces()]
    (folder / "tokenizer.model").write_bytes(model_proto(found))
    message = (
        r"SentencePiece vocabulary: llama\.cpp splits \d+ of \d+ texts otherwise than tokenizer\.json, .* base model"
    )
    with pytest.raises(LoadError, match=message):
        prove_pre_tokenizer(open_checkpoint(folder), "default")


def test_a_sentencepiece_vocabulary_takes_no_name_of_a_pre_tokenizer(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert choose_pre_tokenizer(checkpoint, None) == "default"
    with pytest.raises(LoadError, match="pre 'qwen2': a SentencePiece vocabulary has no pre-tokenizer; leave it out"):
        choose_pre_tokenizer(checkpoint, "qwen2")


def test_what_goes_before_a_text_is_said_where_no_file_says_it(folder: Path) -> None:
    write_sentencepiece(folder, style=None)
    assert read(folder).special.unsaid == {"bos": True, "eos": False}
    write_sentencepiece(folder)
    nothing = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
    edit_json(folder / "tokenizer.json", post_processor=nothing)
    assert read(folder).special.unsaid == {"bos": False, "eos": False}
    edit_json(folder / "tokenizer_config.json", add_bos_token=True)
    assert read(folder).special.adds == {"bos": True}


# -- the rules of architectures ---------------------------------------------------------------------------------------


def test_an_architecture_says_where_the_space_before_the_text_is_written(folder: Path) -> None:
    assert read(folder).space_prefix is None
    assert read(folder, space_prefix="never").space_prefix == ("last", False)
    assert read(folder, space_prefix="model").space_prefix == ("middle", True)
    edit_json(folder / "tokenizer_config.json", add_prefix_space=False)
    assert read(folder).space_prefix is None
    assert read(folder, space_prefix="settings").space_prefix == ("middle", False)
    assert read(folder, space_prefix="settings first").space_prefix == ("first", False)


def test_an_architecture_may_end_answers_in_its_own_way(folder: Path) -> None:
    add(folder, "<|im_end|>", special=True)
    number = len(pieces())
    assert read(folder).special.ids["eos"] == 2
    assert read(folder, end="<|im_end|>").special.ids["eos"] == number
    assert read(folder, end="<|nowhere|>").special.ids["eos"] == 2
    assert read(folder, eot=107).special.eot == 107
    assert read(folder, eot_by_rows={ROWS: 9}, eot=107).special.eot == 9
    assert read(folder, eot_by_rows={ROWS + 1: 9}).special.eot is None


def test_an_end_token_of_the_architecture_is_not_written_twice(folder: Path) -> None:
    add(folder, "<stop>", "<halt>", special=True)
    first = len(pieces())
    write_json(folder / "generation_config.json", {"eos_token_id": [2, first, first + 1]})
    assert read(folder).special.extra_stops == {"eot": first, "eom": first + 1}
    assert read(folder, eot=first).special.extra_stops == {"eom": first + 1}
    with pytest.raises(LoadError, match=r"generation_config\.json: 4 end tokens, but GGUF has room for three"):
        read(folder, eot=107)


def test_models_of_some_sizes_begin_without_bos(folder: Path) -> None:
    assert read(folder, no_bos_rows=frozenset({ROWS})).special.adds["bos"] is False
    assert read(folder, no_bos_rows=frozenset({ROWS + 1})).special.adds["bos"] is True


def test_pieces_that_are_not_in_use_and_the_character_nul_get_by(folder: Path) -> None:
    found = [*pieces(), ("[UNUSED_TOKEN_1]", 0.0, 1), ("\0", 0.0, 1)]
    (folder / "tokenizer.model").write_bytes(model_proto(found))
    vocabulary = read(folder, unused="[UNUSED")
    assert (vocabulary.tokens[len(found) - 1], vocabulary.types[len(found) - 1]) == ("🐉", UNUSED)
    assert vocabulary.types[len(found) - 2] == UNUSED
    assert read(folder).types[len(found) - 2] == NORMAL


def test_tokens_without_a_row_are_left_out_only_where_the_architecture_says_so(folder: Path) -> None:
    rows = len(pieces())
    add(folder, "<image_soft_token>", special=True)
    with pytest.raises(LoadError, match=rf"'<image_soft_token>' \({rows}\) beyond the {rows} rows of the embedding"):
        read(folder, rows)
    assert read(folder, rows, beyond=frozenset({"<image_soft_token>"})).tokens[-1] == pieces()[-1][0]


def test_an_architecture_may_take_added_tokens_at_their_word(folder: Path) -> None:
    add(folder, "<|tool|>")
    for model in (True, False):
        write = write_sentencepiece(folder, model=model)
        add(write, "<|tool|>")
        number = len(pieces())
        assert read(folder).types[number] == CONTROL
        assert read(folder, by_looks=False).types[number] == USER_DEFINED


# -- pre-tokenizers ---------------------------------------------------------------------------------------------------


def test_a_pre_tokenizer_that_no_table_has_is_found_by_trying_if_only_one_fits(byte_level: Path) -> None:
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL]}
    write_tokenizer(byte_level, digits)
    assert {row.name for row in TABLE} < set(DISTINCT)
    checkpoint = open_checkpoint(byte_level)
    assert checkpoint.vocabulary.signature is not None
    assert checkpoint.vocabulary.signature.row is None
    assert choose_pre_tokenizer(checkpoint, None) == "gpt-2"
    assert keys(convert(byte_level))["pre"] == "gpt-2"


def test_a_pre_tokenizer_that_fits_several_names_or_none_is_refused(byte_level: Path) -> None:
    letters = {"type": "Split", "pattern": {"Regex": "[a-z]"}, "behavior": "Isolated", "invert": False}
    write_tokenizer(byte_level, {"type": "Sequence", "pretokenizers": [letters, BYTE_LEVEL]}, corpus=("abc",), rows=271)
    message = (
        r"is not known: split\(\[a-z\]\) \+ bytes\(words\); gpt-2, .* split alike on all that was tried; "
        "if you know one that splits alike, name it with --pre NAME"
    )
    edit_json(byte_level / "tokenizer_config.json", chat_template=None)
    model = json.loads((byte_level / "tokenizer.json").read_text())["model"]
    model["vocab"] |= {"zq": 300}
    edit_json(byte_level / "tokenizer.json", model={**model, "merges": [["z", "q"]]})
    with pytest.raises(LoadError, match=message):
        choose_pre_tokenizer(open_checkpoint(byte_level), None)


# -- what is refused --------------------------------------------------------------------------------------------------


def model(found: Any, **options: Any) -> Callable[[Path], None]:
    """Write another tokenizer.model."""
    return lambda folder: (folder / "tokenizer.model").write_bytes(model_proto(found, **options)) and None


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    """Leave only tokenizer.json, changed."""

    def change(folder: Path) -> None:
        (folder / "tokenizer.model").unlink()
        edit_json(folder / "tokenizer.json", **changes)

    return change


def byte_level_with(**changes: Any) -> Callable[[Path], None]:
    """Leave only a byte-level tokenizer.json, changed."""

    def change(folder: Path) -> None:
        write_tokenizer(folder)
        tokenizer(**changes)(folder)

    return change


def inner(**changes: Any) -> Callable[[Path], None]:
    """Leave only tokenizer.json, with its model changed."""

    def change(folder: Path) -> None:
        found = json.loads((folder / "tokenizer.json").read_text())["model"]
        tokenizer(model={**found, **changes})(folder)

    return change


def settings(**changes: Any) -> Callable[[Path], None]:
    """Change tokenizer_config.json."""
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def nothing_but(name: str | None, data: bytes = b"") -> Callable[[Path], None]:
    """Leave one tokenizer's file."""

    def change(folder: Path) -> None:
        (folder / "tokenizer.model").unlink()
        (folder / "tokenizer.json").unlink()
        if name:
            (folder / name).write_bytes(data)

    return change


def decoder(**entries: Any) -> Callable[[Path], None]:
    """Write added_tokens_decoder, its keys without their leading underscore."""
    return settings(added_tokens_decoder={key.lstrip("_"): entry for key, entry in entries.items()})


TIKTOKEN = b"\n".join(base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256))
SAVE = r"write one with AutoTokenizer\.from_pretrained\(folder\)\.save_pretrained\(folder\)"
COUNT = len(pieces())
REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (nothing_but(None), rf"^tokenizer\.json is missing; {SAVE}$"),
    "tekken": (nothing_but("tekken.json"), r"^tekken\.json: only Mistral's own programs read it; take tokenizer\.json"),
    "tiktoken": (
        nothing_but("tokenizer.model", TIKTOKEN),
        rf"^tokenizer\.model: not SentencePiece's, and tokenizer\.json is missing; {SAVE}$",
    ),
    "empty model": (nothing_but("tokenizer.model"), r"^tokenizer\.model: not SentencePiece's, and"),
    "unigram": (model(pieces(), kind=1), r"^tokenizer\.model: a Unigram model; llama\.cpp merges pieces pair by pair"),
    "characters": (model(pieces(), kind=4), r"^tokenizer\.model: a word or character model; llama\.cpp merges"),
    "unigram in json": (
        inner(type="Unigram", vocab=[["a", 0]]),
        r"^tokenizer\.json: a Unigram vocabulary, but llama\.c",
    ),
    "wordpiece": (inner(type="WordPiece"), r"^tokenizer\.json: a WordPiece vocabulary, but llama\.cpp has only"),
    "neither": (inner(byte_fallback=False), r"^tokenizer\.json: BPE that is neither byte-level nor SentencePiece's"),
    "no bytes": (
        model([piece for piece in pieces() if piece[2] != 6]),
        r"^tokenizer\.model: no token <0x00>, one of 1\d\d bytes without any; llama\.cpp needs them",
    ),
    "one byte missing": (
        model([piece for piece in pieces() if piece[0] != "<0xE2>"]),
        r"^tokenizer\.model: no token <0xE2>, one of 1 bytes without any",
    ),
    "infinite score": (
        model([*pieces(), ("x!", float("inf"), 1)]),
        rf"^tokenizer\.model: token {COUNT} \('x!'\) has the score inf$",
    ),
    "piece twice": (
        model([*pieces(), ("the", 0.0, 1), ("the", 0.0, 1)]),
        rf"'the' has two ids, {COUNT} and {COUNT + 1}$",
    ),
    "empty piece": (
        model([*pieces(), ("", 0.0, 1)]),
        rf"^tokenizer\.model: token {COUNT} is '', which GGUF cannot hold$",
    ),
    "piece beyond": (
        model([*pieces(), *((f"x{n}", 0.0, 1) for n in range(ROWS))]),
        rf"^tokenizer\.model: 'x{ROWS - COUNT}' \({ROWS}\), .* more beyond the {ROWS} rows of the embedding",
    ),
    "both kinds": (
        lambda folder: write_tokenizer(folder),
        r"^tokenizer\.model is SentencePiece's, tokenizer\.json byte-level: remove the one that is not this model's$",
    ),
    "wrongly saved": (
        byte_level_with(pre_tokenizer=METASPACE["pre_tokenizer"]),
        r"^tokenizer\.json: a byte-level vocabulary without its byte-level pre-tokenizer, .* from the base model$",
    ),
    "normalizer": (
        tokenizer(normalizer={"type": "Lowercase"}),
        "the normalizer 'Lowercase' has no counterpart in llama",
    ),
    "pre-tokenizer": (
        tokenizer(pre_tokenizer={"type": "Digits", "individual_digits": True}),
        r"the pre-tokenizer 'Digits' has no counterpart in llama\.cpp's SentencePiece tokenizer$",
    ),
    "step": (tokenizer(normalizer=[1]), r"^tokenizer\.json: \[1\] is no step of a tokenizer$"),
    "added id": (
        lambda folder: write_json(folder / "added_tokens.json", {"<x>": "7"}),
        r"^added_tokens\.json: token '<x>' has the id '7', not a whole number from 0$",
    ),
    "added beyond": (
        lambda folder: write_json(folder / "added_tokens.json", {"<x>": 10**9}),
        rf"^tokenizer\.model: '<x>' \(1000000000\) beyond the {ROWS} rows of the embedding; was the model saved before",
    ),
    "added twice": (
        lambda folder: write_json(folder / "added_tokens.json", {"▁the": COUNT}),
        rf"^tokenizer\.model: the token '▁the' has two ids, \d+ and {COUNT}$",
    ),
    "same text at last": (
        decoder(**{f"_{COUNT}": {"content": f"[PAD{COUNT + 1}]"}}),
        r"would both be '\[PAD\d+\]' in GGUF$",
    ),
    "decoder": (settings(added_tokens_decoder=[1]), r"^tokenizer_config\.json: added_tokens_decoder is not an object$"),
    "decoder id": (decoder(x={"content": "<x>"}), r"^tokenizer_config\.json: 'x' in added_tokens_decoder is no token$"),
    "decoder text": (decoder(_7={"content": 5}), r"^tokenizer_config\.json: token 7 is 5, not a text$"),
    "unknown end": (settings(eos_token="<no>"), r"^tokenizer_config\.json: eos_token '<no>' is not in the vocabulary$"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_vocabulary_that_llama_cpp_could_not_use_is_refused_in_one_line(name: str, folder: Path) -> None:
    change, message = REFUSALS[name]
    change(folder)
    with pytest.raises(LoadError, match=message) as caught:
        convert(folder)
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "out.gguf").exists()


@pytest.mark.parametrize("data", [TIKTOKEN, b"version https://git-lfs.github.com/spec/v1\n", b"\x0a\xff\xff", b""])
def test_another_file_under_the_name_tokenizer_model_is_passed_over(data: bytes, byte_level: Path) -> None:
    plain = keys(convert(byte_level))
    (byte_level / "tokenizer.model").write_bytes(data)
    assert keys(convert(byte_level)) == plain
    note = "tokenizer.model is not SentencePiece's and was passed over"
    assert note in open_checkpoint(byte_level).vocabulary.notes


def test_damage_to_tokenizer_model_ends_in_a_vocabulary_that_loads_or_in_a_message(folder: Path) -> None:
    write_sentencepiece(folder, style=None)
    draw, whole = random.Random(7), (folder / "tokenizer.model").read_bytes()
    loaded = 0
    for _ in range(150):
        data, place = bytearray(whole), draw.randrange(len(whole))
        data[place : place + draw.choice((0, 1, 4))] = draw.randbytes(draw.choice((0, 1, 3)))
        (folder / "tokenizer.model").write_bytes(data)
        try:
            vocabulary = read(folder)
        except LoadError as error:
            assert "\n" not in str(error)
            continue
        assert len(set(vocabulary.tokens)) == ROWS
        if loaded < 10:  # a vocabulary that llama.cpp could not bear would end this process
            loaded += all(tokenize_with_llama(convert(folder), WORDS))
    assert loaded == 10


def test_the_reader_of_tokenizer_model_survives_ten_thousand_damaged_files() -> None:
    draw, whole = np.random.default_rng(7), np.frombuffer(model_proto(pieces()[:40]), np.uint8)
    outcomes = set()
    for _ in range(10_000):
        data = whole.copy()
        places = draw.integers(0, len(data), draw.integers(1, 5))
        data[places] = draw.integers(0, 256, len(places))
        outcomes.add(type(parse_model(data[: draw.integers(1, len(data) + 1)].tobytes())).__name__)
    assert outcomes == {"Model", "NoneType"}
