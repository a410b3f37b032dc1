"""Holm's correction, the exact permutation test and the paired interval, against known values."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from pycdgkd.errors import InputError
from pycdgkd.experiments.statistics import holm, paired_difference


def test_holm_gives_the_textbook_values() -> None:
    # 4, 3, 2 and 1 times the sorted values, never falling: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_1_and_takes_no_test() -> None:
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni() -> None:
    p = np.random.default_rng(0).random(30) ** 3
    adjusted = np.array(holm(list(p)))
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, 30 * p) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_p_counts_every_flip_of_signs() -> None:
    difference = [0.3, -0.1, 0.25, 0.05, 0.0, 0.4]
    sums = [abs(np.dot(signs, difference)) for signs in product([-1, 1], repeat=6)]
    expected = np.mean([value >= sum(difference) - 1e-12 for value in sums])
    assert paired_difference(difference, [0.0] * 6).p == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 3, 10, 20])
def test_the_smallest_p_is_two_to_one_minus_n(count: int) -> None:
    ours = [1.0 + i / 7 for i in range(count)]
    assert paired_difference(ours, [0.0] * count).p == 2.0 ** (1 - count)


def test_rounding_does_not_part_equal_sums() -> None:
    """0.1 + 0.2 is above 0.3: all eight patterns but two are as extreme, whatever the rounding."""
    assert paired_difference([0.1, 0.2, -0.3], [0.0] * 3).p == 1.0
    assert paired_difference([0.1] * 10, [0.0] * 10).p == 2.0**-9


def test_many_pairs_are_drawn_and_agree_with_the_normal_law() -> None:
    difference = np.random.default_rng(1).standard_normal(200) + 0.14
    z = abs(difference.sum()) / np.sqrt((difference**2).sum())
    found = paired_difference(list(difference), [0.0] * 200)
    assert found.p == pytest.approx(2 * (1 - _normal(z)), abs=0.01)
    assert found == paired_difference(list(difference), [0.0] * 200)


def _normal(z: float) -> float:
    grid = np.linspace(-8, z, 20001)
    return float(np.trapezoid(np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), grid))


def test_the_interval_is_that_of_the_mean() -> None:
    difference = np.random.default_rng(2).standard_normal(100) * 0.02 + 0.01
    theirs = np.random.default_rng(3).random(100)
    found = paired_difference(list(theirs + difference), list(theirs))
    reach = 1.96 * difference.std() / 10
    assert found.mean == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - reach, abs=0.1 * reach)
    assert found.high == pytest.approx(difference.mean() + reach, abs=0.1 * reach)


def test_equal_values_show_nothing() -> None:
    assert paired_difference([0.7, 0.8], [0.7, 0.8]) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("pair", [([0.1], [0.1, 0.2]), ([], [])])
def test_unpaired_values_are_refused(pair: tuple[list[float], list[float]]) -> None:
    with pytest.raises(InputError, match="expected equally many values"):
        paired_difference(*pair)
