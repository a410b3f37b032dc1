"""Recorded studies whose truth is known: written as files, prepared, and read back as a cache."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pycdgkd.data.cache import Cache
from pycdgkd.data.config import PrepareConfig, StudyConfig
from pycdgkd.data.pipeline import prepare
from pycdgkd.data.splits import Indices, trial_keys
from pycdgkd.data.synthetic import (
    EEG_NOISE,
    VIDEO_NOISE,
    plan_study,
    resting,
    write_study,
)
from pycdgkd.experiments.controlled.study import MODALITIES
from pycdgkd.training.environment import derive_seed

NOISE = dict(zip(MODALITIES, (VIDEO_NOISE, EEG_NOISE), strict=True))
LABEL = "arousal"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RecordedCondition:
    """One kind of recorded study, named in words.

    study: strengths, label noise, subject effect and size; its seed is replaced by that of a job.
    preparation: of its files. fractions: shares of train, validation and test among all trials.
    """

    name: str
    study: StudyConfig
    preparation: PrepareConfig
    fractions: tuple[float, float, float]

    @property
    def weaker(self) -> tuple[str, ...]:
        """The modality whose evidence has less strength for its noise."""
        return (min(MODALITIES, key=self._clarity),)

    @property
    def stronger(self) -> tuple[str, ...]:
        """The other one."""
        return (max(MODALITIES, key=self._clarity),)

    def seeded(self, seed: int) -> StudyConfig:
        """What is recorded for a seed of the controlled study."""
        return replace(self.study, seed=derive_seed(seed, "recordings") % 2**31)

    def _clarity(self, name: str) -> float:
        return float(getattr(self.study, f"{name}_strength")) / NOISE[name]


@dataclass(frozen=True)
class RecordedStudy:
    """A prepared study and what lies behind it.

    truth: (n,) int64 class of each sample's latent value, whatever its rating says. oracle: for
    each modality the log-odds (n,) of class 1 but for a common positive factor a sample.
    """

    condition: RecordedCondition
    cache: Cache
    truth: Indices
    oracle: Mapping[str, Floats]

    def oracle_accuracy(self, samples: Indices, modalities: Sequence[str] = MODALITIES) -> float:
        """Share of these samples that their evidence tells right, rests of subjects known.

        No network can do better on average: evidence is all that face and EEG show of a trial.
        """
        odds = sum((self.oracle[name][samples] for name in modalities), np.zeros(len(samples)))
        return float(((odds > 0) == self.truth[samples].astype(bool)).mean())


def record_study(condition: RecordedCondition, seed: int, folder: Path) -> RecordedStudy:
    """Write the study of a condition and a seed, prepare it in ``folder``, delete the recordings.

    A trial in whose video the detector finds no face at all is missing, as it would be of DEAP.
    Conditions of a seed that differ in label noise alone share all recordings and the truth.
    """
    config = condition.seeded(seed)
    root = folder / "study"
    write_study(root, config)
    prepare(root, folder / "cache", condition.preparation)
    truth = read_truth(root / "truth.csv")
    shutil.rmtree(root)
    cache = Cache.open(folder / "cache")
    keys = trial_keys(cache.samples, np.arange(len(cache)))
    odds = _log_odds(config)
    return RecordedStudy(
        condition,
        cache,
        np.array([truth[key] for key in keys], dtype=np.int64),
        {name: np.array([odds[key][name] for key in keys]) for name in MODALITIES},
    )


def read_truth(path: Path) -> dict[tuple[int, int], int]:
    """Class of each (subject, trial) by its latent value: 1 above 0."""
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (int(row["subject"]), int(row["trial"])): int(float(row[f"latent_{LABEL}"]) > 0)
            for row in csv.DictReader(file)
        }


def _log_odds(config: StudyConfig) -> dict[tuple[int, int], dict[str, Any]]:
    """By (subject, trial) and modality: strength (evidence before tanh - rest) / noise^2."""
    odds = {}
    for trials in plan_study(config):
        rests = resting(config, trials[0].subject)[:, ("valence", "arousal").index(LABEL)]
        rest = dict(zip(MODALITIES, rests, strict=True))
        for trial in trials:
            odds[trial.subject, trial.trial] = {
                name: getattr(config, f"{name}_strength")
                * (np.arctanh(getattr(trial, f"{name}_{LABEL}")) - rest[name])
                / NOISE[name] ** 2
                for name in MODALITIES
            }
    return odds
