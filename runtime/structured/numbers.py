"""Numbers of a schema as llguidance sees them: as floats, and bounds and factors digit by digit."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from decimal import ROUND_DOWN, Decimal
from fractions import Fraction
from typing import Any

Node = dict[str, Any]

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
EXACT = 2**53  # whole numbers up to here are exact as floats
LARGEST = 2**63 - 2**10  # of bounds
DIGITS = 20  # behind the point, and no more


def fraction(number: float) -> Fraction:
    """Return a number as JSON writes it."""
    return Fraction(number if isinstance(number, int) else repr(number))


def decimals(value: float) -> int:
    """Return how many digits a number has behind its point."""
    return max(0, -int(Decimal(repr(value)).normalize().as_tuple().exponent))


def is_exact(value: Any) -> bool:
    """Tell whether llguidance sees all numbers in a value as they are."""
    if isinstance(value, dict | list):
        return all(map(is_exact, value.values() if isinstance(value, dict) else value))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number or (abs(value) <= EXACT and decimals(value) <= DIGITS)


def nearest(plain: str, value: float) -> float | None:
    """Return the nearest `minimum` or `maximum` that llguidance sees as it is, and that excludes no more than this one.

    None if it has too many digits.
    """
    if not abs(value) < LARGEST or decimals(value) > DIGITS:
        return None
    near = float(value)
    if near == value:
        return value
    return (
        near
        if (near < value) == (plain == "minimum")
        else math.nextafter(near, -math.inf if near > value else math.inf)
    )


def bounds(keyword: str, value: float) -> list[Node]:
    """Return a bound and, if those are nearer to zero, the same with its first decimals only.

    llguidance asks for all decimals of such a bound: without the others, 0.2 would not be below 0.25.
    """
    if (value > 0) != keyword.lower().endswith("maximum"):
        return [{keyword: value}]
    number, plain = Decimal(repr(value)), keyword.removeprefix("exclusive").lower()
    cut = [number.quantize(Decimal((0, (1,), -count)), ROUND_DOWN) for count in range(1, decimals(value))]
    return [{keyword: value}, *({plain: float(one)} for one in cut)]


def is_leaky(keyword: str, value: float, ends: Sequence[float]) -> bool:
    """Tell whether llguidance may let an excluded bound through: a whole one, with another less than 1 behind it."""
    sign = {"exclusiveMinimum": 1, "exclusiveMaximum": -1}.get(keyword, 0)
    return value == int(value) and sign * value >= 0 and any(0 < sign * (end - value) < 1 for end in ends)


def factors(value: float) -> list[Node]:
    """Return a factor and its least multiples of fewer decimals; nothing if llguidance does not see it as it is.

    llguidance divides the digits that are written: without the others, 0.5 would be no multiple of 0.25.
    """
    factor, count, shifted = fraction(value), decimals(value), float(value)
    for _ in range(count):
        shifted *= 10  # as llguidance finds the digits
    if count > DIGITS or shifted != factor * 10**count or shifted >= 2**32:
        return []
    shorter = [least_multiple(factor, Fraction(1, 10**digits)) for digits in range(count)] if shifted != 1 else []
    return [{"multipleOf": value}, *({"multipleOf": float(one)} for one in shorter)]


def fit_together(values: Sequence[float]) -> bool:
    """Tell whether common multiples of these factors fit llguidance's 32 bits: it does not look."""
    common = functools.reduce(least_multiple, map(fraction, values), Fraction(1))
    scale: int = 10 ** max(map(decimals, values), default=0)
    return common * scale < (2**32 if len(values) == 1 else 2**16)


def least_multiple(one: Fraction, other: Fraction) -> Fraction:
    """Return the least common multiple of two numbers."""
    return Fraction(math.lcm(one.numerator, other.numerator), math.gcd(one.denominator, other.denominator))
