"""tokenizer.model, the file of SentencePiece: a protobuf message, read without either library.

The fields are SentencePiece's (Apache 2.0); their meaning in GGUF follows llama.cpp's converter (MIT).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType

from metaalign_edge_runtime.errors import LoadError, some

from .folder import Folder
from .tokens import Added, Token, Tokens, added_in_settings, added_in_tokenizer, check_token, ids_of, looks_special

SOURCE = "tokenizer.model"
VARINT, FIXED64, TEXT, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
UNIGRAM, BPE = 1, 2  # two of SentencePiece's four models; a file that names none means Unigram
# SentencePiece's types of pieces. User-defined ones (4) are normal, unless the tokenizer lists them as added tokens.
KINDS = {
    1: TokenType.NORMAL,
    2: TokenType.UNKNOWN,
    3: TokenType.CONTROL,
    4: TokenType.NORMAL,
    5: TokenType.UNUSED,
    6: TokenType.BYTE,
}
ADDED_SCORE = -1000.0  # of added tokens
HOLE_SCORE = -10000.0  # of rows of the embedding without a token
# Types of tokens that tokenizer.json does not change, as tokenizer.model or another file has set them.
SETTLED = {TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE}
SPARE = ("[UNUSED", "<unused")  # beginnings of pieces that are placeholders for added tokens
NUL = "\0"
STAND_IN = "🐉"  # replaces the piece NUL: SentencePiece never uses it, and llama.cpp would read it as an empty text


class Malformed(ValueError):
    """The bytes are not the expected protobuf message."""


@dataclass
class Model:
    """The contents of tokenizer.model."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, SentencePiece's type
    kind: int = UNIGRAM
    space_prefix: bool = True  # a space is put before the text
    squeezes_spaces: bool = True
    normalizes: bool = False  # Unicode is normalised, by a table in the file


def parse_model(data: bytes) -> Model | None:
    """Parse a ModelProto; return None if `data` is none: tiktoken's file has the same name."""
    model = Model()
    try:
        for number, value in _fields(data):
            if number == 1:
                model.pieces.append(_piece(_message(value)))
            elif number == 2:
                trainer = dict(_fields(_message(value)))
                model.kind = _whole(trainer.get(3, UNIGRAM))
            elif number == 3:
                normalizer = dict(_fields(_message(value)))
                model.normalizes = bool(_message(normalizer.get(2, b"")))
                model.space_prefix = bool(_whole(normalizer.get(3, 1)))
                model.squeezes_spaces = bool(_whole(normalizer.get(4, 1)))
    except (Malformed, UnicodeDecodeError):
        return None
    return model if model.pieces else None


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1:
            text = _message(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _message(value, 4))
        elif number == 3:
            kind = _whole(value)
    if kind not in KINDS:
        raise Malformed(f"a piece of type {kind}")
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message: the number of the field, and its value, an integer or bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == VARINT:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == TEXT:
            length, place = _varint(data, place)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise Malformed(f"wire type {kind}")
        if length > len(data) - place:
            raise Malformed("a field beyond the end")
        yield key >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Read a varint, an integer of at most ten bytes; return it and the offset behind it."""
    value = 0
    for count, byte in enumerate(data[place : place + 10]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, place + count + 1
    raise Malformed("a number without an end")


def _message(value: int | bytes, length: int | None = None) -> bytes:
    if not isinstance(value, bytes) or length not in (None, len(value)):
        raise Malformed("a field of another kind")
    return value


def _whole(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise Malformed("a field of another kind")
    return value


def read_pieces(
    model: Model,
    folder: Folder,
    settings: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    by_looks: bool,
    unused: str | None,
) -> tuple[Tokens, list[str]]:
    """Return the pieces of the model, replaced by added tokens where they have the same id, and remarks for the user.

    by_looks: an added token that looks like a control token is one, marked or not, and a piece that is also an added
    token keeps its type; otherwise only the marks count. unused: beginning of pieces that are not in use. Raises
    LoadError.
    """
    if model.kind != BPE:
        name = "Unigram" if model.kind == UNIGRAM else "word or character"
        raise LoadError(
            f"{SOURCE}: a {name} model; llama.cpp merges pieces pair by pair here, and would split text otherwise"
        )
    by_id: dict[int, Token] = {}
    for number, (piece, score, piece_type) in enumerate(model.pieces):
        text, _ = check_token(SOURCE, STAND_IN if piece == NUL else piece, number)
        if not math.isfinite(score):
            raise LoadError(f"{SOURCE}: token {number} ({text!r}) has the score {score}")
        spare = piece == NUL or (unused is not None and piece.startswith(unused))
        kind = TokenType.UNUSED if spare else KINDS[piece_type]
        by_id[number] = Token(text, kind, score)
    added = _overlay(by_id, folder, settings, tokenizer, by_looks)
    over = {entry.number: entry.text for entry in added}
    pieces = [(token.text, number) for number, token in by_id.items() if number not in over]
    ids = ids_of(SOURCE, [*pieces, *((text, number) for number, text in over.items())])
    marked = {token.text for token in by_id.values() if token.kind == TokenType.CONTROL} | set(over.values())
    changed = [
        f"{piece!r} ({number}) by {over[number]!r}"
        for number, (piece, _, piece_type) in enumerate(model.pieces)
        if over.get(number, piece) != piece and KINDS[piece_type] == TokenType.NORMAL and not piece.startswith(SPARE)
    ]
    notes = _notes(model)
    if changed:
        notes.append(f"added tokens replace pieces of {SOURCE}: {some(changed)}")
    return Tokens(SOURCE, by_id, ids, frozenset(marked), HOLE_SCORE), notes


def _overlay(
    by_id: dict[int, Token],
    folder: Folder,
    settings: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    by_looks: bool,
) -> list[Added]:
    """Put the added tokens into `by_id`; return all of them. A later source replaces tokens of an earlier one.

    The sources are added_tokens.json, tokenizer_config.json and, for tokens that those leave open, tokenizer.json, the
    only one that transformers 5 writes.
    """
    found = []
    for text, number in folder.json("added_tokens.json").items():
        entry = Added(*check_token("added_tokens.json", text, number), False)
        by_id[entry.number] = Token(entry.text, TokenType.USER_DEFINED, ADDED_SCORE)
        found.append(entry)
    listed = added_in_settings(settings)
    known = {entry.number for entry in listed}
    for entry in added_in_tokenizer(tokenizer):
        old = by_id.get(entry.number)
        settled = by_looks and old is not None and old.kind in SETTLED and old.text == entry.text
        if entry.number not in known and not settled:
            listed.append(entry)
    for entry in listed:
        control = entry.special or (by_looks and looks_special(entry.text))
        by_id[entry.number] = entry.token(control, ADDED_SCORE)
    return found + listed


def _notes(model: Model) -> list[str]:
    notes = []
    if model.normalizes:
        notes.append("llama.cpp does not normalise Unicode as tokenizer.model does: such text becomes other tokens")
    if model.squeezes_spaces:
        notes.append("llama.cpp keeps spaces that tokenizer.model takes out: those at the ends, and double ones")
    return notes
