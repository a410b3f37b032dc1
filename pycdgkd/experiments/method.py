"""What a method of the tables is: a way to train a classifier on a bench that all share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    from pycdgkd.training.recordings import Recordings

    from .bench import Bench

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Classifier:
    """What training leaves.

    logits: gives the (n, K) logits (or log-probabilities) of recordings at cache indices (n,), on
    the CPU. parameters: of the network in use. seconds: of training it and what it learned from
    but for the teacher that all share. epochs: trained. val_accuracy: on the validation split.
    notes: what a reader should know.
    """

    logits: Callable[[Recordings, Indices], Tensor]
    parameters: int
    seconds: float
    epochs: int
    val_accuracy: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """One row of a table.

    name: on the command line and in files. title: for people. sees: what the classifier is given in
    use. settings: an instance of a frozen dataclass, the defaults. train: from a bench and settings
    to a classifier. needs: what it uses that the others do not, "" for nothing.
    """

    name: str
    title: str
    sees: tuple[str, ...]
    settings: Any
    train: Callable[[Bench, Any], Classifier]
    needs: str = ""
