"""Numbers in a schema as llguidance reads them: as floats; it checks bounds and factors digit by digit."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from decimal import ROUND_DOWN, Decimal
from fractions import Fraction
from typing import Any

Node = dict[str, Any]

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
EXACT = 2**53  # floats represent all integers up to here exactly
LARGEST = 2**63 - 2**10  # the largest float below 2**63; bounds must be smaller
DIGITS = 20  # most decimal places that a number may have in the mask


def fraction(number: float) -> Fraction:
    """Return the exact value of a number's decimal notation: 0.1 is 1/10."""
    return Fraction(number if isinstance(number, int) else repr(number))


def decimals(value: float) -> int:
    """Return the number of a value's decimal places."""
    return max(0, -int(Decimal(repr(value)).normalize().as_tuple().exponent))


def is_exact(value: Any) -> bool:
    """Tell whether llguidance reads all numbers in a value exactly."""
    if isinstance(value, dict | list):
        return all(map(is_exact, value.values() if isinstance(value, dict) else value))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number or (abs(value) <= EXACT and decimals(value) <= DIGITS)


def nearest(plain: str, value: float) -> float | None:
    """Return a bound as a float, rounded so that no allowed value is excluded; None if it has too many digits.

    Args:
        plain: `minimum` or `maximum`.
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
    """Return a bound as alternatives: the bound itself and, if cutting decimals only tightens it, its shorter forms.

    llguidance compares all decimals of such a bound: with 0.25 alone as the maximum, it would refuse 0.2.
    """
    if (value > 0) != keyword.lower().endswith("maximum"):
        return [{keyword: value}]
    number, plain = Decimal(repr(value)), keyword.removeprefix("exclusive").lower()
    cut = [number.quantize(Decimal((0, (1,), -count)), ROUND_DOWN) for count in range(1, decimals(value))]
    return [{keyword: value}, *({plain: float(one)} for one in cut)]


def is_leaky(keyword: str, value: float, ends: Sequence[float]) -> bool:
    """Tell whether llguidance may allow an exclusive bound itself: an integer with another bound less than 1 away."""
    sign = {"exclusiveMinimum": 1, "exclusiveMaximum": -1}.get(keyword, 0)
    return value == int(value) and sign * value >= 0 and any(0 < sign * (end - value) < 1 for end in ends)


def factors(value: float) -> list[Node]:
    """Return a factor and its least multiples with fewer decimals; [] if llguidance cannot represent the factor.

    llguidance divides only the digits that are written: with 0.25 alone, it would refuse 0.5.
    """
    factor, count, shifted = fraction(value), decimals(value), float(value)
    for _ in range(count):
        shifted *= 10  # llguidance shifts the float like this, with the same rounding
    if count > DIGITS or shifted != factor * 10**count or shifted >= 2**32:
        return []
    shorter = [least_multiple(factor, Fraction(1, 10**digits)) for digits in range(count)] if shifted != 1 else []
    return [{"multipleOf": value}, *({"multipleOf": float(one)} for one in shorter)]


def fit_together(values: Sequence[float]) -> bool:
    """Tell whether the common multiples of these factors fit llguidance's 32 bits, which it does not check."""
    common = functools.reduce(least_multiple, map(fraction, values), Fraction(1))
    scale: int = 10 ** max(map(decimals, values), default=0)
    return common * scale < (2**32 if len(values) == 1 else 2**16)


def least_multiple(one: Fraction, other: Fraction) -> Fraction:
    """Return the least common multiple of two numbers."""
    return Fraction(math.lcm(one.numerator, other.numerator), math.gcd(one.denominator, other.denominator))
