"""Tokens by id, as all kinds of vocabularies have them, and checks for those that would crash llama.cpp."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from metaalign_edge_runtime.errors import LoadError, some

NEVER_NORMAL = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}  # control tokens that some models forget to mark
BRACKETS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))  # begin and end of texts that are surely control tokens


@dataclass(frozen=True, slots=True)  # there may be hundreds of thousands
class Token:
    """One token as GGUF has it."""

    text: str
    kind: TokenType
    score: float = 0.0  # SentencePiece merges the parts of tokens with higher scores first; byte-level BPE has none


@dataclass(frozen=True)
class Added:
    """An added token: the tokenizer finds it before it splits and merges the rest of a text."""

    text: str
    number: int
    special: bool

    def token(self, control: bool, score: float = 0.0) -> Token:
        """Return it as GGUF has it; user-defined tokens have spaces for ▁, as llama.cpp looks for them in the text."""
        if control:
            return Token(self.text, TokenType.CONTROL, score)
        return Token(self.text.replace("▁", " "), TokenType.USER_DEFINED, score)


@dataclass(frozen=True)
class Tokens:
    """A vocabulary as the files have it: there may be rows of the embedding without a token, and the reverse."""

    source: str  # name of the file, for messages
    by_id: Mapping[int, Token]
    ids: Mapping[str, int]  # by the text in the files
    marked: frozenset[str]  # the texts of added and special tokens
    hole: float = 0.0  # the score for rows without a token

    def lay_out(self, rows: int, beyond: Collection[str] = ()) -> list[Token]:
        """Return a token for each of the `rows` of the embedding, `[PADi]` for rows without one.

        Raises LoadError for a token beyond the rows whose text is not in `beyond`, and for two tokens of the same
        text, at which llama.cpp would end the process.
        """
        outside = [f"{text!r} ({number})" for text, number in self.ids.items() if number >= rows and text not in beyond]
        if outside:
            raise LoadError(
                f"{self.source}: {some(outside)} beyond the {rows} rows of the embedding; was the model saved before "
                "resize_token_embeddings?"
            )
        table = []
        for number in range(rows):
            table.append(self.by_id.get(number) or Token(f"[PAD{number}]", TokenType.UNUSED, self.hole))
        if len({token.text for token in table}) != rows:
            seen: dict[str, int] = {}
            number, first = next(
                (n, seen[token.text]) for n, token in enumerate(table) if seen.setdefault(token.text, n) != n
            )
            raise LoadError(f"{self.source}: tokens {first} and {number} would both be {table[number].text!r} in GGUF")
        return table


def check_token(source: str, text: Any, number: Any) -> tuple[str, int]:
    """Return text and id of a token, checked: GGUF must be able to hold them. Raises LoadError."""
    if not isinstance(text, str):
        raise LoadError(f"{source}: token {number!r} is {text!r}, not a text")
    if type(number) is not int or number < 0:
        raise LoadError(f"{source}: token {text!r} has the id {number!r}, not a whole number from 0")
    if not text or "\0" in text:  # llama.cpp reads tokens as C strings, and aborts when two are the same
        raise LoadError(f"{source}: token {number} is {text!r}, which GGUF cannot hold")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise LoadError(f"{source}: token {number} ({text!r}) is not valid Unicode") from None
    return text, number


def looks_special(text: str) -> bool:
    """Say whether an added token is a control token by its text, though it may not be marked as one."""
    return text in NEVER_NORMAL or any(text.startswith(a) and text.endswith(b) for a, b in BRACKETS)


def added_in_settings(settings: Mapping[str, Any]) -> list[Added]:
    """Read the added tokens in a parsed tokenizer_config.json, where transformers 4 lists them. Raises LoadError."""
    source = "tokenizer_config.json"
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise LoadError(f"{source}: added_tokens_decoder is not an object")
    found = []
    for number, entry in decoder.items():
        if not isinstance(entry, dict) or not number.isdecimal() or len(number) > 10:
            raise LoadError(f"{source}: {number!r} in added_tokens_decoder is no token")
        found.append(_added(source, entry, int(number)))
    return found


def added_in_tokenizer(tokenizer: Mapping[str, Any]) -> list[Added]:
    """Read the added tokens in a parsed tokenizer.json. Raises LoadError."""
    entries = tokenizer.get("added_tokens") or []
    if not isinstance(entries, list):
        raise LoadError("tokenizer.json: added_tokens is not a list")
    for entry in entries:
        if not isinstance(entry, dict):
            raise LoadError("tokenizer.json: an added token is not an object")
    return [_added("tokenizer.json", entry, entry.get("id")) for entry in entries]


def _added(source: str, entry: Mapping[str, Any], number: Any) -> Added:
    return Added(*check_token(source, entry.get("content"), number), entry.get("special") is True)


def ids_of(source: str, pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Map texts to ids. Raises LoadError if a text has two ids."""
    ids: dict[str, int] = {}
    for text, number in pairs:
        if ids.setdefault(text, number) != number:
            raise LoadError(f"{source}: the token {text!r} has two ids, {ids[text]} and {number}")
    return ids
