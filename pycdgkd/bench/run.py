"""Check, then time: from cases to a record."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from . import layers, memory
from .cases import Case
from .contestants import Contestant
from .inputs import Inputs, Result, exact_result, largest_error, make_inputs
from .lineup import RIVALS, installed_peers, lineup
from .machine import describe
from .probes import probe, software
from .records import OURS, CaseRecord, Entry, Probes, Run
from .timing import Sample, ratios, summarise, time_together

SECONDS = 5.0  # of timing a case
QUICK_SECONDS = 1.5
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}  # relative to the largest value
TOLERANCE_16_BIT = 2e-2


def run(
    cases: Sequence[Case],
    *,
    threads: Sequence[int] = (1,),
    seconds: float = SECONDS,
    compiled: bool = True,
    peaks: bool = True,
    progress: Callable[[CaseRecord], None] = lambda _: None,
) -> Run:
    """Time the cases one after the other; ``progress`` gets each record as it is finished."""
    records: list[CaseRecord] = []
    before = probe()
    for case in cases:
        entries, rounds = _time_case(case, threads, seconds, compiled)
        after = probe()
        if peaks and memory.worth_measuring(case):
            entries = _with_peaks(entries, memory.peak_bytes(case))
        records.append(_record(case, entries, rounds, before.stricter(after)))
        progress(records[-1])
        before = after
    settings = {
        "threads": list(threads),
        "seconds_a_case": seconds,
        "compiled": compiled,
        "packages": installed_peers(),
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Run(describe(), software(), settings, now, records)


def checked(
    case: Case, inputs: Inputs, contestants: Iterable[Contestant]
) -> list[tuple[Contestant, float | str | None]]:
    """Each contestant with its largest error against the reference, or with why it failed.

    A wrong result of ours raises. A bound computes no loss and has no error.
    """
    exact: dict[str, Result] = {}
    found: list[tuple[Contestant, float | str | None]] = []
    for one in contestants:
        if one.layer == "bound":
            found.append((one, None))
            continue
        try:
            result = one.result()
        except Exception as failure:  # of another project: reported in its place in the table
            if one.layer != "peer":
                raise
            found.append((one, f"{type(failure).__name__}: {failure}"[:200]))
            continue
        key = one.value_of or case.op
        if key not in exact:
            exact[key] = exact_result(inputs, key)
        error = largest_error(result, exact[key])
        if one.layer != "peer" and not error <= tolerance(case):
            raise RuntimeError(
                f"{case.name}: {one.name}: wrong result: largest error {error:.1e}, "
                f"at most {tolerance(case):.0e} expected"
            )
        found.append((one, error))
    return found


def _with_neighbour(case: Case, threads: int) -> list[tuple[Contestant, float | str | None]]:
    """Our public function on the neighbour's inputs, checked there."""
    if case.neighbour is None:
        return []
    inputs = make_inputs(case.neighbour)
    ours = dataclasses.replace(
        layers.public(inputs), name="neighbour", layer="neighbour", threads=threads
    )
    return checked(case.neighbour, inputs, [ours])


def tolerance(case: Case) -> float:
    """The largest error with which a contestant is timed."""
    return TOLERANCE.get(case.dtype, TOLERANCE_16_BIT)


def _time_case(
    case: Case, threads: Sequence[int], seconds: float, compiled: bool
) -> tuple[list[Entry], int]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads[0])
    try:
        inputs = make_inputs(case)
        judged = checked(case, inputs, lineup(inputs, threads=threads[0], compiled=compiled))
        judged += _with_neighbour(case, threads[0])
    finally:
        torch.set_num_threads(before)
    right = [one for one, verdict in judged if _may_be_timed(case, verdict)]
    samples = time_together(right, seconds)
    entries = [_entry(one, verdict, samples) for one, verdict in judged]
    if case.bound != "overhead":
        pair = [one for one in right if one.name in (OURS, RIVALS[case.op])]
        for count in threads[1:]:
            entries += _time_more_threads(pair, count, seconds / 2)
    return entries, len(samples[OURS])


def _time_more_threads(pair: Sequence[Contestant], threads: int, seconds: float) -> Iterator[Entry]:
    """Ours and its rival with more threads, in rounds of their own beside themselves with fewer.

    Apart from the other rounds, because idle threads of a pool may spin and disturb what follows.
    """
    more = [
        dataclasses.replace(one, name=f"{one.name} x{threads}", threads=threads) for one in pair
    ]
    samples = time_together([*pair, *more], seconds)
    for one, alone in zip(more, pair, strict=True):
        speedup = ratios(samples, one.name, alone.name)["both"]
        yield dataclasses.replace(_entry(one, None, samples), speedup=speedup)


def _may_be_timed(case: Case, verdict: float | str | None) -> bool:
    return verdict is None or (isinstance(verdict, float) and verdict <= tolerance(case))


def _entry(one: Contestant, verdict: float | str | None, samples: dict[str, list[Sample]]) -> Entry:
    failure = verdict if isinstance(verdict, str) else None
    error = verdict if isinstance(verdict, float) and math.isfinite(verdict) else None
    if one.name not in samples:  # what is wrong or failed is reported, not timed
        return Entry(one.name, one.layer, one.threads, error, {}, {}, failure=failure)
    seconds, ratio = summarise(samples[one.name]), ratios(samples, OURS, one.name)
    return Entry(one.name, one.layer, one.threads, error, seconds, ratio)


def _with_peaks(entries: Sequence[Entry], peaks: dict[str, int]) -> list[Entry]:
    return [dataclasses.replace(entry, peak_bytes=peaks.get(entry.name)) for entry in entries]


def _record(case: Case, entries: list[Entry], rounds: int, probes: Probes) -> CaseRecord:
    sizes = {
        name: getattr(case, name)
        for name in ("rows", "width", "classes", "modalities", "sources", "inactive")
    }
    beside = case.neighbour
    return CaseRecord(
        case.name, case.op, sizes, case.bound, case.bytes, case.exps, rounds, probes, entries,
        None if beside is None else beside.name, None if beside is None else beside.bytes,
    )  # fmt: skip
