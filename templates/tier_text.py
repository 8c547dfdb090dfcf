"""A string that remembers which of its characters came from which tier."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Literal, NamedTuple, SupportsIndex

Tier = Literal["system_info", "user_info", "query", "response", "template_arg"]  # the last: see `arguments`
TIERS: tuple[Tier, ...] = ("system_info", "user_info", "query", "response")  # those of the dialog


class Span(NamedTuple):
    """Characters [start, end) that came from a tier."""

    start: int
    end: int
    tier: Tier


class TierText(str):
    """A string that remembers which of its characters came from which tier; the others are scaffold.

    A template may cut, strip, join and change it in any way it likes: every operation either carries the spans along
    or, where positions are lost, gives the whole result to the tier. So no text of a tier can pass as scaffold.
    """

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, text: str, tier: Tier) -> TierText:
        """Mark a whole text as one tier's."""
        return cls.build(text, [Span(0, len(text), tier)])

    @classmethod
    def build(cls, text: str, spans: Iterable[Span]) -> TierText:
        """Make a text with these spans; empty ones vanish, neighbours of one tier merge."""
        self = super().__new__(cls, text)
        merged: list[Span] = []
        for span in spans:
            if span.start >= span.end:
                continue
            if merged and merged[-1].tier == span.tier and merged[-1].end == span.start:
                merged[-1] = Span(merged[-1].start, span.end, span.tier)
            else:
                merged.append(span)
        self.spans = tuple(merged)
        return self

    def pieces(self) -> Iterator[tuple[str, Tier | None]]:
        """Yield the maximal runs of one owner in order; scaffold has the owner None."""
        at = 0
        for start, end, tier in self.spans:
            if at < start:
                yield str.__getitem__(self, slice(at, start)), None
            yield str.__getitem__(self, slice(start, end)), tier
            at = end
        if at < len(self):
            yield str.__getitem__(self, slice(at, None)), None

    def holds(self, tier: Tier) -> bool:
        """Tell whether any character came from this tier."""
        return any(span.tier == tier for span in self.spans)

    def _whole(self, text: str) -> TierText:
        return TierText.build(text, [Span(0, len(text), self.spans[-1].tier)] if self.spans else [])

    def changed(self, text: str) -> TierText:
        """Give what was computed from this text, letter by letter, the same owners; of another length, one owner."""
        return TierText.build(text, self.spans) if len(text) == len(self) else self._whole(text)

    def _cut(self, pieces: Iterable[str]) -> list[TierText]:
        """Give the pieces of a split, in order, their spans back."""
        found, at = [], 0
        for piece in pieces:
            at = self.find(piece, at)
            found.append(self[at : at + len(piece)])
            at += len(piece)
        return found

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> TierText:
        text = str.__getitem__(self, key)
        if not isinstance(key, slice):
            start = key.__index__() % len(self)
            step = 1
        else:
            start, _, step = key.indices(len(self))
        if step != 1:
            return self._whole(text)
        stop = start + len(text)
        first = bisect.bisect_right(self.spans, start, key=attrgetter("end"))
        last = bisect.bisect_left(self.spans, stop, key=attrgetter("start"))
        return TierText.build(
            text, (Span(max(s, start) - start, min(e, stop) - start, t) for s, e, t in self.spans[first:last])
        )

    def __iter__(self) -> Iterator[TierText]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: str) -> TierText:
        return join_text([self, other])

    def __radd__(self, other: str) -> TierText:
        return join_text([other, self])

    def __mul__(self, times: SupportsIndex) -> TierText:
        return join_text([self] * times.__index__())

    __rmul__ = __mul__

    def strip(self, chars: str | None = None, /) -> TierText:
        """Strip both ends."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> TierText:
        """Strip the left end."""
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> TierText:
        """Strip the right end."""
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> TierText:
        """Remove a prefix if it is there."""
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> TierText:
        """Remove a suffix if it is there."""
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[TierText]:  # type: ignore[override]
        """Split from the left."""
        pieces = str.split(self, sep, maxsplit)
        return self._cut(pieces) if sep is None else self._cut_at(pieces, sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[TierText]:  # type: ignore[override]
        """Split from the right."""
        pieces = str.rsplit(self, sep, maxsplit)
        return self._cut(pieces) if sep is None else self._cut_at(pieces, sep)

    def _cut_at(self, pieces: Iterable[str], sep: str) -> list[TierText]:
        found, at = [], 0
        for piece in pieces:
            found.append(self[at : at + len(piece)])
            at += len(piece) + len(sep)
        return found

    def splitlines(self, keepends: bool = False) -> list[TierText]:  # type: ignore[override]
        """Split at line boundaries."""
        found, at = [], 0
        for line, whole in zip(str.splitlines(self), str.splitlines(self, True), strict=True):
            found.append(self[at : at + len(whole if keepends else line)])
            at += len(whole)
        return found

    def partition(self, sep: str, /) -> tuple[TierText, TierText, TierText]:
        """Split once from the left, in three."""
        before, middle, _ = str.partition(self, sep)
        a, b = len(before), len(before) + len(middle)
        return self[:a], self[a:b], self[b:]

    def rpartition(self, sep: str, /) -> tuple[TierText, TierText, TierText]:
        """Split once from the right, in three."""
        before, middle, _ = str.rpartition(self, sep)
        a, b = len(before), len(before) + len(middle)
        return self[:a], self[a:b], self[b:]

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> TierText:
        """Replace occurrences; what replaces them keeps its own owner."""
        if not old:
            return join_text([self, new])._whole(str.replace(self, old, new, count))
        parts = self.split(old, count)
        return join_text([part for piece in parts for part in (piece, new)][:-1])

    def join(self, iterable: Iterable[str], /) -> TierText:
        """Join texts with this one between them."""
        return join_text([part for piece in iterable for part in (piece, self)][:-1])

    def upper(self) -> TierText:
        """Upper-case."""
        return self.changed(str.upper(self))

    def lower(self) -> TierText:
        """Lower-case."""
        return self.changed(str.lower(self))

    def title(self) -> TierText:
        """Title-case."""
        return self.changed(str.title(self))

    def capitalize(self) -> TierText:
        """Capitalise the first letter."""
        return self.changed(str.capitalize(self))

    def zfill(self, width: SupportsIndex, /) -> TierText:
        """Pad with zeros on the left."""
        return self._whole(str.zfill(self, width))


def join_text(parts: Iterable[str]) -> TierText:
    """Concatenate texts, each with its owner; a plain string is scaffold."""
    parts = list(parts)
    starts = itertools.accumulate(map(len, parts), initial=0)
    return TierText.build(
        "".join(parts),
        (
            Span(start + at, end + at, tier)
            for part, at in zip(parts, starts, strict=False)
            if isinstance(part, TierText)
            for start, end, tier in part.spans
        ),
    )
