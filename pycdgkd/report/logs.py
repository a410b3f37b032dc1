"""The CSV logs of one network as columns of numbers."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Column: TypeAlias = npt.NDArray[np.float64]
Table: TypeAlias = dict[str, Column]


class LogError(Exception):
    """A log that is missing or damaged; the text is for the reader of the report."""


@dataclass(frozen=True)
class Binned:
    """A long series in equal groups of neighbours: centre on the x axis, mean, lowest, highest."""

    x: Column
    mean: Column
    low: Column
    high: Column


def read_table(folder: Path, name: str, needed: tuple[str, ...]) -> Table:
    """All columns of ``folder``/name as float arrays; an empty cell is NaN.

    Raises ``LogError`` when the file is missing, has no rows, lacks a needed column or holds
    text where numbers belong.
    """
    path = folder / name
    where = f"{folder.name}/{name}"
    if not path.is_file():
        raise LogError(f"{where} is missing")
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        rows = list(reader)
    lacking = [column for column in needed if column not in columns]
    if lacking:
        raise LogError(f"{where} has no column {', '.join(lacking)}")
    if not rows:
        raise LogError(f"{where} has no rows")
    try:
        return {
            column: np.array([float(row[column] or "nan") for row in rows]) for column in columns
        }
    except ValueError as error:
        raise LogError(f"{where} is damaged: {error}") from error


def binned(x: Column, y: Column, groups: int = 240) -> Binned:
    """At most ``groups`` points of a series, which keeps a page small; NaN is left out."""
    kept = np.isfinite(y)
    parts_x = np.array_split(x[kept], min(groups, max(1, int(kept.sum()))))
    parts_y = np.array_split(y[kept], len(parts_x))
    pairs = [(a, b) for a, b in zip(parts_x, parts_y, strict=True) if len(b)]
    return Binned(
        np.array([a.mean() for a, _ in pairs]),
        np.array([b.mean() for _, b in pairs]),
        np.array([b.min() for _, b in pairs]),
        np.array([b.max() for _, b in pairs]),
    )


def source_shares(steps: Table) -> dict[str, float]:
    """For each ``weight_<source>`` column: share of the steps in which that source taught."""
    prefix = "weight_"
    return {
        name.removeprefix(prefix): float((column > 0).mean())
        for name, column in steps.items()
        if name.startswith(prefix)
    }
