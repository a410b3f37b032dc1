"""Decision-level fusion of two trained classifiers: p = w p_v + (1 - w) p_e."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pycdgkd.training.recordings import Indices, Recordings

Probabilities = npt.NDArray[np.float64]  # (n, K)
Predict = Callable[[Recordings, Indices], Probabilities]

WEIGHTS = np.linspace(0.0, 1.0, 101)  # Huang et al. 2019 enumerate 0, 0.01, ..., 1


def fuse(video: Probabilities, eeg: Probabilities, weight: float) -> Probabilities:
    """w p_v + (1 - w) p_e, (n, K)."""
    return weight * video + (1.0 - weight) * eeg


def best_weight(
    video: Probabilities, eeg: Probabilities, labels: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """The weight of ``WEIGHTS`` of the highest accuracy, and this accuracy.

    Among equals the one of the lowest cross-entropy: a small validation split ties many.
    """

    def rank(weight: float) -> tuple[float, float]:
        fused = fuse(video, eeg, weight)
        true = fused[np.arange(len(labels)), labels]
        return float((fused.argmax(1) == labels).mean()), float(np.log(true.clip(1e-12)).mean())

    ranks = [rank(float(weight)) for weight in WEIGHTS]
    best = max(range(len(ranks)), key=ranks.__getitem__)
    return float(WEIGHTS[best]), ranks[best][0]


@dataclass(frozen=True)
class LateFusion:
    """Two classifiers and the weight of the first. val_accuracy: on the samples it was fitted on.

    video, eeg: give the probabilities (n, K) of recordings at cache indices.
    """

    video: Predict
    eeg: Predict
    weight: float
    val_accuracy: float

    @classmethod
    def fit(cls, video: Predict, eeg: Predict, data: Recordings, val: Indices) -> LateFusion:
        """Choose the weight on the validation split."""
        weight, accuracy = best_weight(video(data, val), eeg(data, val), data.labels[val])
        return cls(video, eeg, weight, accuracy)

    def logits(self, data: Recordings, indices: Indices) -> Tensor:
        """Logarithms of the fused probabilities, (n, K) float32."""
        fused = fuse(self.video(data, indices), self.eeg(data, indices), self.weight)
        return torch.from_numpy(np.log(fused.clip(1e-12))).float()
