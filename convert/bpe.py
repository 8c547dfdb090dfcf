"""Read tokenizer.json: byte-level BPE, or SentencePiece's BPE in the form of the tokenizers library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from gguf import TokenType

from metaalign_edge_runtime.errors import LoadError, some

from .tokens import (
    Added,
    Token,
    Tokens,
    added_in_settings,
    added_in_tokenizer,
    check_token,
    ids_of,
    looks_special,
)

SOURCE = "tokenizer.json"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREFIX = {"type": "Prepend", "prepend": "▁"}
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
BYTE_LEVEL_SHARE = 0.05  # of tokens that begin with Ġ, a space: half do in byte-level vocabularies, none in others
UNSUPPORTED = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")


def check_model(tokenizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the model out of a parsed tokenizer.json if it is BPE. Raises LoadError."""
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise LoadError(f"{SOURCE}: no model with a vocab in it; download the file again")
    kind = model.get("type", "BPE")  # older files leave it out
    if kind != "BPE" or not isinstance(model["vocab"], dict):
        raise LoadError(
            f"{SOURCE}: a {kind} vocabulary, but llama.cpp has only byte-level and SentencePiece's BPE for this "
            "architecture; its own convert_hf_to_gguf.py may know more"
        )
    for key in UNSUPPORTED:
        if model.get(key):
            raise LoadError(f"{SOURCE}: {key} {model[key]!r} has no counterpart in llama.cpp")
    return model


def refuse_broken(vocab: Mapping[str, Any]) -> None:
    """Refuse a byte-level vocabulary without its pre-tokenizer, as some programs wrongly save it. Raises LoadError."""
    if sum(token.startswith("Ġ") for token in vocab) > BYTE_LEVEL_SHARE * len(vocab):
        raise LoadError(
            f"{SOURCE}: a byte-level vocabulary without its byte-level pre-tokenizer, as some versions of "
            "transformers wrongly save it; take tokenizer.json from the base model"
        )


def read_byte_level(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], named: set[str]
) -> tuple[Tokens, list[str], list[str]]:
    """Return the tokens of byte-level BPE, its merges, and remarks for the user. Raises LoadError.

    named: texts that other files of the checkpoint call special tokens.
    """
    model = check_model(tokenizer)
    by_id, ids, added, marked = _by_id(model, tokenizer, settings, named)
    pairs = []
    for number, (left, right) in enumerate(_merges(model, ids)):
        if "\n" in left + right:  # llama.cpp aborts on one
            raise LoadError(f"{SOURCE}: merge {number} holds a line break, which is not byte-level BPE")
        pairs.append(f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}")
    kinds = [step.get("type") for step in _steps(tokenizer.get("normalizer"), "normalizers")]
    if any(kind != "NFC" for kind in kinds):
        raise LoadError(f"{SOURCE}: the normalizer {kinds[0]!r} has no counterpart in llama.cpp")
    notes = ["llama.cpp does not compose Unicode (NFC): decomposed text becomes other tokens"] if kinds else []
    tokens = Tokens(SOURCE, by_id, ids, frozenset(marked | {entry.text for entry in added}))
    return tokens, pairs, notes + _greedy(tokenizer)


def read_sentencepiece_style(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], named: set[str], by_looks: bool
) -> tuple[Tokens, bool, list[str]]:
    """Return the tokens of SentencePiece's BPE, whether a space comes before the text, and remarks for the user.

    GGUF wants scores, but the file has merges. The score of a piece is minus the index of the first merge that makes
    it: what is merged first scores highest. Raises LoadError.
    """
    model = check_model(tokenizer)
    prefix, notes = _spaces(tokenizer)
    by_id, ids, added, marked = _by_id(model, tokenizer, settings, named, by_looks)
    places: dict[str, int] = {}
    count = 0
    for left, right in _merges(model, ids):
        places.setdefault(left + right, count)
        count += 1
    last = -float(count)  # the score of pieces that no merge makes, below all others
    unknown = model.get("unk_token")
    for number, token in by_id.items():
        kind = token.kind
        if kind == TokenType.NORMAL and token.text == unknown:
            kind = TokenType.UNKNOWN
        elif kind == TokenType.NORMAL and BYTE.fullmatch(token.text):
            kind = TokenType.BYTE
        score = -float(places[token.text]) if kind == TokenType.NORMAL and token.text in places else last
        by_id[number] = Token(token.text, kind, score)
    tokens = Tokens(SOURCE, by_id, ids, frozenset(marked | {entry.text for entry in added}), last)
    return tokens, prefix, notes + _greedy(tokenizer)


def _by_id(
    model: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    named: set[str],
    by_looks: bool = True,
) -> tuple[dict[int, Token], dict[str, int], list[Added], set[str]]:
    """Return tokens by id, ids by text, the added tokens, and those texts of `named` that are in the vocabulary."""
    added = added_in_tokenizer(tokenizer) + added_in_settings(settings)
    base = (check_token(SOURCE, *entry) for entry in model["vocab"].items())
    ids = ids_of(SOURCE, chain(base, ((entry.text, entry.number) for entry in added)))
    marked = named & ids.keys()
    special = {entry.text for entry in added if entry.special} | marked
    texts = {entry.text for entry in added}
    by_id: dict[int, Token] = {}
    for text, number in ids.items():
        if number in by_id:
            raise LoadError(f"{SOURCE}: the tokens {by_id[number].text!r} and {text!r} have the same id {number}")
        if text in texts or text in special:
            control = text in special or (by_looks and looks_special(text))
            by_id[number] = Added(text, number, control).token(control)
        else:
            by_id[number] = Token(text, TokenType.NORMAL)
    return by_id, ids, added, marked


def _merges(model: Mapping[str, Any], ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the merges as pairs. Files write a merge as 'a b' or as [a, b]."""
    entries = model.get("merges")
    if not isinstance(entries, list) or not entries:
        raise LoadError(f"{SOURCE}: no merges in it")
    for number, entry in enumerate(entries):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise LoadError(f"{SOURCE}: merge {number} is {entry!r}, not a pair")
        left, right = pair
        if left not in ids or right not in ids or left + right not in ids:
            raise LoadError(f"{SOURCE}: merge {number}, {left!r} + {right!r}, uses a token that is not there")
        yield left, right


def _spaces(tokenizer: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Return whether a space comes before the text, and remarks; refuse steps that llama.cpp has no equivalent of."""
    prefix, notes = False, []
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step == PREFIX:
            prefix = True
        elif step.get("type") in UNICODE_FORMS:
            notes.append(f"llama.cpp does not normalise Unicode ({step['type']}): such text becomes other tokens")
        elif step != SPACE:
            raise LoadError(f"{SOURCE}: the normalizer {step.get('type')!r} has no counterpart in llama.cpp")
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement", "▁") == "▁":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            prefix = prefix or scheme != "never"
            if scheme == "first":
                notes.append(
                    "llama.cpp puts a space before text that follows a special token, too, not only before the first"
                )
        elif step.get("type") != "Split" or step.get("pattern") != {"String": " "}:
            raise LoadError(
                f"{SOURCE}: the pre-tokenizer {step.get('type')!r} has no counterpart in llama.cpp's SentencePiece "
                "tokenizer"
            )
    return prefix, notes


def _steps(step: Any, inner: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer; `inner` is the key under which a sequence lists them."""
    if step is None:
        return []
    if not isinstance(step, dict):
        raise LoadError(f"{SOURCE}: {step!r} is no step of a tokenizer")
    if step.get("type") == "Sequence" and isinstance(step.get(inner), list):
        return [one for part in step[inner] for one in _steps(part, inner)]
    return [step]


def _greedy(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return a remark on added tokens that swallow spaces beside them, which llama.cpp does not do."""
    added = tokenizer.get("added_tokens") or []
    greedy = [repr(token["content"]) for token in added if token.get("lstrip") or token.get("rstrip")]
    return [f"llama.cpp keeps the spaces beside {some(greedy)}, which transformers drops"] if greedy else []
