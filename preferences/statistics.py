"""Rates with their uncertainty: what `eval` reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

__all__ = ["Rate", "rate"]


@dataclass(frozen=True)
class Rate:
    """A share of successes, with its 95 % interval (Wilson 1927), which is honest for small n and near 0 and 1."""

    rate: float  # 0 to 1; 0 where n is 0
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        """Return the rate and its interval in per cent."""
        return f"{100 * self.rate:5.1f} % ({100 * self.low:.0f}-{100 * self.high:.0f})"


def rate(outcomes: Iterable[bool]) -> Rate:
    """Return the share of true outcomes with its interval."""
    results = list(outcomes)
    n = len(results)
    if not n:
        return Rate(0.0, 0, 0.0, 1.0)
    p, z = sum(results) / n, 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Rate(p, n, max(0.0, middle - half), min(1.0, middle + half))
