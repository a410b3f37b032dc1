"""The goals: which ratio each case must reach, and whether a run reached it (standard library)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .records import OURS, CaseRecord, Run, Spread

Measure = Literal["ratio", "copy", "memory", "neighbour", "threads"]


@dataclass(frozen=True)
class Goal:
    """Of every case that matches: at least (for a neighbour, at most) the target."""

    cases: str
    measure: Measure
    peer: str
    target: float

    @property
    def at_most(self) -> bool:
        """Whether smaller is better."""
        return self.measure == "neighbour"

    @property
    def words(self) -> str:
        """The goal in a few words."""
        return {
            "ratio": f">= {self.target:g}x {self.peer}",
            "copy": f">= {self.target:.0%} of copy bandwidth",
            "memory": f"less peak memory than {self.peer}",
            "neighbour": f"<= {self.target:g}x the neighbour's cost",
            "threads": f">= {self.target:g}x with {self.peer} threads",
        }[self.measure]

    def measured(self, case: CaseRecord) -> Spread | None:
        """The figure to hold against the target, or None where it was not measured."""
        return _MEASURED[self.measure](case, self.peer)

    def met(self, value: float) -> bool:
        """Whether the median reaches the target."""
        if self.measure == "memory":
            return value > self.target
        return value <= self.target if self.at_most else value >= self.target


def _both(case: CaseRecord, name: str) -> Spread | None:
    entry = case.entry(name)
    return None if entry is None else entry.ratio["both"]


def _copy(case: CaseRecord, _: str) -> Spread | None:
    entry = case.entry(OURS)
    if entry is None:
        return None
    seconds, rate = entry.seconds["both"], case.bytes / case.probes.copy
    return Spread(rate / seconds.median, rate / seconds.p90, rate / seconds.p10)


def _memory(case: CaseRecord, peer: str) -> Spread | None:
    ours, other = case.entry(OURS), case.entry(peer)
    if ours is None or other is None or ours.peak_bytes is None or other.peak_bytes is None:
        return None
    ratio = other.peak_bytes / max(ours.peak_bytes, 1)
    return Spread(ratio, ratio, ratio)


def _neighbour(case: CaseRecord, _: str) -> Spread | None:
    """Our cost a byte of the least traffic over the neighbour's."""
    beside = _both(case, "neighbour")
    if beside is None or case.neighbour_bytes is None:
        return None
    share = case.neighbour_bytes / case.bytes
    return Spread(share / beside.median, share / beside.p90, share / beside.p10)


def _threads(case: CaseRecord, threads: str) -> Spread | None:
    more = case.entry(f"{OURS} x{threads}")
    return None if more is None else more.speedup


_MEASURED = {
    "ratio": _both,
    "copy": _copy,
    "memory": _memory,
    "neighbour": _neighbour,
    "threads": _threads,
}

_LARGE = ("prototype_loss/N16384-D1024-K2", "prototype_loss/N65536-D1024-K2")
_MANY = ("prototype_loss/*-K1000", "prototype_loss/*-K32768")
GOALS: tuple[Goal, ...] = (
    Goal("teacher_loss/N128-D512-K2", "ratio", "T4", 6),
    Goal("teacher_loss/N128-D512-K2", "ratio", "T1", 10),
    Goal("teacher_loss/N128-D512-K2", "ratio", "T4 compile", 3.5),
    Goal("teacher_loss/N16384-D1024-K2", "ratio", "T4", 8),
    Goal("teacher_loss/N65536-D1024-K2", "ratio", "T4", 8),
    *(Goal(name, "ratio", "addmm", 8) for name in _LARGE),
    *(Goal(name, "ratio", "lce", 4) for name in _LARGE),
    *(Goal(name, "copy", "", 0.7) for name in _LARGE),
    Goal("prototype_loss/N16384-D1024-K10", "ratio", "lce", 2),
    *(Goal(name, "ratio", peer, 0.95) for name in _MANY for peer in ("lce", "lce auto")),
    *(Goal(name, "memory", peer, 1) for name in _MANY for peer in ("lce", "lce auto")),
    Goal("distillation_loss/N128-K2-S3", "ratio", "D1", 5),
    Goal("distillation_loss/N128-K2-S3", "ratio", "D1 compile", 2.5),
    Goal("distillation_loss/N65536-K2-S3", "ratio", "D1", 10),
    Goal("distillation_loss/N65536-K7-S3", "ratio", "D1", 10),
    Goal("distillation_loss/N4096-K1000-S3", "ratio", "D1", 6),
    Goal("distillation_loss/N4096-K1000-S3", "ratio", "D3", 10),
    Goal("distillation_loss/N*-K32000-S3", "ratio", "D1", 5),
    Goal("distillation_loss/*-S8-4off", "neighbour", "S4", 1.1),
    Goal("*-unaligned", "neighbour", "", 1.3),
    Goal("*-strided", "neighbour", "", 1.3),
    Goal("*/N33-*", "neighbour", "", 1.3),
    Goal("*/N1000-*", "neighbour", "", 1.3),
    Goal("*", "threads", "2", 1.6),
)


def judged(run: Run) -> Iterator[tuple[Goal, CaseRecord, Spread | None]]:
    """Every goal of the cases that were run, with its figure or None if that was not measured.

    Where dispatch is all, more threads are not timed: that goal is left out.
    """
    for goal in GOALS:
        for case in run.cases:
            if fnmatch.fnmatchcase(case.name, goal.cases):
                value = goal.measured(case)
                if value is not None or goal.measure != "threads":
                    yield goal, case, value
