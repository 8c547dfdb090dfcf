"""Rates, differences of paired rates, and what chance alone would do."""

from __future__ import annotations

from math import comb
from random import Random

import pytest

from metaalign_edge_preferences.statistics import Difference, difference, mcnemar, rate


def pairs(both: int, first: int, second: int, none: int) -> list[tuple[bool, bool]]:
    return [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * none


def test_a_rate_is_within_its_interval_and_the_interval_within_reason() -> None:
    for n in range(1, 40):
        for successes in range(n + 1):
            one = rate([True] * successes + [False] * (n - successes))
            assert 0 <= one.low <= one.rate + 1e-9 and one.rate - 1e-9 <= one.high <= 1 and one.n == n
    assert str(rate([True, False])).strip() == "50.0 % (9-91)"


@pytest.mark.parametrize("cells, points, low, high", [
    ((36, 12, 2, 0), 20.0, 5.69, 34.04),     # Newcombe 1998, his method 10
    ((1, 1, 7, 12), -28.57, -50.7, -2.6),  # Bentur et al. 2009, as Fagerland, Lydersen and Laake work it out
])  # fmt: skip
def test_the_interval_of_a_paired_difference_is_newcombes(
    cells: tuple[int, int, int, int], points: float, low: float, high: float
) -> None:
    found = difference(pairs(*cells))
    assert (found.points, found.low, found.high) == pytest.approx((points, low, high), abs=0.06)
    assert found.n == sum(cells)


def test_a_difference_turns_its_sign_with_the_models() -> None:
    rng = Random(0)
    for _ in range(300):
        both, first, second, none = (rng.randrange(6) for _ in range(4))
        if both + first + second + none:
            one, other = difference(pairs(both, first, second, none)), difference(pairs(both, second, first, none))
            assert (one.points, one.low, one.high, one.p) == pytest.approx(
                (-other.points, -other.high, -other.low, other.p)
            )
            assert -100 <= one.low <= one.points + 1e-9 and one.points - 1e-9 <= one.high <= 100


def test_equal_and_opposite_models_and_none_at_all() -> None:
    same = difference(pairs(30, 0, 0, 30))
    assert same.points == 0 and same.p == 1 and -5 < same.low < 0 < same.high < 5
    assert difference(pairs(0, 50, 0, 0)).points == 100
    assert difference([]) == Difference(0.0, 0, -100.0, 100.0, 1.0)
    assert str(difference(pairs(36, 12, 2, 0))) == "+20.0 (+5.7 to +34.0)"


def test_the_interval_covers_the_truth_in_ninety_five_of_a_hundred() -> None:
    rng, held, rounds = Random(1), 0, 2000
    for _ in range(rounds):
        drawn = rng.choices(((True, True), (True, False), (False, True), (False, False)), (50, 15, 5, 30), k=40)
        found = difference(drawn)
        held += found.low <= 10 <= found.high
    assert 0.93 <= held / rounds <= 0.97


def test_mcnemars_p_is_that_of_a_coin() -> None:
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(6, 0) == mcnemar(0, 6) == 2 / 64
    assert mcnemar(9, 1) == pytest.approx(2 * (comb(10, 0) + comb(10, 1)) / 2**10)
    assert 0 < mcnemar(3000, 2000) < 1e-40
