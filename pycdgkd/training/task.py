"""What one training works on, where it stands, and what its checkpoint must have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycdgkd.data.splits import Split
from pycdgkd.errors import InputError

from .checkpoint import load_state
from .config import OptimConfig
from .environment import Progress
from .recordings import Recordings


@dataclass(frozen=True)
class Task:
    """Everything about one training but the network and its objective.

    folder: the network's own. seed_role: name from which the batch order and dropout are seeded.
    identity: plain values that a checkpoint must share to be resumed. keep_last: leave the last
    epoch's weights, not the best; for pre-training, which validation accuracy cannot judge.
    """

    role: str
    title: str
    folder: Path
    data: Recordings
    split: Split
    optim: OptimConfig
    seed: int
    seed_role: str
    identity: dict[str, Any]
    progress: Progress = None
    keep_last: bool = False

    def say(self, text: str) -> None:
        """One line of progress."""
        if self.progress is not None:
            self.progress(f"{self.title}  {text}")


@dataclass
class FitState:
    """Where a training stands. Epochs count from 1; epoch is the number of finished ones.

    improved_epoch: last epoch with a higher validation accuracy, which patience counts from.
    best_epoch: the epoch whose weights are kept; equal accuracy goes to the lower validation loss.
    notes: what the reader of the results should know.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    improved_epoch: int = 0
    best_accuracy: float = -1.0
    best_loss: float = math.inf
    seconds: float = 0.0
    finished: bool = False
    notes: list[str] = field(default_factory=list)

    def judge(self, accuracy: float, loss: float) -> bool:
        """Take note of the validation of the epoch just finished; True when it is the best."""
        better = accuracy > self.best_accuracy
        if better:
            self.improved_epoch = self.epoch
        if better or (accuracy == self.best_accuracy and loss < self.best_loss):
            self.best_accuracy, self.best_loss, self.best_epoch = accuracy, loss, self.epoch
            return True
        return False


def finished_state(folder: Path, identity: Mapping[str, Any]) -> FitState | None:
    """The end state of a finished training, or None; another identity raises ``InputError``."""
    state = load_state(folder)
    if state is None:
        return None
    check_identity(state["identity"], identity, folder)
    fit_state = FitState(**state["fit"])
    return fit_state if fit_state.finished else None


def check_identity(found: Mapping[str, Any], expected: Mapping[str, Any], where: Path) -> None:
    """Raise ``InputError`` naming the first value in which a stored network differs."""
    for name, value in expected.items():
        if found.get(name) != value:
            shown = [str(v)[:12] if name.endswith("_hash") else v for v in (found.get(name), value)]
            raise InputError(
                f"{where} was trained with another {name.replace('_', ' ')}: {shown[0]}; "
                f"expected {shown[1]}; remedy: train into a new folder"
            )
