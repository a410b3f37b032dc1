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
from pycdgkd.training.environment import Progress

from .claim import Claim
from .claims import CLAIMS, CONDITIONS
from .jobs import Job, Journal, run_job
from .lab import FOLDS
from .page import write_page
from .study import Condition
from .summary import summarise
from .training import Schedule

RESULTS, JOURNAL = "controlled.json", "jobs.jsonl"


@dataclass(frozen=True)
class Size:
    """How much is run. seeds: how many, from 0 on."""

    name: str
    seeds: int
    conditions: tuple[Condition, ...]
    claims: tuple[Claim, ...] = CLAIMS
    schedule: Schedule = field(default_factory=Schedule)

    def jobs(self) -> list[Job]:
        """Seed by seed, so that a run that is stopped has something of every condition."""
        return [
            Job(condition, seed, self.schedule, self._tested(condition))
            for seed in range(self.seeds)
            for condition in self.conditions
        ]

    def _tested(self, condition: Condition) -> tuple[Claim, ...]:
        return tuple(claim for claim in self.claims if condition.name in claim.conditions)


_QUICK = ("usual study", "clean labels", "video stronger", "wide features")
SIZES = {
    "full": Size("full", 20, CONDITIONS),
    "quick": Size("quick", 3, tuple(c for c in CONDITIONS if c.name in _QUICK)),
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
    return run_size(out, SIZES[size], jobs, progress)


def run_size(out: Path, size: Size, jobs: int = 1, progress: Progress = None) -> Path:
    """``run_controlled`` for a size of one's own."""
    if jobs < 1:
        raise InputError(f"jobs: expected at least 1, got {jobs}; remedy: --jobs 1")
    out.mkdir(parents=True, exist_ok=True)
    settings = _settings(size)
    journal = Journal(out / JOURNAL, settings)
    every = size.jobs()
    left = [job for job in every if job.key not in journal.done]
    for entry in _run(left, jobs):
        journal.add(entry)
        if progress is not None:
            progress(
                f"controlled study {len(journal.done)}/{len(every)}  {entry['condition']}, seed "
                f"{entry['seed']}  {entry['trainings']} networks in {entry['seconds']:.0f} s"
            )
    names = [condition.name for condition in size.conditions]
    networks = sum(journal.done[job.key]["trainings"] for job in every)
    results = {
        **settings,
        "networks": networks,
        **summarise(size.claims, names, range(size.seeds), journal.done),
    }
    write_text(out / RESULTS, json.dumps(results, indent=1) + "\n")
    return write_page(out, results)


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
