r"""A table that finds llama.cpp's pre-tokenizer for a tokenizer.json: the one that splits text in the same way.

llama.cpp names its pre-tokenizers, tokenizer.json lists their parts. The parts are compared, neither the class of the
model nor the tokens of a sample text: those change when a vocabulary is extended. Names and meanings follow
`llama-vocab.cpp` of llama.cpp (MIT). Of several names for the same split, the table has one that keeps spaces when
tokens are turned back into text, if there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metaalign_edge_runtime.errors import LoadError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")  # the form of llama.cpp's names
SENTENCEPIECE_PRE = "default"  # the name for SentencePiece, which has no pre-tokenizer
# English contractions in upper and lower case, and another regular expression for the same in some files.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SAME = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SPELLINGS = {SAME: CONTRACTIONS, "\r": r"\r", "\n": r"\n", r"\p{N}{1}|": r"\p{N}|"}  # other spellings in files -> ours
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
MARKED_WORDS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
APPROXIMATE = "words with combining marks, and capitals inside words outside ASCII"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def cl100k(words: str, digits: str, signs: str = SIGNS) -> str:
    """Return GPT-4's regular expression, or a variant with other words, digits or signs."""
    return f"{CONTRACTIONS}|{words}|{digits}|{signs}|{SPACES}"


def o200k(ending: str, digits: str) -> str:
    """Return GPT-4o's regular expression, which also splits words between lower and upper case, or a variant."""
    words = "|".join(word + ending for word in CASED_WORDS)
    return f"{words}|{digits}|{SIGNS_AND_SLASHES}|{SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """A row of the table."""

    name: str  # llama.cpp's
    parts: tuple[str, ...]  # of tokenizer.json, as in `Signature`
    ignore_merges: bool = False  # a whole word that is a token stays one, whatever the merges say
    approximate: str = ""  # texts that llama.cpp is known to split differently


def split(regex: str) -> str:
    """Return the part of a signature for a Split step."""
    return f"split({regex})"


BYTES, BYTE_WORDS, EACH_DIGIT = "bytes", "bytes(words)", "digits(each)"
HAN_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
LETTERS_WITH_CASE = (
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ"
    "ᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏"
    "𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]"
)
DEEPSEEK_LLM = (
    r"[\r\n]", rf"\s?{LETTERS_WITH_CASE}+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+",
)  # fmt: skip
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
EXAONE_MOE = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|"
    r"\s+(?!\S)|\s+"
)
STEPPED_SPACES = "".join(rf"\s{{{2**power}}}(?!\S)|" for power in range(9, 1, -1)) + r"\s{1,2}(?!\S)|\s{1}"
JAIS2 = f"{CONTRACTIONS}|{WORDS}|\\p{{N}}{{1,3}}|{SIGNS}|\\s*[\\r\\n]+|{STEPPED_SPACES}"

TABLE = (
    PreTokenizer("gpt-2", (BYTE_WORDS,)),
    PreTokenizer("gpt-2", (split(GPT2_WORDS), BYTES)),
    PreTokenizer("smollm", (EACH_DIGIT, BYTE_WORDS)),
    PreTokenizer("llama-bpe", (split(cl100k(WORDS, r"\p{N}{1,3}")), BYTES), ignore_merges=True),
    PreTokenizer("dbrx", (split(cl100k(WORDS, r"\p{N}{1,3}")), BYTES)),
    PreTokenizer("qwen2", (split(cl100k(WORDS, r"\p{N}")), BYTES)),
    PreTokenizer("qwen35", (split(cl100k(MARKED_WORDS, r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*")), BYTES)),
    PreTokenizer("gpt-4o", (split(o200k(CONTRACTIONS + "?", r"\p{N}{1,3}")), BYTES), approximate=APPROXIMATE),
    PreTokenizer("tekken", (split(o200k("", r"\p{N}")), BYTES), ignore_merges=True, approximate=APPROXIMATE),
    PreTokenizer(
        "deepseek-v3", (split(r"\p{N}{1,3}"), split(HAN_AND_KANA), split(f"{DEEPSEEK_WORDS}|{SPACES}"), BYTES)
    ),
    PreTokenizer("deepseek-coder", (*map(split, DEEPSEEK_CODER), EACH_DIGIT, BYTES)),
    PreTokenizer("deepseek-llm", (*map(split, DEEPSEEK_LLM), EACH_DIGIT, BYTES)),
    PreTokenizer("seed-coder", (split(cl100k(WORDS, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+")), BYTES)),
    PreTokenizer("bailingmoe", (split(BAILING), BYTES)),
    PreTokenizer("minicpm5", (split(r"\p{N}{1,3}"), split(cl100k(WORDS, r"\p{N}+")), BYTES), ignore_merges=True),
    PreTokenizer("poro-chat", (split(BLOOM), BYTES)),
    PreTokenizer("viking", (split(BLOOM), EACH_DIGIT, BYTES)),
    PreTokenizer("exaone-moe", (split(EXAONE_MOE), BYTES)),
    PreTokenizer("jais-2", (split(JAIS2), BYTES)),
)
# One name for each way in which llama.cpp splits byte-level text. They are tried if the table has no match.
DISTINCT = (
    *dict.fromkeys(row.name for row in TABLE),
    "falcon", "youtu", "ufakzeka", "laguna", "afmoe", "superbpe", "spark2_5", "kimi-k2", "chameleon",
    "tiny_aya", "granite-embed-multi-97m",
)  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """The steps of a tokenizer.json before its merges, as texts that can be compared."""

    parts: tuple[str, ...]
    ignore_merges: bool

    def __str__(self) -> str:
        """Return the steps as a text for messages."""
        return " + ".join(self.parts) + (" + ignore_merges" if self.ignore_merges else "")

    @property
    def row(self) -> PreTokenizer | None:
        """Return the row of the table with the same steps, None if there is none."""
        return next((row for row in TABLE if (row.parts, row.ignore_merges) == (self.parts, self.ignore_merges)), None)


def signature(tokenizer: Mapping[str, Any]) -> Signature:
    """Return the signature of a parsed tokenizer.json. Raises LoadError if its pre-tokenizer is malformed."""
    model = tokenizer.get("model")
    ignore_merges = isinstance(model, dict) and model.get("ignore_merges") is True
    return Signature(tuple(_parts(tokenizer.get("pre_tokenizer"))), ignore_merges)


def _parts(step: Any) -> list[str]:
    if step is None:
        return []
    if not isinstance(step, dict):
        raise LoadError("tokenizer.json: its pre_tokenizer is not an object")
    kind = step.get("type")
    if kind == "Sequence" and isinstance(step.get("pretokenizers"), list):
        return [part for inner in step["pretokenizers"] for part in _parts(inner)]
    if kind == "ByteLevel":
        # llama.cpp cannot put a space before the text here, so that "space+" matches no row
        space = "space+" if step.get("add_prefix_space") else ""
        return [space + ("bytes" if step.get("use_regex") is False else "bytes(words)")]
    if kind == "Digits":
        return ["digits(each)" if step.get("individual_digits") else "digits"]
    if kind == "Split":
        return [_split(step)]
    return [str(kind)]


def _split(step: Mapping[str, Any]) -> str:
    pattern, behavior = step.get("pattern"), step.get("behavior")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(regex, str):
        return f"split by {pattern}"
    for spelling, ours in SPELLINGS.items():
        regex = regex.replace(spelling, ours)
    # "Isolated" splits around every match, "Removed" with "invert" keeps only the matches: the same for an expression
    # that matches all text.
    everything = regex.endswith(r"|\s+")
    if behavior == "Isolated" or (behavior == "Removed" and step.get("invert") is True and everything):
        return f"split({regex})"
    return f"split {behavior}({regex})"
