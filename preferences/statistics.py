"""Rates with their intervals, and the difference of two rates over the same cases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import comb, sqrt

__all__ = ["Difference", "Rate", "difference", "mcnemar", "rate"]

_Z = 1.96  # standard normal, 95 %


@dataclass(frozen=True)
class Rate:
    """A share of successes with its 95 % interval (Wilson 1927), which holds for small n, and near 0 and 1."""

    rate: float  # 0 to 1; 0 where n is 0
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        """Return the rate and its interval in per cent."""
        return f"{100 * self.rate:5.1f} % ({100 * self.low:.0f}-{100 * self.high:.0f})"


@dataclass(frozen=True)
class Difference:
    """The first minus the second of two rates over the same cases, with its 95 % interval and an exact p-value."""

    points: float  # -100 to 100; 0 where n is 0
    n: int
    low: float
    high: float
    p: float  # of a difference at least as large, were both equally good (McNemar's exact test)

    def __str__(self) -> str:
        """Return the difference and its interval in points."""
        return f"{self.points:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def rate(outcomes: Iterable[bool]) -> Rate:
    """Return the share of true outcomes with its interval."""
    results = list(outcomes)
    n = len(results)
    if not n:
        return Rate(0.0, 0, 0.0, 1.0)
    p, z = sum(results) / n, _Z
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Rate(p, n, max(0.0, middle - half), min(1.0, middle + half))


def difference(pairs: Iterable[tuple[bool, bool]]) -> Difference:
    """Return by how many points the first outcomes of some pairs are more often true than the second.

    The interval is Newcombe's for paired proportions: method 10 of "Improved confidence intervals for the difference
    between binomial proportions based on paired data", Statistics in Medicine 17, 2635-2650 (1998). It combines the two
    Wilson intervals by the correlation of the pairs, and stays within -100 and 100 for any n.
    """
    found = list(pairs)
    n = len(found)
    if not n:
        return Difference(0.0, 0, -100.0, 100.0, 1.0)
    kinds = ((True, True), (True, False), (False, True), (False, False))
    both, first, second, none = (found.count(kind) for kind in kinds)
    one, other = rate(a for a, _ in found), rate(b for _, b in found)
    product = (both + first) * (second + none) * (both + second) * (first + none)
    surplus = float(both * none - first * second)
    if surplus > 0:
        surplus = max(0.0, surplus - n / 2)  # Newcombe's correction for continuity
    phi = surplus / sqrt(product) if product else 0.0

    def reach(a: float, b: float) -> float:
        return sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    middle = one.rate - other.rate
    low = middle - reach(one.rate - one.low, other.high - other.rate)
    high = middle + reach(one.high - one.rate, other.rate - other.low)
    return Difference(100 * middle, n, 100 * low, 100 * high, mcnemar(first, second))


def mcnemar(first: int, second: int) -> float:
    """Return the exact two-sided p-value of the pairs in which only the first, or only the second, was a success.

    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", Psychometrika
    12, 153-157 (1947), with the binomial distribution in place of its approximation: were both equally good, each of
    the discordant pairs would be a toss of a coin.
    """
    tosses = first + second
    tail = sum(comb(tosses, heads) for heads in range(min(first, second) + 1))
    share: float = 2 * tail / 2**tosses
    return min(1.0, share)
