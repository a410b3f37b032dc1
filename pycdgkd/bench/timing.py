"""Interleaved timing: all contestants in every round, in random order, so that noise hits all.

One sample is a number of whole steps (forward, then backward, then the results freed), long enough
for the clock; forward and backward are clocked within the same steps. Ratios are formed within a
round, between samples that lie milliseconds apart, and only then summarised.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from .contestants import Contestant
from .records import Spread

PHASES = ("forward", "backward", "both")
SAMPLE_SECONDS = 0.002
MOST_STEPS = 500
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200
SLOW_ROUNDS = 3  # enough where they take four times the budget

Sample = dict[str, float]  # seconds of a step, by phase


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> Spread:
    """Summary of one figure over the rounds."""
    return Spread(quantile(values, 0.5), quantile(values, 0.1), quantile(values, 0.9))


def _sample(one: Contestant, steps: int, clock: Callable[[], float] = time.perf_counter) -> Sample:
    forward, backward = one.forward, one.backward
    ahead = back = 0.0
    with one.context():
        for _ in range(steps):
            start = clock()
            state = forward()
            middle = clock()
            if backward is not None:
                backward(state)
            del state  # freeing counts: a training step does it too
            end = clock()
            ahead += middle - start
            back += end - middle
    phases = {"forward": ahead / steps, "both": (ahead + back) / steps}
    return phases if backward is None else {**phases, "backward": back / steps}


def _steps(one: Contestant) -> int:
    """How many steps make a sample: by the fastest of three trial steps, or one if it is slow."""
    torch.set_num_threads(one.threads)
    seconds = _sample(one, 1)["both"]
    if seconds < 20 * SAMPLE_SECONDS:
        seconds = min(_sample(one, 1)["both"] for _ in range(2))
    return max(1, min(MOST_STEPS, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))


def time_together(
    contestants: Sequence[Contestant], budget: float, *, seed: int = 0
) -> dict[str, list[Sample]]:
    """Samples of every contestant, round by round, for about ``budget`` seconds."""
    order = random.Random(seed)
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    samples: dict[str, list[Sample]] = {one.name: [] for one in contestants}
    gc.collect()
    gc.disable()
    try:
        steps = {one.name: _steps(one) for one in contestants}
        start = time.perf_counter()
        for done in range(MOST_ROUNDS):
            elapsed = time.perf_counter() - start
            if (
                done >= (SLOW_ROUNDS if elapsed > 4 * budget else FEWEST_ROUNDS)
                and elapsed > budget
            ):
                break
            for one in order.sample(list(contestants), len(contestants)):
                torch.set_num_threads(one.threads)
                if steps[one.name] > 1:
                    _sample(one, 1)  # what the contestant before pushed out of the caches
                samples[one.name].append(_sample(one, steps[one.name]))
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
    return samples


def summarise(samples: Sequence[Sample]) -> dict[str, Spread]:
    """Spread of each phase."""
    phases = [phase for phase in PHASES if phase in samples[0]]
    return {phase: spread([sample[phase] for sample in samples]) for phase in phases}


def ratios(samples: Mapping[str, Sequence[Sample]], ours: str, other: str) -> dict[str, Spread]:
    """How many times longer the other takes than we do, round by round, by phase."""
    pairs = list(zip(samples[ours], samples[other], strict=True))
    phases = [phase for phase in PHASES if all(phase in s for pair in pairs for s in pair)]
    return {
        phase: spread([theirs[phase] / mine[phase] for mine, theirs in pairs]) for phase in phases
    }
