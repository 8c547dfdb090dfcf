"""The vocabulary out of tokenizer.json itself: no tokenizer library, and none of its versions, comes between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from .errors import ConvertError, some
from .folder import MB, Folder
from .pretokenizers import Signature, signature
from .special import Files, Special, find_special, named

TOKENIZER_LIMIT = 200 * MB
NOT_YET = (
    "{}: {} vocabularies are not supported yet (byte-level BPE is); llama.cpp's own convert_hf_to_gguf.py may know it"
)
NEVER_NORMAL = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}  # control tokens that some models forget to mark


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary, checked and complete: one token for every row of the embedding."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    signature: Signature
    special: Special
    marked: frozenset[str]  # the texts of added and special tokens
    add_prefix_space: bool | None  # tokenizer_config.json's word on it
    notes: tuple[str, ...]


def read_vocabulary(folder: Folder, rows: int, config: Mapping[str, Any]) -> Vocabulary:
    """Read the vocabulary for an embedding of ``rows`` rows. Raises ConvertError."""
    tokenizer = _tokenizer_json(folder)
    settings = folder.json("tokenizer_config.json")
    names = {**named(folder.json("special_tokens_map.json")), **named(settings)}
    model = tokenizer["model"]
    ids = _base(model)
    added = _added(tokenizer, settings, ids)
    _fits(ids, rows)
    lists = (_texts(settings.get(key)) for key in ("additional_special_tokens", "extra_special_tokens"))
    marked = {text for texts in (names.values(), *lists) for text in texts} & ids.keys()
    tokens, types = _rows(ids, added, marked, rows)
    control = {number for number, kind in enumerate(types) if kind == TokenType.CONTROL}
    files = Files(tokenizer, settings, names, config, folder.json("generation_config.json"))
    prefix = settings.get("add_prefix_space")
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=_merges(model, ids),
        signature=signature(tokenizer),
        special=find_special(files, ids, tokens, control),
        marked=frozenset(added) | marked,
        add_prefix_space=prefix if isinstance(prefix, bool) else None,
        notes=tuple(_notes(tokenizer)),
    )


def _tokenizer_json(folder: Folder) -> dict[str, Any]:
    """Read tokenizer.json and make sure that it is byte-level BPE."""
    if not folder.has("tokenizer.json"):
        if folder.has("tokenizer.model"):
            raise ConvertError(NOT_YET.format("tokenizer.model", "SentencePiece"))
        raise ConvertError(
            "tokenizer.json is missing; write one with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    tokenizer = folder.json("tokenizer.json", TOKENIZER_LIMIT)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise ConvertError("tokenizer.json: no model with a vocab in it; download the file again")
    kind = model.get("type", "BPE")  # older files leave it out
    if kind != "BPE" or not isinstance(model["vocab"], dict):
        raise ConvertError(NOT_YET.format("tokenizer.json", kind))
    byte_level = any("bytes" in part for part in signature(tokenizer).parts)
    if not byte_level:
        if any(token.startswith("Ġ") for token in model["vocab"]):
            raise ConvertError(
                "tokenizer.json: a byte-level vocabulary without its byte-level pre-tokenizer, as some versions of "
                "transformers wrongly save it; take tokenizer.json from the base model"
            )
        raise ConvertError(NOT_YET.format("tokenizer.json", "SentencePiece-style BPE"))
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ConvertError(f"tokenizer.json: {key} {model[key]!r} has no counterpart in llama.cpp")
    return tokenizer


def _base(model: Mapping[str, Any]) -> dict[str, int]:
    ids = {}
    for entry in model["vocab"].items():
        token, number = _check_token(*entry)
        ids[token] = number
    return ids


def _check_token(token: Any, number: Any) -> tuple[str, int]:
    if not isinstance(token, str):
        raise ConvertError(f"tokenizer.json: token {number!r} is {token!r}, not a text")
    if type(number) is not int or number < 0:
        raise ConvertError(f"tokenizer.json: token {token!r} has the id {number!r}, not a whole number from 0")
    if not token or "\0" in token:  # llama.cpp reads tokens as C strings, and aborts when two are the same
        raise ConvertError(f"tokenizer.json: token {number} is {token!r}, which GGUF cannot hold")
    if not token.isascii():
        try:
            token.encode("utf-8")
        except UnicodeEncodeError:
            raise ConvertError(f"tokenizer.json: token {number} ({token!r}) is not valid Unicode") from None
    return token, number


def _added(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], ids: dict[str, int]) -> dict[str, bool]:
    """Put the added tokens into ``ids``; return each one's text and whether it is special."""
    entries = tokenizer.get("added_tokens") or []
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, list) or not isinstance(decoder, dict):
        raise ConvertError("tokenizer.json: added_tokens is not a list")
    entries = list(entries)
    for number, entry in decoder.items():  # transformers 4 kept a second list here
        if isinstance(entry, dict) and number.isdecimal():
            entries.append({**entry, "id": int(number)})
    added: dict[str, bool] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise ConvertError("tokenizer.json: an added token is not an object")
        text, number = _check_token(entry.get("content"), entry.get("id"))
        if ids.setdefault(text, number) != number:
            raise ConvertError(f"tokenizer.json: the token {text!r} has two ids, {ids[text]} and {number}")
        added[text] = added.get(text, False) or entry.get("special") is True
    return added


def _texts(value: Any) -> list[str]:
    """Return the texts in a list of tokens, each a string or an object with ``content``."""
    entries = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return [text for text in texts if isinstance(text, str)]


def _fits(ids: Mapping[str, int], rows: int) -> None:
    outside = [f"{text!r} ({number})" for text, number in ids.items() if number >= rows]
    if outside:
        raise ConvertError(
            f"tokenizer.json: {some(outside)} beyond the {rows} rows of the embedding; was the model saved before "
            "resize_token_embeddings?"
        )


def _rows(
    ids: Mapping[str, int], added: Mapping[str, bool], marked: set[str], rows: int
) -> tuple[list[str], list[int]]:
    """Lay the tokens out by id, fill the holes, and give each its type."""
    by_id: dict[int, str] = {}
    for text, number in ids.items():
        if number in by_id:
            raise ConvertError(f"tokenizer.json: the tokens {by_id[number]!r} and {text!r} have the same id {number}")
        by_id[number] = text
    tokens, types = [], []
    for number in range(rows):
        text = by_id.get(number, f"[PAD{number}]")
        if number not in by_id:
            kind = TokenType.UNUSED
        elif added.get(text) or text in marked or (text in added and looks_special(text)):
            kind = TokenType.CONTROL
        elif text in added:
            kind, text = TokenType.USER_DEFINED, text.replace("▁", " ")
        else:
            kind = TokenType.NORMAL
        tokens.append(text)
        types.append(int(kind))
    if len(set(tokens)) != rows:
        seen: dict[str, int] = {}
        number, first = next((n, seen[t]) for n, t in enumerate(tokens) if seen.setdefault(t, n) != n)
        raise ConvertError(f"tokenizer.json: tokens {first} and {number} would both be {tokens[number]!r} in GGUF")
    return tokens, types


def looks_special(text: str) -> bool:
    """Say whether an added token is plainly a control token, marked as one or not."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in NEVER_NORMAL or any(text.startswith(a) and text.endswith(b) for a, b in brackets)


def _merges(model: Mapping[str, Any], ids: Mapping[str, int]) -> list[str]:
    """Return the merges as GGUF writes them, "left right"; both spellings of tokenizer.json are read."""
    entries = model.get("merges")
    if not isinstance(entries, list) or not entries:
        raise ConvertError("tokenizer.json: no merges in it")
    merges = []
    for number, entry in enumerate(entries):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise ConvertError(f"tokenizer.json: merge {number} is {entry!r}, not a pair")
        left, right = pair
        if left not in ids or right not in ids or left + right not in ids:
            raise ConvertError(f"tokenizer.json: merge {number}, {left!r} + {right!r}, uses a token that is not there")
        if "\n" in left + right:  # llama.cpp aborts on one
            raise ConvertError(f"tokenizer.json: merge {number} holds a line break, which is not byte-level BPE")
        merges.append(f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}")
    return merges


def _notes(tokenizer: Mapping[str, Any]) -> list[str]:
    """Refuse a normaliser that llama.cpp has no counterpart for; note what it does otherwise and mostly harmlessly."""
    steps = [tokenizer["normalizer"]] if tokenizer.get("normalizer") else []
    if steps and isinstance(steps[0], dict) and isinstance(steps[0].get("normalizers"), list):
        steps = steps[0]["normalizers"]
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if any(kind != "NFC" for kind in kinds):
        raise ConvertError(f"tokenizer.json: the normalizer {kinds[0]!r} has no counterpart in llama.cpp")
    notes = ["llama.cpp does not compose Unicode (NFC): decomposed text becomes other tokens"] if kinds else []
    added = tokenizer.get("added_tokens") or []
    greedy = [repr(token["content"]) for token in added if token.get("lstrip") or token.get("rstrip")]
    if greedy:
        notes.append(f"llama.cpp keeps the spaces beside {some(greedy)}, which transformers drops")
    return notes
