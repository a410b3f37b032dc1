"""What a dataset's folder holds, without preparing it, and what would be skipped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycdgkd.errors import InputError

from .config import PrepareConfig
from .eeg import check_length
from .pipeline import dataset_module
from .study import Skip, Study, Trial
from .video import check_video


@dataclass(frozen=True)
class Found:
    """What ``check_dataset`` saw. samples: whole windows in the usable trials' stimuli."""

    dataset: str
    root: Path
    subjects: tuple[int, ...]
    trials: int
    samples: int
    labels: dict[str, str]
    skipped: tuple[Skip, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "dataset": self.dataset,
            "root": str(self.root),
            "subjects": list(self.subjects),
            "trials": self.trials,
            "samples": self.samples,
            "labels": self.labels,
            "skipped": [
                {"subject": subject, "trial": trial, "reason": reason}
                for subject, trial, reason in self.skipped
            ],
        }

    def text(self) -> str:
        """The same in words."""
        lines = [
            f"{self.dataset} at {self.root}",
            f"usable   {self.trials} trials of {len(self.subjects)} subjects, "
            f"{self.samples} samples",
            *(f"label    {name}: {what}" for name, what in self.labels.items()),
        ]
        for subject, trial, reason in self.skipped:
            where = f"subject {subject}" if trial is None else f"subject {subject} trial {trial}"
            lines.append(f"skipped  {where}: {reason}")
        return "\n".join([*lines, f"skipped  {len(self.skipped)} in all"])


def check_dataset(root: Path | str, config: PrepareConfig, dataset: str) -> Found:
    """Scan a dataset and open every file: sizes against headers, not what lies inside.

    Raises ``InputError`` when nothing is usable, as ``prepare`` does.
    """
    study: Study = dataset_module(dataset).scan(Path(root), config)
    good: list[Trial] = []
    skipped = list(study.skipped)
    broken: dict[Path, str] = {}
    for trial in study.trials:
        reason = _reason(trial.eeg, broken) or _reason(trial.video, broken)
        if reason:
            skipped.append((*trial.key, reason))
        else:
            good.append(trial)
    return Found(
        dataset=dataset,
        root=Path(root),
        subjects=tuple(sorted({trial.subject for trial in good})),
        trials=len(good),
        samples=sum(len(config.window_starts(trial.seconds)) for trial in good),
        labels={name: _describe(name, good, study.classes) for name in study.label_names},
        skipped=tuple(sorted(skipped, key=lambda entry: (entry[0], entry[1] or 0))),
    )


def _reason(path: Path, known: dict[Path, str]) -> str:
    """Why a file cannot be used, as far as its size and header tell; empty when it can."""
    if path not in known:
        known[path] = ""
        try:
            if path.stat().st_size == 0:
                raise InputError(f"{path} is empty (0 bytes)")
            if path.suffix.casefold() == ".bdf":
                check_length(path)
            elif path.suffix.casefold() in (".avi", ".mp4", ".mov", ".mkv"):
                check_video(path)
            else:
                with path.open("rb") as file:
                    file.read(1)
        except InputError as error:
            known[path] = str(error)
        except OSError as error:
            known[path] = f"cannot read {path}: {error.strerror or error}"
    return known[path]


def _describe(name: str, trials: Sequence[Trial], classes: dict[str, list[str]]) -> str:
    values = [trial.labels[name] for trial in trials]
    if not values:
        return "no usable trial"
    if name in classes:
        counts = Counter(int(value) for value in values)
        return ", ".join(f"{text} {counts[i]}" for i, text in enumerate(classes[name]))
    above = sum(value > 5 for value in values)
    return (
        f"{min(values):g} to {max(values):g}, {above} above 5, {sum(v == 5 for v in values)} at 5"
    )
