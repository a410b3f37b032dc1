"""A finished run written by hand, in the formats that training writes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN_NETWORKS = {
    "teacher": (["video", "eeg"], []),
    "assistant_1": (["video", "eeg"], ["teacher"]),
    "assistant_2": (["video", "eeg"], ["teacher", "assistant_1"]),
    "student": (["video"], ["teacher", "assistant_1", "assistant_2"]),
    "control": (["video"], []),
}
EPOCHS = 12


def interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def network_entry(name: str, accuracy: float) -> dict[str, Any]:
    modalities, sources = RUN_NETWORKS[name]
    right = round(20 * accuracy)
    return {
        "modalities": modalities,
        "sources": sources,
        "parameters": 123456,
        "epochs": EPOCHS,
        "best_epoch": 7,
        "seconds": 95.0,
        "val_accuracy": accuracy,
        "test": {
            "samples": 40,
            "trials": 20,
            "accuracy": interval(accuracy, 0.08),
            "balanced_accuracy": interval(accuracy - 0.01, 0.09),
            "f1": interval(accuracy - 0.02, 0.1),
            "confusion": [[right, 20 - right], [20 - right, right]],
        },
    }


def results_entry() -> dict[str, Any]:
    accuracies = dict(zip(RUN_NETWORKS, (0.90, 0.85, 0.80, 0.75, 0.65), strict=True))
    return {
        "pycdgkd": "0.1.0",
        "torch": "2.13.0",
        "label": "valence",
        "thresholds": [5.0],
        "classes": ["low", "high"],
        "seed": 3,
        "preset": "nano",
        "split_hash": "ab12" * 16,
        "cache_hash": "cd34" * 16,
        "synthetic": True,
        "counts": {
            "train": {"samples": 320, "trials": 160, "classes": [150, 170]},
            "val": {"samples": 40, "trials": 20, "classes": [18, 22]},
            "test": {"samples": 40, "trials": 20, "classes": [20, 20]},
        },
        "majority": {"class": 1, "accuracy": interval(0.5, 0.2)},
        "networks": {name: network_entry(name, value) for name, value in accuracies.items()},
        "sources": {name: {"val_accuracy": accuracies[name]} for name in list(accuracies)[:3]},
        "comparison": {"student_minus_control": {"value": 0.1, "low": -0.02, "high": 0.21}},
        "warnings": [],
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def epoch_row(epoch: int, sources: list[str]) -> dict[str, Any]:
    decay = math.exp(-epoch / 4)
    return {
        "epoch": epoch,
        "seconds": 2.0,
        "train_loss": 0.2 + 0.5 * decay,
        "cross_entropy": 0.2 + 0.5 * decay,
        "kl": 0.1 + 0.2 * decay if sources else "",
        "val_loss": 0.35 + 0.35 * decay + 0.004 * epoch,
        "val_accuracy": 0.9 - 0.4 * decay - 0.01 * abs(epoch - 7),
        "best": int(epoch == 7),
    }


def step_row(step: int, sources: list[str]) -> dict[str, Any]:
    fast, slow = 1 - 0.5 * math.exp(-step / 30), 1 - 0.5 * math.exp(-step / 90)
    row = {"step": step, "epoch": 1 + step // 10, "loss": 0.5, "cross_entropy": 0.5}
    if sources:
        # The first source teaches in one step of four, every other one in all steps.
        shares = (float(i > 0 or step % 4 == 0) for i in range(len(sources)))
        weights = dict(zip((f"weight_{name}" for name in sources), shares, strict=True))
        return {**row, "kl": 0.1, **weights}
    return {
        **row,
        "rate_video": slow,
        "rate_eeg": fast,
        "lambda_video": min(1.0, fast / slow - 1),
        "lambda_eeg": 0.0,
    }


def write_run(run: Path, results: dict[str, Any] | None = None) -> Path:
    run.mkdir(parents=True)
    (run / "results.json").write_text(json.dumps(results or results_entry()), encoding="utf-8")
    for name, (_, sources) in RUN_NETWORKS.items():
        folder = run / name
        folder.mkdir()
        write_rows(
            folder / "log.csv", [epoch_row(epoch, sources) for epoch in range(1, EPOCHS + 1)]
        )
        if sources or name == "teacher":
            write_rows(folder / "steps.csv", [step_row(step, sources) for step in range(120)])
    return run


@pytest.fixture
def results_dict() -> dict[str, Any]:
    return results_entry()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run(results=None)`` writes a run folder and returns its path."""
    return lambda results=None: write_run(tmp_path / "run", results)
