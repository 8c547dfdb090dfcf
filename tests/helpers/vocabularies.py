"""Vocabularies with every trap a real one sets: as GGUF, made with gguf's writer, and as the files of a checkpoint."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

from helpers.checkpoints import write_json
from helpers.gguf_files import finish

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = (
    int(getattr(gguf.TokenType, name)) for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "BYTE")
)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"#()[]{}<>/|_-=%*\n"


def write_spm(path: Path, name: str = "") -> Path:
    """SentencePiece: byte tokens, and merges that lead to control and byte tokens from plain text."""
    tokens = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    tokens += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    tokens += [(letter, NORMAL) for letter in LETTERS if letter != "\n"] + [("▁", NORMAL)]
    tokens += [
        (piece, NORMAL)
        for piece in ("<s", "</", "</s", "<0", "x0", "<0x0", "<0x0A", "▁t", "▁te", "▁tea", "an", "▁an", "ea")
    ]
    tokens += [
        ("<|im_start|>", USER_DEFINED),
        ("<|im_end|>", CONTROL),
        ("[/INST]", USER_DEFINED),
        ("▁▁▁▁", USER_DEFINED),
        *([("<|endoftext|>", CONTROL)] if name else []),  # that of Phi 3 has it
    ]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_tokenizer_model("llama")
    if name:
        writer.add_name(name)
    writer.add_token_list([text.encode() for text, _ in tokens])
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    return finish(writer, path)


def write_bpe(path: Path, pre: str = "qwen2", more_merges: Sequence[str] = ()) -> Path:
    """Byte-level BPE with user-defined markers, white space among them, and an end of turn that no key names."""
    shown = byte_symbols()
    tokens = [(shown[byte], NORMAL) for byte in range(256)]
    merges = ["t e", "te a", "Ġ tea", "< |", "| >", "i m", "im _", "e n", "en d"]
    tokens += [(merge.replace(" ", ""), NORMAL) for merge in merges]
    tokens += [
        (text, CONTROL) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|system_info|>", "<|end|>")
    ]
    tokens += [(text, USER_DEFINED) for text in ("<think>", "</think>", "<|tool|>", "\n\n\n", "<b>")]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text.encode() for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges([*merges, *more_merges])
    writer.add_eos_token_id(next(index for index, (text, _) in enumerate(tokens) if text == "<|endoftext|>"))
    writer.add_add_bos_token(False)
    return finish(writer, path)


def byte_symbols() -> list[str]:
    """The letters by which byte-level BPE writes the bytes 0 to 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


# -- SentencePiece as a checkpoint has it: tokenizer.model, or the same vocabulary in tokenizer.json -------------------

Piece = tuple[str, float, int]  # text, score, SentencePiece's type: 1 normal, 2 unknown, 3 control, 4 user, 6 byte
PIECES = (
    "▁t", "he", "▁the", "in", "an", "er", "on", "▁a", "re", "▁w", "▁▁", "▁▁▁▁", "ing", "or", "▁s", "ll", "▁wor", "and",
    "▁and", "'s", "12", "Пр", "При", "你好", "▁h", "▁he", "▁hell", "▁hello", "ld", "▁world", "..", "....", "ti",
    "tion", "▁an",
)  # fmt: skip
SPECIAL = ("<unk>", "<s>", "</s>")
LEGACY = {  # how transformers 4 wrote SentencePiece's spaces into tokenizer.json
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
}
METASPACE = {  # how transformers 5 does
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
}
GEMMA = {  # how it is without a space before the text
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def pieces() -> list[Piece]:
    """The pieces of a small SentencePiece BPE model: what it merges first scores highest, letters come last."""
    letters = sorted(set("".join(PIECES)) | set(LETTERS) - {"\n"})
    found: list[Piece] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    found += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    found += [(piece, -float(place), 1) for place, piece in enumerate([*PIECES, *letters])]
    return found


def merges_of(found: Sequence[Piece]) -> list[list[str]]:
    """Every way to make each piece out of two others, the best piece first, as transformers' converter lists them."""
    known = {text for text, _, _ in found}
    ranked = sorted((piece for piece in found if piece[2] == 1), key=lambda piece: -piece[1])
    cuts = ((text[:cut], text[cut:]) for text, _, _ in ranked for cut in range(1, len(text)))
    return [[left, right] for left, right in cuts if left in known and right in known]


def model_proto(found: Sequence[Piece], *, kind: int = 2, prefix: bool = True, charsmap: bytes = b"") -> bytes:
    """Encode a tokenizer.model. kind: 1 Unigram, 2 BPE."""
    data = b""
    for text, score, piece_type in found:
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        data += _field(1, piece + (b"" if piece_type == 1 else bytes([0x18, piece_type])))
    data += _field(2, bytes([0x18, kind, 0x98, 2, 1]))  # byte_fallback, without which the library takes no byte pieces
    return data + _field(3, _field(2, charsmap) + bytes([0x18, prefix, 0x20, 0]))


def _field(number: int, value: bytes) -> bytes:
    length, size = b"", len(value)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


def spm_tokenizer(found: Sequence[Piece], style: dict[str, Any] = LEGACY) -> Any:
    """Write the same vocabulary the way the tokenizers library has it: merges, and no scores."""
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": text, **FLAGS, "special": True} for number, text in enumerate(SPECIAL)
        ],
        **style,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: number for number, (text, _, _) in enumerate(found)},
            "merges": merges_of(found),
        },
    }


def write_sentencepiece(folder: Path, *, model: bool = True, style: dict[str, Any] | None = LEGACY) -> Path:
    """Replace a checkpoint's tokenizer by a small SentencePiece one: tokenizer.model, tokenizer.json, or both."""
    found = pieces()
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink(missing_ok=True)
    if model:
        (folder / "tokenizer.model").write_bytes(model_proto(found, prefix=style is not GEMMA))
    if style is not None:
        write_json(folder / "tokenizer.json", spm_tokenizer(found, style=style))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", settings)
    return folder
