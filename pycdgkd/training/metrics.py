"""Figures of merit from confusion matrices, with bootstrap intervals over trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Counts: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

RESAMPLES = 2000


def confusion_matrix(labels: Counts, predicted: Counts, num_classes: int) -> Counts:
    """(K, K) counts; rows are the true classes, columns the predicted ones."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes).astype(np.int64)


def accuracy(confusion: Counts) -> Floats:
    """Share of right answers for confusion matrices (..., K, K)."""
    right = np.trace(confusion, axis1=-2, axis2=-1)
    return np.asarray(right / confusion.sum((-2, -1)), dtype=np.float64)


def balanced_accuracy(confusion: Counts) -> Floats:
    """Mean recall over the classes that occur, for confusion matrices (..., K, K)."""
    support = confusion.sum(-1)
    recall = np.diagonal(confusion, axis1=-2, axis2=-1) / np.maximum(support, 1)
    return np.asarray(recall.sum(-1) / (support > 0).sum(-1), dtype=np.float64)


def f1(confusion: Counts) -> Floats:
    """F1 of class 1 ("high") for two classes, the mean over classes for more; (..., K, K).

    A class that neither occurs nor is predicted has F1 0.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    total = confusion.sum(-1) + confusion.sum(-2)
    scores = 2 * right / np.maximum(total, 1)
    return np.asarray(scores[..., 1] if scores.shape[-1] == 2 else scores.mean(-1), np.float64)


METRICS: dict[str, Callable[[Counts], Floats]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
}


def trial_confusions(
    labels: Counts, predicted: Counts, trials: Sequence[tuple[int, int]], num_classes: int
) -> Counts:
    """(trials, K, K): one confusion matrix for each (subject, trial), in ascending order."""
    names = sorted(set(trials))
    place = {name: index for index, name in enumerate(names)}
    owner = np.array([place[name] for name in trials])
    cell = (owner * num_classes + labels) * num_classes + predicted
    flat = np.bincount(cell, minlength=len(names) * num_classes**2)
    return flat.reshape(len(names), num_classes, num_classes).astype(np.int64)


def bootstrap(confusions: Counts, seed: int) -> Counts:
    """(RESAMPLES, K, K): confusion matrices of trials drawn with replacement.

    Windows of one trial stay together, because they are not independent. Equal seeds draw the same
    trials, so two networks' resamples are paired.
    """
    size = len(confusions)
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    return np.asarray(np.tensordot(draws, confusions, axes=1), dtype=np.int64)


def interval(value: Floats, resampled: Floats) -> dict[str, float]:
    """The value with the 2.5 and 97.5 % points of its resamples."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


def score(confusions: Counts, seed: int) -> dict[str, Any]:
    """Accuracy, balanced accuracy and F1 with 95 % intervals over trials, and the confusion."""
    total = np.asarray(confusions.sum(0), dtype=np.int64)
    drawn = bootstrap(confusions, seed)
    figures = {name: interval(metric(total), metric(drawn)) for name, metric in METRICS.items()}
    return {
        "samples": int(total.sum()),
        "trials": len(confusions),
        **figures,
        "confusion": total.tolist(),
    }


def accuracy_difference(ours: Counts, theirs: Counts, seed: int) -> dict[str, float]:
    """Accuracy of ours minus theirs on the same trials, with its paired 95 % interval."""
    value = accuracy(ours.sum(0)) - accuracy(theirs.sum(0))
    drawn = accuracy(bootstrap(ours, seed)) - accuracy(bootstrap(theirs, seed))
    return interval(np.asarray(value, dtype=np.float64), drawn)
