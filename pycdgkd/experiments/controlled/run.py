"""The controlled study from the first job to the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pycdgkd
from pycdgkd.errors import InputError
from pycdgkd.files import write_text
from pycdgkd.processes import worker_pool
from pycdgkd.training.config import TrainConfig
from pycdgkd.training.environment import Progress

from .claim import AnyCondition, Claim
from .claims import CLAIMS, CONDITIONS
from .jobs import Job, Journal, OpenLab, run_job
from .lab import FOLDS, drawn_lab
from .page import write_page
from .recordings import claims as recorded
from .recordings.lab import recorded_lab
from .recordings.study import RecordedCondition
from .summary import summarise
from .training import Schedule

RESULTS, JOURNAL, RECORDED_JOURNAL = "controlled.json", "jobs.jsonl", "recorded_jobs.jsonl"


@dataclass(frozen=True)
class Size:
    """How much is run of one kind of study.

    seeds: how many, from 0 on. schedule: how ``open_lab``'s networks are trained. title: for the
    lines of progress.
    """

    name: str
    seeds: int
    conditions: tuple[AnyCondition, ...]
    claims: tuple[Claim, ...] = CLAIMS
    schedule: Any = field(default_factory=Schedule)
    open_lab: OpenLab = drawn_lab
    title: str = "controlled study"

    def jobs(self) -> list[Job]:
        """Seed by seed, so that a run that is stopped has something of every condition."""
        return [
            Job(condition, seed, self.schedule, self._tested(condition), self.open_lab)
            for seed in range(self.seeds)
            for condition in self.conditions
        ]

    def _tested(self, condition: AnyCondition) -> tuple[Claim, ...]:
        return tuple(claim for claim in self.claims if condition.name in claim.conditions)


def recorded_size(
    name: str,
    seeds: int,
    conditions: tuple[RecordedCondition, ...],
    training: TrainConfig = recorded.TRAINING,
) -> Size:
    """A size of the study on recordings."""
    return Size(
        *(name, seeds, conditions, recorded.CLAIMS, training, recorded_lab, "recorded study")
    )


_QUICK = ("usual study", "clean labels", "video stronger", "wide features")
# Features and recordings.
SIZES = {
    "full": (Size("full", 20, CONDITIONS), recorded_size("full", 10, recorded.CONDITIONS)),
    "quick": (
        Size("quick", 3, tuple(c for c in CONDITIONS if c.name in _QUICK)),
        recorded_size("quick", 1, recorded.QUICK_CONDITIONS, recorded.QUICK_TRAINING),
    ),
}


def run_controlled(out: Path, size: str = "full", jobs: int = 1, progress: Progress = None) -> Path:
    """Run the study into ``out`` and write controlled.json and its page; returns the page's path.

    size: "full" or "quick". jobs: processes of one thread each; the numbers do not depend on how
    many. Jobs that ``out`` holds already are not run again. More than one process is only for
    programs guarded by ``if __name__ == "__main__"``, as Python's spawn wants it. ``InputError``
    for unknown sizes and for a folder with jobs of other settings or versions.
    """
    if size not in SIZES:
        raise InputError(f"size: expected one of {', '.join(SIZES)}, got '{size}'")
    features, recordings = SIZES[size]
    return run_size(out, features, jobs, progress, recordings)


def run_size(
    out: Path,
    size: Size,
    jobs: int = 1,
    progress: Progress = None,
    recordings: Size | None = None,
) -> Path:
    """``run_controlled`` for sizes of one's own; without a second part where that is None.

    Each kind of study has its own journal, so that a change of one leaves the other's jobs alone.
    """
    if jobs < 1:
        raise InputError(f"jobs: expected at least 1, got {jobs}; remedy: --jobs 1")
    out.mkdir(parents=True, exist_ok=True)
    results = finish_jobs(out / JOURNAL, size, jobs, progress)
    if recordings is not None:
        recorded_jobs = out / RECORDED_JOURNAL
        results["recordings"] = finish_jobs(recorded_jobs, recordings, jobs, progress)
    write_text(out / RESULTS, json.dumps(results, indent=1) + "\n")
    return write_page(out, results)


def finish_jobs(path: Path, size: Size, jobs: int = 1, progress: Progress = None) -> dict[str, Any]:
    """Run the jobs that the journal at ``path`` lacks; the results of all of them."""
    settings = _settings(size)
    journal = Journal(path, settings)
    every = size.jobs()
    left = [job for job in every if job.key not in journal.done]
    for entry in _run(left, jobs):
        journal.add(entry)
        if progress is not None:
            progress(
                f"{size.title} {len(journal.done)}/{len(every)}  {entry['condition']}, seed "
                f"{entry['seed']}  {entry['trainings']} networks in {entry['seconds']:.0f} s"
            )
    names = [condition.name for condition in size.conditions]
    networks = sum(journal.done[job.key]["trainings"] for job in every)
    return {
        **settings,
        "networks": networks,
        **summarise(size.claims, names, range(size.seeds), journal.done),
    }


def _settings(size: Size) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "size": size.name,
        "seeds": list(range(size.seeds)),
        "pycdgkd": pycdgkd.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "schedule": asdict(size.schedule),
        "folds": FOLDS,
        "conditions": [asdict(condition) for condition in size.conditions],
        "tested": {claim.key: [arm.name for arm in claim.arms] for claim in size.claims},
    }


def _run(work: Sequence[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Results of jobs as they finish; the first error ends them all."""
    if processes == 1 or len(work) <= 1:
        yield from map(run_job, work)
        return
    with worker_pool(min(processes, len(work))) as pool:
        for future in as_completed([pool.submit(run_job, job) for job in work]):
            yield future.result()
