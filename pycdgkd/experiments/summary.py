"""What the finished runs of a table say together: means, intervals, paired differences.

Both the seeds (each of which draws another split, other weights and batches) and the test trials of
each are samples, so intervals resample seeds first and then trials within them. The draws are the
same for every method of a table: differences are paired.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError
from pycdgkd.training import metrics

from .catalogue import METHODS, Table, shown_in
from .method import Method
from .runs import Plan, finished, read_confusions
from .statistics import holm

Floats = npt.NDArray[np.float64]
Interval = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A method of a table for one label.

    runs: finished ones. figures: accuracy, balanced accuracy and F1 with intervals. difference: its
    accuracy minus that of the method of interest, on the runs that both have; None for that method
    itself. p, p_holm: two-sided, before and after correction for the table's comparisons. printed:
    in per cent, None where it is not known.
    """

    method: Method
    runs: int
    figures: dict[str, Interval]
    difference: Interval | None
    p: float | None
    p_holm: float | None
    majority: float
    seconds: float
    parameters: float
    printed: dict[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Runs:
    """Figures of a method's runs by (seed, fold): observed, and resampled over trials."""

    observed: dict[tuple[int, int], dict[str, float]]
    resampled: dict[tuple[int, int], dict[str, Floats]]


def summarise(plan: Plan, table: Table, label: str) -> list[Row]:
    """Rows of a table for a label, see ``shown_in``; those without a finished run are left out.

    Raises ``InputError`` when there is no finished run at all.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, _Runs] = {}
    names = shown_in(table, plan.methods)
    for folder, result in finished(plan, label, names):
        results.setdefault(result["method"], []).append(result)
        mine = runs.setdefault(result["method"], _Runs({}, {}))
        key = (result["seed"], result["fold"])
        confusions = read_confusions(folder, len(result["classes"]))
        drawn = metrics.bootstrap(confusions, result["seed"])
        total = confusions.sum(0)
        mine.observed[key] = {n: float(f(total)) for n, f in metrics.METRICS.items()}
        mine.resampled[key] = {n: f(drawn) for n, f in metrics.METRICS.items()}
    if not results:
        raise InputError(
            f"{plan.out} holds no finished run of {table.name} for {label}; remedy: run it first"
        )
    differences = {
        name: paired(runs[name], runs[table.interest])
        for name in names
        if name in runs and name != table.interest and table.interest in runs
    }
    corrected = dict(zip(differences, holm([p for _, p in differences.values()]), strict=True))
    return [
        _row(METHODS[name], table, label, results[name], runs[name], differences, corrected)
        for name in names
        if name in runs
    ]


def _row(
    method: Method,
    table: Table,
    label: str,
    results: Sequence[dict[str, Any]],
    runs: _Runs,
    differences: dict[str, tuple[Interval, float]],
    corrected: dict[str, float],
) -> Row:
    difference, p = differences.get(method.name, (None, None))
    return Row(
        method=method,
        runs=len(results),
        figures={name: pooled(runs, name) for name in metrics.METRICS},
        difference=difference,
        p=p,
        p_holm=corrected.get(method.name),
        majority=float(np.mean([result["majority"] for result in results])),
        seconds=float(np.mean([result["seconds"] for result in results])),
        parameters=float(np.mean([result["parameters"] for result in results])),
        printed={
            dataset: value
            for (name, dataset, of), value in table.printed.items()
            if (name, of) == (method.name, label)
        },
        notes=tuple(sorted({note for result in results for note in result["notes"]})),
    )


def pooled(runs: _Runs, name: str) -> Interval:
    """Mean of a figure over the runs, with its interval over seeds and trials."""
    keys = sorted(runs.observed)
    value = np.mean([runs.observed[key][name] for key in keys])
    return metrics.interval(np.asarray(value), _means([runs.resampled[key][name] for key in keys]))


def paired(ours: _Runs, theirs: _Runs) -> tuple[Interval, float]:
    """Accuracy of ours minus theirs on the runs that both have, and its two-sided p-value.

    The p-value is twice the share of resamples on the other side of 0 (at least one of them).
    """
    keys = sorted(set(ours.observed) & set(theirs.observed))
    if not keys:
        raise InputError("two methods share no seed and fold; remedy: run both on the same seeds")
    name = "accuracy"
    value = np.mean([ours.observed[k][name] - theirs.observed[k][name] for k in keys])
    drawn = _means([ours.resampled[k][name] - theirs.resampled[k][name] for k in keys])
    beyond = min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))
    p = min(1.0, 2 * max(beyond, 1 / len(drawn)))
    return metrics.interval(np.asarray(value), drawn), p


def _means(resampled: Sequence[Floats]) -> Floats:
    """Means over runs drawn with replacement, each with a resample of its trials."""
    values = np.stack(resampled)
    rng = np.random.default_rng(0)
    shape = (metrics.RESAMPLES, len(values))
    run = rng.integers(len(values), size=shape)
    trial = rng.integers(values.shape[1], size=shape)
    return np.asarray(values[run, trial].mean(axis=1), dtype=np.float64)


def write_runs(plan: Plan, path: Path) -> Path:
    """Every finished run as a line of CSV."""
    columns = ("label", "seed", "fold", "method", "majority", *metrics.METRICS, "val_accuracy")
    columns += ("parameters", "seconds", "epochs", "trials", "samples", "split_hash")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        names = [method.name for method in plan.methods]
        for label in plan.labels:
            for _, result in finished(plan, label, names):
                test = result["test"]
                known = {**result, "split_hash": result["identity"]["split_hash"]}
                known |= {name: test[name]["value"] for name in metrics.METRICS}
                known |= {name: test[name] for name in ("trials", "samples")}
                writer.writerow([known[name] for name in columns])
    return path
