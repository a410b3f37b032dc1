"""One job: all networks of one condition and seed. And the journal of finished jobs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from pycdgkd.errors import InputError
from pycdgkd.training.config import TrainConfig
from pycdgkd.training.environment import reproducible

from .claim import AnyCondition, AnyLab, Claim
from .claims import DENSE, VIDEO

# From a condition, a seed and the schedule of its kind to a lab, and back to an empty disk.
OpenLab: TypeAlias = Callable[[Any, int, Any], AbstractContextManager[AnyLab]]


@dataclass(frozen=True)
class Job:
    """A condition and a seed; claims: those tested under it, in the lab that ``open_lab`` opens."""

    condition: AnyCondition
    seed: int
    schedule: Any
    claims: tuple[Claim, ...]
    open_lab: OpenLab

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from the other jobs of a run."""
        return self.condition.name, self.seed


def run_job(job: Job) -> dict[str, Any]:
    """Numbers of every arm; equal on every machine of one kind, whatever else runs."""
    started = time.monotonic()
    with (
        reproducible(TrainConfig(threads=1), torch.device("cpu")),
        job.open_lab(job.condition, job.seed, job.schedule) as lab,
    ):
        values = {
            claim.key: {arm.name: claim.measure(lab, arm) for arm in claim.arms}
            for claim in job.claims
        }
        ground = _ground(lab)
    return {
        "condition": job.condition.name,
        "seed": job.seed,
        "ground": ground,
        "values": values,
        "trainings": lab.trainings,
        "seconds": round(time.monotonic() - started, 2),
    }


def _ground(lab: AnyLab) -> dict[str, float]:
    """How hard the study is: what its law allows, and what the networks of the chain reach."""
    networks = dict(zip(("teacher", "assistant 1", "assistant 2"), DENSE, strict=True))
    return {
        **lab.ground(),
        **{name: lab.measure(recipe)["accuracy"] for name, recipe in networks.items()},
        "student alone": lab.measure(VIDEO)["accuracy"],
    }


class Journal:
    """Finished jobs, one JSON line each, after a line that says what they are jobs of.

    Opening one drops a line that a killed process left unfinished; a journal of other settings or
    versions is refused.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.done: dict[tuple[str, int], dict[str, Any]] = {}
        whole = path.read_bytes() if path.is_file() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole:
            os.truncate(path, len(kept))
        if not kept:
            self._write(identity)
            return
        first, *entries = self._parsed(kept)
        if first != json.loads(json.dumps(identity)):
            raise InputError(
                f"{path} holds jobs of other settings or versions; expected those of this run; "
                "remedy: another folder, or delete that file"
            )
        self.done = {(entry["condition"], entry["seed"]): entry for entry in entries}

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a finished job, on the disk before this returns."""
        self._write(entry)
        self.done[entry["condition"], entry["seed"]] = entry

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _parsed(self, text: bytes) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in text.decode().splitlines()]
        except ValueError as error:
            raise InputError(
                f"{self.path} is damaged ({error}); expected one JSON object a line; "
                "remedy: delete it, the jobs are then run again"
            ) from error
