"""The three layers of one op under pytest-benchmark, on the cases of ``pycdgkd.bench``.

With ``--benchmark-disable`` every case runs once in a small size: a check, not a measurement.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pycdgkd.bench import layers
from pycdgkd.bench.cases import Case, select
from pycdgkd.bench.contestants import Contestant
from pycdgkd.bench.inputs import Inputs, make_inputs
from pycdgkd.bench.run import checked
from pycdgkd.bench.timing import PHASES

LAYERS = {"kernel": layers.kernel, "op": layers.op, "public": layers.public}
SECONDS, FEWEST, MOST = 0.5, 5, 200  # of one measurement; bounds of its rounds


def every_layer(op: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Each case of the op, each layer that has it, forward, backward and both."""
    points = [
        pytest.param(case, layer, phase, id=f"{case.name.partition('/')[2]}-{layer}-{phase}")
        for case in select(op=op)
        for layer in LAYERS
        for phase in (PHASES if op != "convergence_rates" else PHASES[:1])
        if not (layer == "kernel" and case.dtype == "bfloat16")  # NumPy has no such type
    ]
    return pytest.mark.parametrize(("case", "layer", "phase"), points)


@functools.lru_cache(maxsize=1)
def prepared(case: Case) -> tuple[Inputs, dict[str, Contestant]]:
    """Inputs and the layers on them, each checked against the reference."""
    inputs = make_inputs(case)
    found = {name: make(inputs) for name, make in LAYERS.items()}
    contestants = {name: one for name, one in found.items() if one is not None}
    checked(case, inputs, contestants.values())
    return inputs, contestants


def time_layer(benchmark: BenchmarkFixture, case: Case, layer: str, phase: str) -> None:
    """Check and time one phase of one layer on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _, contestants = prepared(case.shrunk() if benchmark.disabled else case)
        benchmark.group = f"{case.name} {phase}"
        one = contestants[layer]
        with one.context():
            _measure(benchmark, one, phase)
    finally:
        torch.set_num_threads(threads)


def _measure(benchmark: BenchmarkFixture, one: Contestant, phase: str) -> None:
    backward = one.backward
    if phase == "forward" or backward is None:
        rounds, steps = _rounds(one.forward)
        benchmark.pedantic(one.forward, rounds=rounds, iterations=steps, warmup_rounds=2)
    elif phase == "both":
        rounds, steps = _rounds(lambda: backward(one.forward()))
        benchmark.pedantic(
            lambda: backward(one.forward()), rounds=rounds, iterations=steps, warmup_rounds=2
        )
    else:  # each backward consumes a forward of its own
        rounds, _ = _rounds(lambda: backward(one.forward()))
        benchmark.pedantic(
            backward, setup=lambda: ((one.forward(),), {}), rounds=rounds, warmup_rounds=2
        )


def _rounds(call: Callable[[], object]) -> tuple[int, int]:
    """(rounds, calls a round): a round takes at least a millisecond."""
    call()
    start = time.perf_counter()
    call()
    seconds = max(time.perf_counter() - start, 1e-6)
    steps = max(1, round(1e-3 / seconds))
    return max(FEWEST, min(MOST, round(SECONDS / (seconds * steps)))), steps
