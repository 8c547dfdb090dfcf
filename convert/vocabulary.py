"""The vocabulary out of the checkpoint's own files: no tokenizer library, and none of its versions, comes between.

Which kind it is, the files say, never the name of a class: tokenizer.model if it is SentencePiece's, else
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
SPACE_BY_DEFAULT = {SENTENCEPIECE: True, BYTE_LEVEL: False}  # what llama.cpp does before a text unless told


@dataclass(frozen=True)
class VocabularyRules:
    """What an architecture's vocabulary does otherwise than the rest: llama.cpp's converter has a method for each."""

    # Where the key add_space_prefix goes, and what it says: as tokenizer_config.json has it, before all others or
    # after the tokens; as tokenizer.model has it, after the tokens; false, at the end; or only where it must be said.
    space_prefix: Literal["settings first", "settings", "model", "never", "unsaid"] = "unsaid"
    by_looks: bool = True  # added tokens that look like control tokens are such, and pieces stay what they are
    unused: str | None = None  # how SentencePiece pieces begin that are not in use
    end: str | None = None  # ends an answer, whatever the files say, where the vocabulary has it
    eot: int | None = None  # the id of the end of a turn
    eot_by_rows: Mapping[int, int] | None = None  # the same, for models with so many rows
    no_bos_rows: frozenset[int] = frozenset()  # models with so many rows begin without bos, whatever the files say
    beyond: frozenset[str] = frozenset()  # tokens that have no row in the embedding, and are left out


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
    space_prefix: tuple[Literal["first", "middle", "last"], bool] | None  # place among the keys, and value
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Read:
    """What one of the three routes found."""

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
    """Read the vocabulary for an embedding of `rows` rows, by an architecture's rules. Raises LoadError."""
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
    """Choose the route by what the files are, and take it."""
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
    """Return the texts in a list of tokens, each a string or an object with `content`."""
    entries = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return [text for text in texts if isinstance(text, str)]


def _has_every_byte(source: str, table: list[Token]) -> None:
    """Refuse a vocabulary without byte tokens: a letter that it lacks would make llama.cpp end the process."""
    texts = {token.text for token in table}
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in texts and (byte > 127 or chr(byte) not in texts)]
    if missing:
        raise LoadError(
            f"{source}: no token <0x{missing[0]:02X}>, one of {len(missing)} bytes without any; llama.cpp needs them "
            "for the letters that the vocabulary lacks (SentencePiece's byte_fallback)"
        )


def _say_what_is_added(special: Special, model: str, no_bos: bool) -> None:
    """Fill in what no file says, for each of llama.cpp's tokenizers has a default of its own."""
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
    """Return where the key add_space_prefix goes and its value, None where llama.cpp's default is right."""
    given = settings.get("add_prefix_space")
    if rules.space_prefix == "never":
        return "last", False
    if rules.space_prefix == "model":
        return "middle", read.space_prefix
    if rules.space_prefix != "unsaid" and isinstance(given, bool):
        # tokenizer.json does what it does, whatever the settings of a class may say
        value = given if read.tokens.source == "tokenizer.model" or read.model == BYTE_LEVEL else read.space_prefix
        return "first" if rules.space_prefix == "settings first" else "middle", value
    if read.space_prefix != SPACE_BY_DEFAULT[read.model]:
        return "last", read.space_prefix
    return None
