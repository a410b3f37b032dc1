"""results.json as typed values (standard library only)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycdgkd.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PartCounts:
    """Size of one part of the split; ``classes``: samples of each class."""

    samples: int
    trials: int
    classes: tuple[int, ...]


@dataclass(frozen=True)
class NetworkResult:
    """One trained network: how it was trained and how it did on the test set."""

    name: str
    modalities: tuple[str, ...]
    sources: tuple[str, ...]
    parameters: int
    epochs: int
    best_epoch: int
    seconds: float
    val_accuracy: float
    samples: int
    trials: int
    accuracy: Interval
    balanced_accuracy: Interval
    f1: Interval
    confusion: tuple[tuple[int, ...], ...]  # rows: true class; columns: predicted class

    @property
    def title(self) -> str:
        """The name for people: ``assistant_1`` -> ``assistant 1``."""
        return self.name.replace("_", " ")

    @property
    def sees(self) -> str:
        """Its input for people: ``video + EEG``."""
        return " + ".join("EEG" if name == "eeg" else name for name in self.modalities)


@dataclass(frozen=True)
class Results:
    """Everything that results.json says; networks in the order of training."""

    version: str
    torch: str
    label: str
    thresholds: tuple[float, ...]
    class_names: tuple[str, ...]
    seed: int
    preset: str
    split_hash: str
    cache_hash: str
    synthetic: bool
    counts: dict[str, PartCounts]
    majority_class: int
    majority: Interval
    networks: tuple[NetworkResult, ...]
    source_accuracy: dict[str, float]
    gain: Interval | None  # accuracy of student minus control, paired by trial
    warnings: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def question(self) -> str:
        """What was asked of a sample: ``valence above 5``, or the label alone."""
        if self.class_names != ("low", "high"):
            return self.label
        return f"{self.label} above {self.thresholds[0]:g}"

    def find(self, name: str) -> NetworkResult | None:
        """The network of that name, if the run has one."""
        return next((network for network in self.networks if network.name == name), None)


def load_results(run: Path) -> Results:
    """Read ``run``/results.json; ``InputError`` if it is missing, damaged or of another format."""
    path = run / "results.json"
    if not run.is_dir():
        raise InputError(f"no run at {run}: no such folder; expected one made by pycdgkd train")
    if not path.is_file():
        raise InputError(
            f"{run} holds no results.json: not a run, or one that has not finished; "
            "remedy: finish it with pycdgkd train CACHE --out RUN --resume"
        )
    try:
        return parse_results(json.loads(path.read_text(encoding="utf-8")))
    except KeyError as error:
        raise InputError(
            f"{path} has no entry {error}; expected a file written by this version of pycdgkd; "
            "remedy: pycdgkd train again"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); expected JSON written by pycdgkd train; "
            "remedy: restore it, or train again"
        ) from error


def _interval(entry: Any) -> Interval:
    return Interval(float(entry["value"]), float(entry["low"]), float(entry["high"]))


def _network(name: str, entry: Any) -> NetworkResult:
    test = entry["test"]
    return NetworkResult(
        name=name,
        modalities=tuple(str(item) for item in entry["modalities"]),
        sources=tuple(str(item) for item in entry["sources"]),
        parameters=int(entry["parameters"]),
        epochs=int(entry["epochs"]),
        best_epoch=int(entry["best_epoch"]),
        seconds=float(entry["seconds"]),
        val_accuracy=float(entry["val_accuracy"]),
        samples=int(test["samples"]),
        trials=int(test["trials"]),
        accuracy=_interval(test["accuracy"]),
        balanced_accuracy=_interval(test["balanced_accuracy"]),
        f1=_interval(test["f1"]),
        confusion=tuple(tuple(int(n) for n in row) for row in test["confusion"]),
    )


def _counts(entry: Any) -> PartCounts:
    classes = tuple(int(n) for n in entry["classes"])
    return PartCounts(int(entry["samples"]), int(entry["trials"]), classes)


def parse_results(data: Any) -> Results:
    """Typed results; KeyError, ValueError or TypeError if the content does not fit."""
    sources = data["sources"].items()
    gain = data.get("comparison", {}).get("student_minus_control")
    results = Results(
        version=str(data["pycdgkd"]),
        torch=str(data["torch"]),
        label=str(data["label"]),
        thresholds=tuple(float(step) for step in data["thresholds"]),
        class_names=tuple(str(name) for name in data["classes"]),
        seed=int(data["seed"]),
        preset=str(data["preset"]),
        split_hash=str(data["split_hash"]),
        cache_hash=str(data["cache_hash"]),
        synthetic=bool(data["synthetic"]),
        counts={part: _counts(data["counts"][part]) for part in ("train", "val", "test")},
        majority_class=int(data["majority"]["class"]),
        majority=_interval(data["majority"]["accuracy"]),
        networks=tuple(_network(str(name), entry) for name, entry in data["networks"].items()),
        source_accuracy={str(name): float(entry["val_accuracy"]) for name, entry in sources},
        gain=None if gain is None else _interval(gain),
        warnings=tuple(str(text) for text in data["warnings"]),
    )
    _check_classes(results)
    return results


def _check_classes(results: Results) -> None:
    """Every list that has one entry a class must have ``num_classes`` of them."""
    lists: list[tuple[object, ...]] = [part.classes for part in results.counts.values()]
    for network in results.networks:
        lists += [network.confusion, *network.confusion]
    if not 0 <= results.majority_class < results.num_classes or any(
        len(entries) != results.num_classes for entries in lists
    ):
        raise ValueError(f"class counts do not fit num_classes = {results.num_classes}")
