"""The losses on a GPU beside their peers: eager wall, CUDA-graph replay and kernel time apart.

    python benchmarks/gpu.py [--seconds 1] [--out benchmarks/results]

All contestants of a case take turns in random order. A sample lies between two CUDA events: eager
steps (forward and gradients) follow one another as those of a training do, after one that is not
counted; graphs hold several steps, unless these would find their inputs in the L2 cache where
bandwidth counts: then one, after the cache was overwritten. The floor is the least bytes of the
case over the bandwidth of a large copy, measured here. Writes <gpu name>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_peers import liger
from torch import Tensor

from pycdgkd.bench import layers, lineup
from pycdgkd.bench.cases import Case
from pycdgkd.bench.contestants import Contestant, differentiable
from pycdgkd.bench.inputs import Inputs, exact_result, largest_error, make_inputs
from pycdgkd.bench.records import OURS

Step = Callable[[], object]
DEVICE = "cuda"
MIB = 2**20
COPY_BYTES = 512 * MIB
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs", "reduce-overhead")
CHECKED = 2**27  # elements up to which the whole result is compared, beyond them SAMPLED rows
SAMPLED = 64
SAMPLE_SECONDS, MOST_CALLS = 3e-3, 20  # of eager steps in a row
GRAPH_STEPS = 10  # of a graph, so that starting it does not count
EVICTS = 128 * MIB  # of inputs, after which the L2 cache holds nothing of the step before


class Goal(NamedTuple):
    """Measure: a peer's eager (or graph) time over ours, share of the bandwidth, us, or a count."""

    measure: str  # "eager", "graph", "bandwidth", "graph us", "case" or "launches"
    peer: str
    target: float


def _case(op: str, goals: list[Goal], **sizes: Any) -> tuple[Case, list[Goal]]:
    return Case(op, **sizes), goals


def _wide(dtype: str) -> tuple[Case, list[Goal]]:
    goals = [Goal("bandwidth", "", 0.85), Goal("eager", "addmm", 2.0), Goal("eager", "lce", 1.5),
             Goal("eager", "Liger", 1.5)]  # fmt: skip
    return _case("prototype_loss", goals, rows=65536, classes=2, width=1024, dtype=dtype,
                 skipped=("literal",))  # fmt: skip


def _vocabulary(classes: int, dtype: str) -> tuple[Case, list[Goal]]:
    goals = [Goal("bandwidth", "", 0.8), Goal("eager", "D1", 10.0),
             Goal("eager", "D1 default", 2.0), Goal("eager", "Liger", 2.5)]  # fmt: skip
    return _case("distillation_loss", goals, rows=8192, classes=classes, sources=3, dtype=dtype,
                 skipped=("D3", "D4"), compiled=("D1",))  # fmt: skip


SMALL = [Goal("launches", "", 3), Goal("eager", "T4", 8.0), Goal("eager", "T1", 12.0),
         Goal("graph us", "", 12.0), Goal("eager", "T4 default", 4.0),
         Goal("graph", "T4 default", 1.5)]  # fmt: skip
CASES: list[tuple[Case, list[Goal]]] = [
    _case("teacher_loss", SMALL, rows=128, classes=2, width=512, modalities=2, compiled=("T4",)),
    _case("teacher_loss", SMALL[:4], rows=128, classes=2, width=768, modalities=2),
    _wide("float32"),
    _wide("bfloat16"),
    _case("teacher_loss", [Goal("bandwidth", "", 0.8), Goal("eager", "T4", 1.5)],
          rows=65536, classes=2, width=1024, modalities=2, skipped=("T1", "T2")),
    _case("prototype_loss", [Goal("eager", "lce", 0.95)], rows=16384, classes=1000, width=512,
          skipped=("literal", "cdist")),
    _case("prototype_loss", [Goal("eager", "lce", 0.95)], rows=16384, classes=32768, width=512,
          skipped=("literal", "cdist", "addmm")),
    _case("distillation_loss", [Goal("launches", "", 2), Goal("eager", "D1", 10.0),
          Goal("eager", "D3", 6.0), Goal("eager", "D1 default", 3.0)],
          rows=128, classes=2, sources=3, compiled=("D1",)),
    _case("distillation_loss", [Goal("eager", "D1", 10.0), Goal("eager", "D1 default", 2.0)],
          rows=4096, classes=1000, sources=3, compiled=("D1",)),
    _case("distillation_loss", [Goal("eager", "D1", 10.0), Goal("eager", "D1 default", 2.0)],
          rows=65536, classes=7, sources=3, compiled=("D1",)),
    *(_vocabulary(32000, dtype) for dtype in ("bfloat16", "float32")),
    _case("distillation_loss", [], rows=8192, classes=32000, sources=4, dtype="bfloat16",
          skipped=("D1", "D3", "D4")),
    _case("distillation_loss", [Goal("case", "distillation_loss/N8192-K32000-S4-bfloat16", 1.1)],
          rows=8192, classes=32000, sources=8, inactive=4, dtype="bfloat16",
          skipped=("D1", "D3", "D4")),
    *(_vocabulary(128256, dtype) for dtype in ("bfloat16", "float32")),
]  # fmt: skip


def step_of(one: Contestant) -> Step:
    """Forward and gradients."""

    def step() -> Any:
        state = one.forward()
        return state, None if one.backward is None else one.backward(state)

    return step


def contestants(inputs: Inputs, modes: tuple[str, ...]) -> dict[str, Step]:
    """Ours, eager peers, Liger-Kernel's, and compiled ones by mode."""
    found = {OURS: step_of(layers.public(inputs))}
    found |= {peer.name: step_of(peer) for peer in (*lineup.peers_of(inputs), *liger(inputs))}
    for mode in modes if inputs.case.compiled else ():
        for peer in lineup.compiled_peers(inputs, mode=mode):
            found[peer.name.replace("compile", mode)] = step_of(peer)
    return found


def usable(steps: dict[str, Step]) -> dict[str, Step]:
    """Those whose first steps (one compiles) succeed; a peer that fails must not hide ours."""
    found = {}
    for name, step in steps.items():
        try:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
        except Exception as error:
            if name == OURS:
                raise
            print(f"  {name} takes no part: {type(error).__name__}: {str(error)[:200]}")
            continue
        found[name] = step
    return found


def smallest_step(inputs: Inputs) -> Step:
    """What autograd costs whoever writes a backward pass: a Function with the case's gradients."""
    value, *grads = [torch.zeros_like(t) for t in (inputs.grad_output, *inputs.leaves)]

    class Idle(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, *_: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(_ctx: Any, *_: Any) -> Any:
            return tuple(grads)

    return step_of(differentiable("autograd", lambda: Idle.apply(*inputs.leaves), inputs))


def with_new_leaves(inputs: Inputs) -> Inputs:
    """The same numbers to be captured. The old leaves' nodes may be kept alive by a peer, as
    compiled ones do, and belong to the stream of its calls: that ends a capture on another.
    """

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return replace(inputs, logits=leaf(inputs.logits), features=[leaf(z) for z in inputs.features])


class Sampled(NamedTuple):
    """What a sample consists of: calls that follow one another, each of one step or more."""

    call: Step
    calls: int = 1
    steps: int = 1


def events(one: Sampled, flush: Tensor | None = None) -> float:
    """Seconds of a step on the device's clock.

    Where calls follow one another, one before them finds the interpreter's caches as a peer left
    them and the device idle; it is not counted.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush is not None:
        flush.zero_()
    if one.calls > 1:
        one.call()
    start.record()
    for _ in range(one.calls):
        one.call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / (one.calls * one.steps)


def in_a_row(step: Step) -> Sampled:
    """As many steps as take SAMPLE_SECONDS, within limits: two at least, that they follow."""
    fastest = min(events(Sampled(step)) for _ in range(3))
    return Sampled(step, calls=max(2, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / fastest))))


def interleaved(
    contestants: dict[str, Sampled], seconds: float, flush: Tensor | None
) -> dict[str, Any]:
    """Median, p10 and p90 of each, and the median ratio to ours within a round."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order, until = list(contestants), time.monotonic() + seconds
    while time.monotonic() < until or len(samples[OURS]) < 10:
        random.shuffle(order)
        for name in order:
            samples[name].append(events(contestants[name], flush))
    report = {}
    for name, values in samples.items():
        cuts = statistics.quantiles(values, n=10)
        ratios = [v / o for v, o in zip(values, samples[OURS], strict=True)]
        report[name] = {"seconds": statistics.median(values), "p10": cuts[0], "p90": cuts[-1],
                        "ratio": statistics.median(ratios), "rounds": len(values)}  # fmt: skip
    return report


def replayed(step: Step, steps: int) -> Sampled | str:
    """The replay of so many steps as one CUDA graph, or why they cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            for _ in range(steps):
                step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return str(error)
    return Sampled(graph.replay, steps=steps)


def kernels(step: Step) -> dict[str, float]:
    """Launches of a step and the time of its kernels, from the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    found = [event for event in profile.events() if event.device_type == device]
    total = sum(event.time_range.elapsed_us() for event in found)
    return {"launches": len(found) / 10, "seconds": total / 1e7}


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device-to-device copy."""
    source = torch.randn(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    times = [events(Sampled(lambda: target.copy_(source))) for _ in range(20)]
    return 2 * COPY_BYTES / statistics.median(times[5:])


def error_of_ours(inputs: Inputs) -> float:
    """Against float64; where that takes too much memory, the gradients of the last rows alone."""
    case, found = inputs.case, layers.public(inputs).result()
    if case.elements * max(1, case.sources) <= CHECKED:
        return largest_error(found, exact_result(inputs, case.op))
    rows = slice(-SAMPLED, None)
    sample = replace(
        inputs,
        labels=inputs.labels[rows],
        logits=inputs.logits.detach()[rows].requires_grad_(),
        sources=[source[rows] for source in inputs.sources],
    )
    value, grads = exact_result(sample, case.op)
    share = SAMPLED / case.rows  # the loss is a mean over the rows
    exact = [None if grad is None else grad * share for grad in grads]
    return largest_error((value, [g if g is None else g[rows] for g in found[1]]), (value, exact))


def measure(case: Case, bandwidth: float, seconds: float, flush: Tensor | None) -> dict[str, Any]:
    """One case: is ours right, then everything timed."""
    inputs = make_inputs(case, DEVICE)
    error = error_of_ours(inputs)
    if error > TOLERANCE[case.dtype]:
        raise AssertionError(f"{case.name}: ours is wrong by {error:.1e}")
    cold = case.input_bytes > 8 * MIB
    # Where overhead counts all modes are tried; on large inputs they differ little.
    modes = COMPILE_MODES[:1] if cold else COMPILE_MODES
    steps = usable(contestants(inputs, modes))
    timed = steps if cold else {**steps, "autograd": smallest_step(inputs)}
    eager = interleaved({name: in_a_row(step) for name, step in timed.items()}, seconds, None)
    flush = flush if cold and case.input_bytes < EVICTS else None
    # A captured step keeps its memory: of large inputs only ours.
    small = case.input_bytes <= 1024 * MIB
    captured = {
        name: replayed(step, GRAPH_STEPS if flush is None else 1)
        for name, step in contestants(with_new_leaves(inputs), modes[:1]).items()
        if name == OURS or (small and name in steps)
    }
    graphs = {name: graph for name, graph in captured.items() if isinstance(graph, Sampled)}
    refused = {name: reason for name, reason in captured.items() if isinstance(reason, str)}
    graph = interleaved(graphs, seconds / 2, flush) if OURS in graphs else {}
    return {"case": case.name, "error": error, "floor": case.bytes / bandwidth, "eager": eager,
            "graph": graph, "refused": refused, "kernels": kernels(steps[OURS])}  # fmt: skip


def judged(result: dict[str, Any], goals: list[Goal], others: dict[str, Any]) -> list[str]:
    """A line a goal: met, missed and by how much, or not measured."""
    lines = []
    for goal in goals:
        value = figure(result, goal, others)
        words = f"{goal.measure} {goal.peer}".strip()
        if value is None:
            lines.append(f"  {words}: not measured")
            continue
        at_most = goal.measure in ("graph us", "case", "launches")
        met = value <= goal.target if at_most else value >= goal.target
        sign = "<=" if at_most else ">="
        verdict = "met" if met else "MISSED"
        lines.append(f"  {words}: {value:.2f}, goal {sign} {goal.target:g}: {verdict}")
    return lines


def figure(result: dict[str, Any], goal: Goal, others: dict[str, Any]) -> float | None:
    """What a goal is held against."""
    own = result["graph"].get(OURS) or result["eager"][OURS]
    if goal.measure == "launches":
        return float(result["kernels"]["launches"])
    if goal.measure == "bandwidth":
        return float(result["floor"] / own["seconds"])
    if goal.measure == "graph us":
        return None if not result["graph"] else float(own["seconds"] * 1e6)
    if goal.measure == "case":
        other = others.get(goal.peer)
        own_seconds = result["eager"][OURS]["seconds"]
        return None if other is None else float(own_seconds / other["eager"][OURS]["seconds"])
    entry = result[goal.measure].get(goal.peer)
    return None if entry is None else float(entry["ratio"])


def versions() -> dict[str, str]:
    """Of what takes part."""
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for package in ("pycdgkd", "liger-kernel", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> int:
    """Measure every case, print the goals, write the file; 1 if a case could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a case's eager rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing was measured")
        return 1
    # No default device: it would cost every call of torch, whoever makes it, tens of microseconds.
    flush, bandwidth = torch.empty(256 * MIB, dtype=torch.uint8, device=DEVICE), copy_bandwidth()
    print(f"{versions()}, copy {bandwidth / 1e12:.2f} TB/s")
    results: dict[str, Any] = {}
    failed: list[str] = []
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    record = {"versions": versions(), "copy": bandwidth, "cases": results, "failed": failed}
    path = options.out / f"{name}.json"
    for case, goals in CASES:
        try:
            results[case.name] = measure(case, bandwidth, options.seconds, flush)
        except Exception as error:  # one case must not hide the others
            failed.append(f"{case.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            print(failed[-1])
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        result = results[case.name]
        own, launched = result["eager"][OURS]["seconds"], result["kernels"]
        print(f"{case.name}: {own * 1e6:.1f} us eager, floor {result['floor'] * 1e6:.1f} us,")
        print(f"  {launched['launches']:g} launches of {launched['seconds'] * 1e6:.1f} us")
        print("  " + ", ".join(f"{n} {e['ratio']:.2f}x" for n, e in result["eager"].items()))
        for refusing, why in result["refused"].items():
            print(f"  no graph of {refusing}: {why[:300]}")
        result["goals"] = judged(result, goals, results)
        print("\n".join(result["goals"]), flush=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
