"""Running methods: one result for every label, seed, fold and method, each on the same ground.

    OUT/runs/LABEL/seed_00/fold_01/METHOD/result.json, predictions.csv

Finished runs are left alone and interrupted ones go on. Methods of one label, seed and fold share
split, schedule, initial weights and the teacher; the test split is opened once a method, after its
training.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

import pycdgkd
from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import Split, trial_keys
from pycdgkd.errors import InputError
from pycdgkd.files import write_atomically, write_text
from pycdgkd.processes import worker_pool
from pycdgkd.training import metrics
from pycdgkd.training.chain import NO_PART_OF_IDENTITY
from pycdgkd.training.config import TrainConfig, config_values
from pycdgkd.training.environment import Progress, reproducible, resolve_device
from pycdgkd.training.folds import count_folds
from pycdgkd.training.recordings import Recordings, require_all_classes
from pycdgkd.training.run import split_of

from .bench import Bench
from .method import Classifier, Method

RESULT, PREDICTIONS = "result.json", "predictions.csv"


class Group(NamedTuple):
    """What shares one split: a label, a seed and a fold (from 1)."""

    label: str
    seed: int
    fold: int


@dataclass(frozen=True)
class Plan:
    """All runs of an experiment. Every seed draws its own split, weights and batch order."""

    cache: Path
    out: Path
    config: TrainConfig
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]

    def config_of(self, group: Group) -> TrainConfig:
        """The configuration of a group's runs."""
        split = replace(
            self.config.split, seed=self.config.split.seed + group.seed, fold=group.fold
        )
        return replace(self.config, label=group.label, seed=group.seed, split=split)

    def groups(self) -> list[Group]:
        """All groups in order."""
        found = []
        for label in self.labels:
            folds = count_folds(self.cache, replace(self.config, label=label))
            for seed in self.seeds:
                found += [Group(label, seed, fold) for fold in range(1, folds + 1)]
        return found

    def folder(self, group: Group) -> Path:
        """Where a group's runs lie."""
        return self.out / "runs" / group.label / f"seed_{group.seed:02d}" / f"fold_{group.fold:02d}"


def run_all(
    plan: Plan, *, jobs: int = 1, shard: tuple[int, int] = (1, 1), progress: Progress = None
) -> None:
    """Run what is not finished; shard (i, n): every n-th group from the i-th on.

    jobs: processes, each at one group; more than one is only for programs guarded by
    ``if __name__ == "__main__"``. Raises ``InputError`` when a finished run in the folder was made
    otherwise (the difference is named), or a label is not the cache's.
    """
    mine = plan.groups()[shard[0] - 1 :: shard[1]]
    if jobs == 1:
        for group in mine:
            run_group(plan, group, progress)
        return
    threads = plan.config.threads or max(1, (os.cpu_count() or 1) // jobs)
    shared = replace(plan, config=replace(plan.config, threads=threads))
    with worker_pool(jobs) as pool:
        waiting = {pool.submit(run_group, shared, group): group for group in mine}
        for done, future in enumerate(as_completed(waiting), start=1):
            future.result()
            if progress is not None:
                label, seed, fold = waiting[future]
                progress(f"{label} seed {seed} fold {fold} done, {done} of {len(mine)}")


def run_group(plan: Plan, group: Group, progress: Progress = None) -> None:
    """Run all methods of a group, one after the other."""
    config = plan.config_of(group)
    device = resolve_device(config.device)
    data = Recordings.open(Cache.open(plan.cache), config, device)
    split = split_of(data, config)
    split.check(data.cache.samples)
    require_all_classes(data.counts(split), data, config.label)
    for number, method in enumerate(plan.methods, start=1):
        folder = plan.folder(group) / method.name
        identity = _identity(config, method, split, data)
        if _is_finished(folder, identity):
            continue
        title = f"{group.label} seed {group.seed} [{number}/{len(plan.methods)}] "
        say = None if progress is None else _prefixed(progress, title)
        bench = Bench.open(
            config, data, split, plan.folder(group), method.name, method.settings, say
        )
        with reproducible(config, device):
            classifier = method.train(bench, method.settings)
            logits = classifier.logits(data, split.test).cpu()
        _write(folder, _result(group, method, classifier, data, split, logits, identity))


def _prefixed(progress: Any, prefix: str) -> Progress:
    return lambda line: progress(prefix + line)


def _identity(
    config: TrainConfig, method: Method, split: Split, data: Recordings
) -> dict[str, Any]:
    """What a finished run must have in common with this one to stand for it."""
    values = config_values(config)
    return {
        "configuration": {k: str(v) for k, v in values.items() if k not in NO_PART_OF_IDENTITY},
        "settings": {name: str(value) for name, value in asdict(method.settings).items()},
        "split_hash": split.hash,
        "cache_hash": data.cache.hash,
    }


def _is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    result = read_result(folder)
    if result is None:
        return False
    for part, expected in identity.items():
        found = result["identity"].get(part)
        if found == expected:
            continue
        if isinstance(expected, dict) and isinstance(found, dict):
            name = next(k for k in {**expected, **found} if expected.get(k) != found.get(k))
            found, expected, part = found.get(name), expected.get(name), f"{part} {name}"
        raise InputError(
            f"{folder} was run with another {part}: {found}; expected {expected}; "
            "remedy: another --out, or delete that folder"
        )
    return True


def _result(
    group: Group,
    method: Method,
    classifier: Classifier,
    data: Recordings,
    split: Split,
    logits: Tensor,
    identity: dict[str, Any],
) -> tuple[dict[str, Any], list[list[object]]]:
    """The content of result.json and the lines of predictions.csv."""
    predicted = logits.argmax(1).numpy().astype(np.int64)
    labels, test = data.labels[split.test], split.test
    trials = trial_keys(data.cache.samples, test)
    train = data.class_sizes(split.train)
    lines: list[list[object]] = [["sample", "subject", "trial", "segment", "label", "predicted"]]
    segments = data.cache.samples["segment"][test].tolist()
    for i, (subject, trial) in enumerate(trials):
        lines.append([int(test[i]), subject, trial, segments[i], int(labels[i]), int(predicted[i])])
    confusions = metrics.trial_confusions(labels, predicted, trials, data.num_classes)
    result = {
        "pycdgkd": pycdgkd.__version__,
        "method": method.name,
        **group._asdict(),
        "dataset": data.cache.manifest["dataset"],
        "synthetic": data.cache.synthetic,
        "classes": list(data.classes),
        "majority": float(np.mean(labels == int(np.argmax(train)))),
        "parameters": classifier.parameters,
        "seconds": round(classifier.seconds, 2),
        "epochs": classifier.epochs,
        "val_accuracy": classifier.val_accuracy,
        "test": metrics.score(confusions, group.seed),
        "notes": classifier.notes,
        "identity": identity,
    }
    return result, lines


def _write(folder: Path, content: tuple[dict[str, Any], list[list[object]]]) -> None:
    result, lines = content

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PREDICTIONS, write)
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; remedy: delete it and run again") from error


def read_confusions(folder: Path, num_classes: int) -> metrics.Counts:
    """(trials, K, K) of a finished run's predictions, by trial in ascending order."""
    path = folder / PREDICTIONS
    columns = ("subject", "trial", "label", "predicted")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [[int(row[name]) for name in columns] for row in csv.DictReader(file)]
        table = np.array(rows, dtype=np.int64).reshape(-1, len(columns))
        if not ((table[:, 2:] >= 0) & (table[:, 2:] < num_classes)).all():
            raise ValueError("a class that there is not")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; remedy: delete its folder") from error
    trials = [(int(s), int(t)) for s, t in table[:, :2]]
    return metrics.trial_confusions(table[:, 2], table[:, 3], trials, num_classes)


def finished(
    plan: Plan, label: str, methods: Sequence[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and result of every finished run of these methods for a label, by seed and fold."""
    for folder in sorted((plan.out / "runs" / label).glob("seed_*/fold_*")):
        for name in methods:
            result = read_result(folder / name)
            if result is not None:
                yield folder / name, result
