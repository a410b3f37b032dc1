"""Test figures of a trained run: predictions.csv of every network, and results.json."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import pycdgkd
from pycdgkd.data.splits import trial_keys
from pycdgkd.errors import InputError
from pycdgkd.files import write_atomically, write_text

from . import metrics
from .chain import Chain
from .inference import network_logits, probabilities
from .task import FitState

RESULTS = "results.json"


class Tested(NamedTuple):
    """One network on the test split: its figures, a confusion matrix for each trial, logits."""

    parameters: int
    figures: dict[str, Any]
    confusions: metrics.Counts
    logits: Tensor


def test_network(chain: Chain, role: str) -> Tested:
    """Run the best-validation weights of one network over the test split."""
    net = chain.load(role)
    logits = network_logits(net, chain.data, chain.split.test, chain.config.optim.part_size).cpu()
    confusions = _trial_confusions(chain, logits.argmax(1).numpy())
    figures = metrics.score(confusions, chain.config.seed)
    return Tested(sum(p.numel() for p in net.parameters()), figures, confusions, logits)


def collect(chain: Chain, states: dict[str, FitState]) -> dict[str, Any]:
    """Evaluate every network on the test split; the content of results.json.

    Writes predictions.csv into every network's folder.
    """
    tested = {role: test_network(chain, role) for role in states}
    for role, outcome in tested.items():
        _write_predictions(chain, role, outcome.logits)
    learners = [role for role in states if chain.level(role) is not None]
    return {
        **_header(chain),
        "counts": chain.data.counts(chain.split),
        "majority": _majority(chain),
        "networks": {role: _entry(chain, role, states[role], tested[role]) for role in states},
        "sources": {role: {"val_accuracy": states[role].best_accuracy} for role in learners},
        "comparison": {"student_minus_control": _gain(chain, tested)},
        "warnings": _warnings(chain, states),
    }


def recompute(chain: Chain, stored: dict[str, Any]) -> dict[str, Any]:
    """The stored results with test figures computed anew, and the lines that differ."""
    tested = {role: test_network(chain, role) for role in stored["networks"]}
    networks = {
        role: {**entry, "test": tested[role].figures} for role, entry in stored["networks"].items()
    }
    comparison = {"student_minus_control": _gain(chain, tested)}
    fresh = {"majority": _majority(chain), "networks": networks, "comparison": comparison}
    differences = [line for name, value in fresh.items() for line in _differ(stored, value, name)]
    return {**stored, **fresh, "differences": differences}


def _differ(stored: dict[str, Any], fresh: Any, name: str) -> list[str]:
    """A line for each leaf of ``fresh`` that ``stored[name]`` has otherwise."""
    key = name.rpartition("/")[2]
    before = stored.get(key)
    if isinstance(fresh, dict) and isinstance(before, dict):
        return [line for k, v in fresh.items() for line in _differ(before, v, f"{name}/{k}")]
    return [] if before == fresh else [f"{name}: {before} in results.json, {fresh} computed"]


def _gain(chain: Chain, tested: dict[str, Tested]) -> dict[str, float]:
    """What distillation brought: test accuracy of the student minus that of the control."""
    student, control = tested["student"].confusions, tested["control"].confusions
    return metrics.accuracy_difference(student, control, chain.config.seed)


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Write results.json atomically."""
    write_text(out / RESULTS, json.dumps(results, indent=2) + "\n")


def read_results(out: Path) -> dict[str, Any] | None:
    """The results of a finished run, or None."""
    path = out / RESULTS
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(
            f"{path} is damaged: {error}; remedy: delete it and run train with --resume"
        ) from error


def _header(chain: Chain) -> dict[str, Any]:
    config, cache = chain.config, chain.data.cache
    return {
        "pycdgkd": pycdgkd.__version__,
        "torch": torch.__version__,
        "device": str(chain.data.device),
        "threads": torch.get_num_threads(),
        "label": config.label,
        "thresholds": list(config.thresholds),
        "classes": list(chain.data.classes),
        "split": {"kind": chain.split.kind, "fold": chain.split.fold},
        "seed": config.seed,
        "preset": config.preset,
        "split_hash": chain.split.hash,
        "cache_hash": cache.hash,
        "cache": str(cache.path.resolve()),
        "synthetic": cache.synthetic,
    }


def _entry(chain: Chain, role: str, state: FitState, tested: Tested) -> dict[str, Any]:
    return {
        "modalities": ["video"] if chain.level(role) is None else ["video", "eeg"],
        "sources": list(chain.sources(role)),
        "parameters": tested.parameters,
        "epochs": state.epoch,
        "best_epoch": state.best_epoch,
        "seconds": round(state.seconds, 3),
        "val_accuracy": state.best_accuracy,
        "test": tested.figures,
    }


def _trial_confusions(chain: Chain, predicted: metrics.Counts) -> metrics.Counts:
    test = chain.split.test
    trials = trial_keys(chain.data.cache.samples, test)
    return metrics.trial_confusions(
        chain.data.labels[test], predicted, trials, chain.data.num_classes
    )


def _majority(chain: Chain) -> dict[str, Any]:
    """Accuracy on the test split of always answering the train split's larger class."""
    classes = chain.data.class_sizes(chain.split.train)
    choice = int(np.argmax(classes))
    predicted = np.full(len(chain.split.test), choice, dtype=np.int64)
    figures = metrics.score(_trial_confusions(chain, predicted), chain.config.seed)
    return {"class": choice, "accuracy": figures["accuracy"]}


def _warnings(chain: Chain, states: dict[str, FitState]) -> list[str]:
    notes = [note for state in states.values() for note in state.notes]
    student = states["student"].best_accuracy
    for role in chain.sources("student"):
        accuracy = states[role].best_accuracy
        if accuracy < student:
            notes.append(
                f"{role} is worse on the validation split than the student that learned from it "
                f"({accuracy:.3f} against {student:.3f})"
            )
    return notes


def _write_predictions(chain: Chain, role: str, logits: Tensor) -> None:
    test, samples = chain.split.test, chain.data.cache.samples
    likely = probabilities(logits)
    columns = ("sample", "subject", "trial", "segment")
    names = [*columns, "label", *(f"probability_{k}" for k in range(likely.shape[1])), "predicted"]

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(names)
            for row, index in enumerate(test.tolist()):
                facts = [int(samples[name][index]) for name in columns]
                chances = [f"{p:.7f}" for p in likely[row]]
                label, answer = int(chain.data.labels[index]), int(logits[row].argmax())
                writer.writerow([*facts, label, *chances, answer])

    write_atomically(chain.out / role / "predictions.csv", write)
