"""Read the vocabulary from the files of a checkpoint, without a tokenizer library.

Its kind is found in the files, never by the name of a class: tokenizer.model if it is SentencePiece's, else
tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gguf import TokenType

from metaalign_edge_runtime.errors import LoadError

from .bpe import check_model, read_byte_level, read_sentencepiece_style, refuse_broken
from .folder import MB, Folder
from .pretokenizers import Signature, signature
from .sentencepiece import parse_model, read_pieces
from .special import Special, TokenizerFiles, find_special, named
from .tokens import Token, Tokens

TOKENIZER_LIMIT = 200 * MB
REMEDY = "write one with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"  # what GGUF calls the two kinds
SPACE_BY_DEFAULT = {SENTENCEPIECE: True, BYTE_LEVEL: False}  # whether llama.cpp puts a space before a text by default


@dataclass(frozen=True)
class VocabularyRules:
    """How the vocabulary of an architecture differs from others. llama.cpp's converter has a method for each."""

    # The value and the place of the key add_space_prefix. settings first: that of tokenizer_config.json, before all
    # keys. settings: the same, after the tokens. model: that of tokenizer.model, after the tokens. never: false, at the
    # end. unsaid: only if llama.cpp's default is wrong, at the end.
    space_prefix: Literal["settings first", "settings", "model", "never", "unsaid"] = "unsaid"
    by_looks: bool = True  # added tokens that look like control tokens are control tokens; see `read_pieces`
    unused: str | None = None  # beginning of SentencePiece pieces that are not in use
    end: str | None = None  # token that ends an answer whatever the files say, if the vocabulary has it
    eot: int | None = None  # id of the token that ends a turn
    eot_by_rows: Mapping[int, int] | None = None  # rows of the embedding -> the same id, for single models
    no_bos_rows: frozenset[int] = frozenset()  # models with these numbers of rows never add bos
    beyond: frozenset[str] = frozenset()  # tokens without a row in the embedding, to be left out


PLAIN = VocabularyRules()


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary, checked and complete: one token for every row of the embedding."""

    model: str  # SENTENCEPIECE or BYTE_LEVEL
    tokens: list[str]
    types: list[int]
    scores: list[float] | None  # SentencePiece's only
    merges: list[str] | None  # byte-level BPE's only
    signature: Signature | None  # byte-level BPE's only
    special: Special
    marked: frozenset[str]  # the texts of added and special tokens
    space_prefix: tuple[Literal["first", "middle", "last"], bool] | None  # place of the key add_space_prefix, and value
    notes: tuple[str, ...]  # remarks for the user


@dataclass(frozen=True)
class _Read:
    """The result of one of the three readers: of tokenizer.model, or of either kind of tokenizer.json."""

    model: str
    tokens: Tokens
    notes: list[str]
    space_prefix: bool
    merges: list[str] | None = None
    signature: Signature | None = None


def read_vocabulary(
    folder: Folder,
    rows: int,
    config: Mapping[str, Any],
    rules: VocabularyRules = PLAIN,
) -> Vocabulary:
    """Read the vocabulary for an embedding of `rows` rows, by the rules of an architecture. Raises LoadError."""
    settings = folder.json("tokenizer_config.json")
    tokenizer = folder.json("tokenizer.json", TOKENIZER_LIMIT)
    names = {**named(folder.json("special_tokens_map.json")), **named(settings)}
    read = _read(folder, tokenizer, settings, names, rules)
    table = read.tokens.lay_out(rows, rules.beyond)
    if read.model == SENTENCEPIECE:
        _has_every_byte(read.tokens.source, table)
    tokens = [token.text for token in table]
    control = {number for number, token in enumerate(table) if token.kind == TokenType.CONTROL}
    ids = {text: number for text, number in read.tokens.ids.items() if number < rows}
    files = TokenizerFiles(tokenizer, settings, names, config, folder.json("generation_config.json"))
    special = find_special(files, ids, tokens, control, rules.end, (rules.eot_by_rows or {}).get(rows, rules.eot))
    _say_what_is_added(special, read.model, rows in rules.no_bos_rows)
    return Vocabulary(
        model=read.model,
        tokens=tokens,
        types=[int(token.kind) for token in table],
        scores=[token.score for token in table] if read.model == SENTENCEPIECE else None,
        merges=read.merges,
        signature=read.signature,
        special=special,
        marked=frozenset(read.tokens.marked & ids.keys()),
        space_prefix=_space_prefix(rules, settings, read),
        notes=tuple(read.notes),
    )


def _read(
    folder: Folder,
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    names: Mapping[str, str],
    rules: VocabularyRules,
) -> _Read:
    """Read the vocabulary with the reader that the files need. Raises LoadError."""
    notes: list[str] = []
    if folder.has("tokenizer.model"):
        pieces = parse_model(folder.bytes("tokenizer.model", TOKENIZER_LIMIT))
        if pieces is not None:
            if tokenizer and _byte_level(tokenizer):
                raise LoadError(
                    "tokenizer.model is SentencePiece's, tokenizer.json byte-level: remove the one that is not this "
                    "model's"
                )
            tokens, notes = read_pieces(pieces, folder, settings, tokenizer, rules.by_looks, rules.unused)
            return _Read(SENTENCEPIECE, tokens, notes, pieces.space_prefix)
        if not tokenizer:
            raise LoadError(f"tokenizer.model: not SentencePiece's, and tokenizer.json is missing; {REMEDY}")
        notes.append("tokenizer.model is not SentencePiece's and was passed over")
    if not tokenizer:
        if folder.has("tekken.json"):
            raise LoadError("tekken.json: only Mistral's own programs read it; take tokenizer.json from the hub")
        raise LoadError(f"tokenizer.json is missing; {REMEDY}")
    model = check_model(tokenizer)
    lists = (_texts(settings.get(key)) for key in ("additional_special_tokens", "extra_special_tokens"))
    special = {text for texts in (names.values(), *lists) for text in texts}
    if _byte_level(tokenizer):
        tokens, merges, more = read_byte_level(tokenizer, settings, special)
        return _Read(BYTE_LEVEL, tokens, notes + more, False, merges, signature(tokenizer))
    refuse_broken(model["vocab"])
    if model.get("byte_fallback") is not True:
        raise LoadError(
            "tokenizer.json: BPE that is neither byte-level nor SentencePiece's (no byte_fallback); llama.cpp has no "
            "tokenizer for it"
        )
    tokens, prefix, more = read_sentencepiece_style(tokenizer, settings, special, rules.by_looks)
    return _Read(SENTENCEPIECE, tokens, notes + more, prefix)


def _byte_level(tokenizer: Mapping[str, Any]) -> bool:
    return any("bytes" in part for part in signature(tokenizer).parts)


def _texts(value: Any) -> list[str]:
    """Return the texts of a list of tokens; each token is a text or an object with `content`."""
    entries = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return [text for text in texts if isinstance(text, str)]


def _has_every_byte(source: str, table: list[Token]) -> None:
    """Refuse a vocabulary that lacks tokens for bytes: at an unknown letter, llama.cpp would end the process."""
    texts = {token.text for token in table}
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in texts and (byte > 127 or chr(byte) not in texts)]
    if missing:
        raise LoadError(
            f"{source}: no token <0x{missing[0]:02X}>, one of {len(missing)} bytes without any; llama.cpp needs them "
            "for the letters that the vocabulary lacks (SentencePiece's byte_fallback)"
        )


def _say_what_is_added(special: Special, model: str, no_bos: bool) -> None:
    """Set whether bos and eos are added where no file says so: llama.cpp's defaults differ by tokenizer."""
    if "bos" not in special.adds:
        by_default = model == SENTENCEPIECE and not special.adds_nothing and "bos" in special.ids
        special.unsaid["bos"] = by_default and not no_bos
    elif no_bos:
        special.adds["bos"] = False
    if "eos" not in special.adds:
        special.unsaid["eos"] = False


def _space_prefix(
    rules: VocabularyRules, settings: Mapping[str, Any], read: _Read
) -> tuple[Literal["first", "middle", "last"], bool] | None:
    """Return the place of the key add_space_prefix and its value, None if llama.cpp's default is right."""
    given = settings.get("add_prefix_space")
    if rules.space_prefix == "never":
        return "last", False
    if rules.space_prefix == "model":
        return "middle", read.space_prefix
    if rules.space_prefix != "unsaid" and isinstance(given, bool):
        # Without tokenizer.model, the steps in tokenizer.json decide, not the settings of a class.
        value = given if read.tokens.source == "tokenizer.model" or read.model == BYTE_LEVEL else read.space_prefix
        return "first" if rules.space_prefix == "settings first" else "middle", value
    if read.space_prefix != SPACE_BY_DEFAULT[read.model]:
        return "last", read.space_prefix
    return None
