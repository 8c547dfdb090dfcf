"""Decide by program whether a response obeys a preference.

Every checker is a pure function `(response, **parameters) -> bool`. They judge the text of any model, so they look
through what models wrap around an answer: code fences, JSON, headings, list markers, emphasis, blank lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

__all__ = [
    "CHECKERS",
    "begins",
    "emoji",
    "ends",
    "layout",
    "letter_case",
    "mentions",
    "prose",
    "reading_level",
    "sentences",
    "stance",
    "title",
    "tone",
    "units",
]

_FENCE = re.compile(r"^\s*```[\w-]*\n(.*?)\n?```\s*$", re.DOTALL)
_BULLET = re.compile(r"^[ \t]*[-*+•–—][ \t]+", re.MULTILINE)
_NUMBER = re.compile(r"^[ \t]*\d+[.)][ \t]+", re.MULTILINE)
_HEADING = re.compile(r"\s*(?:#{1,6}\s+\S.*|\*\*[^*]+\*\*:?\s*)")
_EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf\U0001f1e6-\U0001f1ff\u2b50\u2b55]")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)*]*(?=\s|$)")
_ABBREVIATION = re.compile(r"\b(?:approx|ca|e\.g|i\.e|etc|vs|fig|dr|mrs?|ms|prof|st|jr)\.(?=\s+\S)", re.I)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")

_PIRATE = re.compile(
    r"\b(?:arr+|ahoy|mateys?|aye|ye|yer|avast|hearty|hearties|landlubbers?|yo ho|scallywags?)\b",
    re.I,
)
_FRIENDLY = re.compile(
    r"!|[\U0001f600-\U0001f64f]|"
    r"\b(?:friend|dear|happy|glad|great|wonderful|lovely|welcome|sure|of course|enjoy|hope)\b",
    re.I,
)
_CASUAL = re.compile(
    r"\b(?:\w+n['’]t|(?:it|that|what|here|there|he|she|who)['’]s|\w+['’](?:re|ll|ve|d|m)|hey|hi|yeah|yep|nope|cool|"
    r"awesome|gonna|wanna|kinda|gotta|guys?|dude|matey|arr+|lol|btw)\b",
    re.I,
)
_MEASURE = r"(?<!\d)(?<!\d[,.])\d[\d,.]*[\s-]*(?:(?:million|billion|thousand|degrees?|square|cubic)\s+)*"
_METRIC = re.compile(
    _MEASURE
    + r"(?:(?:kilo|centi|milli)?(?:met(?:re|er)|gram|lit(?:re|er))s?|km|cm|mm|kg|m|g|l|ml|tonnes?|celsius|°\s*c)\b",
    re.I,
)
_IMPERIAL = re.compile(
    _MEASURE
    + r"(?:miles?|mph|feet|foot|ft|inch(?:es)?|pounds?|lbs?|ounces?|oz|gallons?|pints?|yards?|fahrenheit|°\s*f)\b",
    re.I,
)
_BALANCED = re.compile(
    r"\b(?:disagree|depends?|both sides|balanced?|debated?|controversial|pros and cons|on the one hand|some people|"
    r"(?:different|many|various) (?:views|opinions|perspectives)|arguments? (?:for|on both))\b",
    re.I,
)
_SIDE = re.compile(r"\b(yes|no|should not|shouldn['’]t|should|i (?:dis)?agree)\b", re.I)


def sentences(response: str, at_most: int | None = None, at_least: int | None = None) -> bool:
    """Count sentences; a heading and a lead-in that ends with a colon are none, a list item is at least one."""
    count = _count_sentences(response)
    return (at_most is None or 0 < count <= at_most) and (at_least is None or count >= at_least)


def letter_case(response: str, case: str) -> bool:
    """Tell whether every letter is of one case: `upper` or `lower`. A text without letters is neither."""
    letters = [c for c in response if c.isalpha() and c.upper() != c.lower()]
    return bool(letters) and all(c.isupper() if case == "upper" else c.islower() for c in letters)


def layout(response: str, layout: str) -> bool:
    """Tell whether the response is shaped as `bullets`, `numbered`, `json` or `plain` (neither list nor JSON)."""
    is_json = _json(response) is not None
    if layout == "json":
        return is_json
    bullets, numbers = bool(_BULLET.search(response)), bool(_NUMBER.search(response))
    if layout == "plain":
        return bool(response.strip()) and not (bullets or numbers or is_json)
    return bullets if layout == "bullets" else numbers


def tone(response: str, tone: str) -> bool:
    """Tell a `pirate`'s words, a `friendly` word or sign, or a `formal` text: no contraction, no slang, no `!!`."""
    text = prose(response)
    if tone == "pirate":
        return bool(_PIRATE.search(text))
    if tone == "friendly":
        return bool(_FRIENDLY.search(text))
    return bool(text) and not _CASUAL.search(text) and not _EMOJI.search(text) and text.count("!") < 2


def begins(response: str, words: list[str]) -> bool:
    """Tell whether one of `words` stands in the first sentence's first forty characters, markup aside."""
    head = _SENTENCE_END.split(prose(response))[0][:40]
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", head, re.IGNORECASE) for word in words)


def ends(response: str, pattern: str) -> bool:
    """Tell whether `pattern` is found in the response's running text (patterns are anchored at its end)."""
    return re.search(pattern, prose(response), re.IGNORECASE) is not None


def reading_level(response: str, level: str) -> bool:
    """Tell a text for a `child` (short words and sentences) from one for an `expert` (words of the trade).

    A child's text has an automated readability index of at most 8 (Senter and Smith 1967) and no word of twelve
    letters; an expert's text has a word of eleven letters, or two of nine.
    """
    words = _WORD.findall(prose(response))
    if not words:
        return False
    lengths = [len(word) for word in words]
    if level == "expert":
        return max(lengths) >= 11 or sum(n >= 9 for n in lengths) >= 2
    index = 4.71 * sum(lengths) / len(words) + 0.5 * len(words) / max(1, _count_sentences(response)) - 21.43
    return index <= 8 and max(lengths) < 12


def emoji(response: str, present: bool) -> bool:
    """Tell whether the response has an emoji, or has none."""
    return bool(response.strip()) and bool(_EMOJI.search(response)) == present


def units(response: str, system: str) -> bool:
    """Tell whether no number carries a unit of the other system; a text without measures obeys both."""
    other = _IMPERIAL if system == "metric" else _METRIC
    return bool(response.strip()) and not other.search(response)


def title(response: str, present: bool) -> bool:
    """Tell whether a heading stands first: `# …`, a bold line, or a JSON key that says so."""
    data = _json(response)
    if data is not None:
        found = isinstance(data, dict) and any(str(key).casefold() in ("title", "heading") for key in data)
    else:
        lines = _unfenced(response).strip().splitlines()
        found = bool(lines) and bool(_HEADING.fullmatch(lines[0]))
    return bool(response.strip()) and found == present


def mentions(response: str, text: str) -> bool:
    """Tell whether `text` stands in the response, in any case."""
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", response, re.IGNORECASE) is not None


def stance(response: str, side: str) -> bool:
    """Tell which side an opinion takes: `yes`, `no`, or `open` (balanced). Its first verdict counts."""
    text = prose(response)
    verdict = _SIDE.search(text)
    leaning = verdict.group(1).casefold() if verdict else ""
    if side == "open":
        return bool(_BALANCED.search(text)) and not re.match(r"\W*(?:yes|no)\b", text, re.IGNORECASE)
    if side == "yes":
        return leaning in ("yes", "should", "i agree")
    return leaning in ("no", "should not", "shouldn't", "shouldn’t", "i disagree")


CHECKERS: dict[str, Callable[..., bool]] = {
    function.__name__: function
    for function in (
        sentences, letter_case, layout, tone, begins, ends, reading_level, emoji, units, title, mentions, stance
    )
}  # fmt: skip


def prose(response: str) -> str:
    """Return the running text: the strings of JSON, without fences, headings, list markers and bold; single spaces."""
    data = _json(response)
    text = "\n".join(_strings(data)) if data is not None else _unfenced(response)
    lines = [line for line in text.splitlines() if line.strip() and not _HEADING.fullmatch(line)]
    stripped = (_NUMBER.sub("", _BULLET.sub("", line)) for line in lines)
    return " ".join(" ".join(stripped).replace("**", "").split())


def _count_sentences(response: str) -> int:
    data = _json(response)
    text = "\n".join(_strings(data)) if data is not None else _unfenced(response)
    count = 0
    for line in text.splitlines():
        bare = _NUMBER.sub("", _BULLET.sub("", line))
        if not _WORD.search(bare) or _HEADING.fullmatch(line) or bare.rstrip().endswith(":"):
            continue
        whole = _ABBREVIATION.sub("", bare)
        count += sum(bool(_WORD.search(part)) for part in _SENTENCE_END.split(whole))
    return count


def _unfenced(response: str) -> str:
    fenced = _FENCE.match(response)
    return fenced.group(1) if fenced else response


def _json(response: str) -> Any:
    """Return the object or array that the whole response is, or None."""
    text = _unfenced(response).strip()
    if not text.startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # thousands of brackets are no answer either
        return None


def _strings(data: Any, key: str = "") -> list[str]:
    """Return the string values in order; what a key calls a title is no running text."""
    if isinstance(data, str):
        return [] if key.casefold() in ("title", "heading") else [data]
    if isinstance(data, dict):
        return [text for name, value in data.items() for text in _strings(value, str(name))]
    if isinstance(data, list):
        return [text for value in data for text in _strings(value)]
    return []
