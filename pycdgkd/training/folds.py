"""Cross-validated runs: one ordinary run a fold, and the figures of all test trials together."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import fold_count
from pycdgkd.errors import InputError
from pycdgkd.files import write_text

from . import metrics
from .config import TrainConfig
from .environment import Progress, resolve_device
from .recordings import Recordings
from .results import read_results
from .run import train

SUMMARY = "folds.json"


def fold_folder(out: Path, fold: int) -> Path:
    """Where the run of a fold lies."""
    return out / f"fold_{fold:02d}"


def count_folds(cache: Path, config: TrainConfig) -> int:
    """Folds that a configuration's split has on a cache."""
    data = Recordings.open(Cache.open(cache), config, resolve_device(config.device))
    split = config.split
    return fold_count(data.cache.samples, split.kind, split.folds, data.labels)


def train_folds(
    cache: Path,
    out: Path,
    config: TrainConfig,
    *,
    folds: Sequence[int] | None = None,
    resume: bool = False,
    progress: Progress = None,
) -> dict[str, Any]:
    """Train one run a fold into ``out``/fold_01, ..., then sum up every finished fold there.

    folds: which of them to train here, all by default; others may be trained elsewhere into the
    same folder. Finished folds are left alone, interrupted ones go on with ``resume``.
    Raises ``InputError`` as ``train`` does.
    """
    out = Path(out)
    count = count_folds(cache, config)
    chosen = range(1, count + 1) if folds is None else folds
    for fold in chosen:
        if not 1 <= fold <= count:
            raise InputError(f"the split by {config.split.kind} has {count} folds; got {fold}")
    if out.is_dir() and not resume and any(out.iterdir()):
        raise InputError(
            f"{out} is not empty; expected a new folder for the folds; "
            "remedy: another --out, or --resume to continue in it"
        )
    for fold in chosen:
        own = replace(config, split=replace(config.split, fold=fold))
        say = None if progress is None else _prefixed(progress, f"fold {fold} of {count}: ")
        train(cache, fold_folder(out, fold), own, resume=resume, progress=say)
    return summarise(out)


def _prefixed(progress: Any, prefix: str) -> Progress:
    return lambda line: progress(prefix + line)


def summarise(out: Path) -> dict[str, Any]:
    """Sum up the finished folds of a folder and write folds.json; returns its content.

    Every network's figures are those of all test trials together, with intervals over trials,
    beside the accuracy of each fold. Raises ``InputError`` when there is none, or folds of
    different caches or labels lie together.
    """
    folders = sorted(path for path in Path(out).glob("fold_*") if path.is_dir())
    found = [(path, read_results(path)) for path in folders]
    finished = [(path, results) for path, results in found if results is not None]
    if not finished:
        raise InputError(f"{out} holds no finished fold; remedy: pycdgkd train with --split")
    first = finished[0][1]
    shared = ("label", "thresholds", "classes", "cache_hash", "preset", "seed", "synthetic")
    for path, results in finished:
        for name in shared:
            if results[name] != first[name]:
                raise InputError(
                    f"{path} was trained with another {name}: {results[name]}; expected "
                    f"{first[name]} as in {finished[0][0]}; remedy: keep such runs apart"
                )
    summary = {
        **{name: first[name] for name in ("pycdgkd", "torch", *shared)},
        "split": first["split"]["kind"],
        "unfinished": [path.name for path, results in found if results is None],
        "folds": [_fold_entry(path, results) for path, results in finished],
        **_pooled([path for path, _ in finished], first),
    }
    write_text(Path(out) / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def _fold_entry(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": path.name,
        "fold": results["split"]["fold"],
        "counts": results["counts"],
        "majority": results["majority"]["accuracy"]["value"],
        "accuracy": {
            role: entry["test"]["accuracy"]["value"] for role, entry in results["networks"].items()
        },
    }


@dataclass(frozen=True)
class _Answers:
    """Classes and answers (n,) of all tested samples, in one order for every network."""

    keys: list[tuple[int, int, int]]  # subject, trial, segment
    labels: metrics.Counts
    predicted: metrics.Counts


def _read(paths: Sequence[Path], role: str) -> _Answers:
    rows: list[tuple[int, ...]] = []
    columns = ("subject", "trial", "segment", "label", "predicted")
    for path in paths:
        table = path / role / "predictions.csv"
        try:
            with table.open(newline="", encoding="utf-8") as file:
                rows += [tuple(int(row[name]) for name in columns) for row in csv.DictReader(file)]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"cannot read {table}: {error}; remedy: delete {path / 'results.json'} and train "
                "again with --resume"
            ) from error
    values = np.array(sorted(rows), dtype=np.int64).reshape(-1, len(columns))
    keys = [(int(s), int(t), int(g)) for s, t, g in values[:, :3]]
    return _Answers(keys, values[:, 3], values[:, 4])


def _pooled(paths: Sequence[Path], first: dict[str, Any]) -> dict[str, Any]:
    """Figures of the networks on the test trials of all folds."""
    classes, seed = len(first["classes"]), int(first["seed"])
    confusions = {}
    for role in first["networks"]:
        answers = _read(paths, role)
        trials = [(subject, trial) for subject, trial, _ in answers.keys]
        confusions[role] = metrics.trial_confusions(
            answers.labels, answers.predicted, trials, classes
        )
    student, control = confusions["student"], confusions["control"]
    return {
        "networks": {role: metrics.score(table, seed) for role, table in confusions.items()},
        "comparison": {
            "student_minus_control": metrics.accuracy_difference(student, control, seed)
        },
    }
