"""Differences paired over seeds: interval by bootstrap, p by flipping signs, Holm's correction.

Holm, "A simple sequentially rejective multiple test procedure", 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError

RESAMPLES = 10_000
_EXACT_UP_TO = 20  # 2^19 sign patterns; beyond it they are drawn

Floats = npt.NDArray[np.float64]


class Difference(NamedTuple):
    """Mean of ours minus theirs, its 95 % interval, and a two-sided p for a mean of 0."""

    mean: float
    low: float
    high: float
    p: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of each of m tests: the k-th smallest times m - k + 1, never falling, at most 1.

    Rejecting what is below a level keeps the chance of any false rejection below it.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return [float(value) for value in np.minimum(adjusted, 1.0)]


def paired_difference(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Difference:
    """What ours is above theirs, pair by pair.

    ours, theirs: (n,) one value a seed, in equal order. The interval holds the middle 95 % of the
    means of 10,000 resamples of the pairs; with few pairs it is too short, hence p beside it. p is
    the share of all 2^n ways to flip the differences' signs (100,000 drawn ones above 20 pairs)
    whose mean is at least as far from 0, so never below 2^(1 - n). seed: of what is drawn.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise InputError(
            f"paired difference: expected equally many values, at least one, got {len(ours)} and "
            f"{len(theirs)}; remedy: give one of each for every seed"
        )
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    count = len(difference)
    generator = np.random.default_rng(seed)
    means = difference[generator.integers(count, size=(RESAMPLES, count))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    p = _sign_flip_p(difference, generator)
    return Difference(float(difference.mean()), float(low), float(high), p)


def _sign_flip_p(difference: Floats, generator: np.random.Generator) -> float:
    seen = abs(difference.sum())
    slack = 1e-12 * np.abs(difference).sum()  # equal sums differ by their rounding
    if len(difference) > _EXACT_UP_TO:
        signs = generator.choice([-1.0, 1.0], (100_000, len(difference)))
        extreme = int((np.abs(signs @ difference) >= seen - slack).sum())
        return (extreme + 1) / (len(signs) + 1)
    sums = difference[:1]  # the first sign is free: flipping all of them changes no distance
    for value in difference[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return float((np.abs(sums) >= seen - slack).mean())
