"""The cache as training sees it: labels, batches on the device, statistics of the train split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import Split, trial_keys
from pycdgkd.errors import InputError

NUM_CLASSES = 2

Indices = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Samples on the device.

    video: (B, T, 3, H, W) uint8. frame_mask: (B, T) bool, or None where all frames are valid (known
    here without asking the device). eeg: (B, C, L) float32, microvolts. labels: (B,) int64.
    """

    video: Tensor
    frame_mask: Tensor | None
    eeg: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Recordings:
    """A cache with one label for each sample. labels: (n,) int64, 1 where rating > threshold."""

    cache: Cache
    labels: Indices
    device: torch.device

    @classmethod
    def open(cls, cache: Cache, label: str, threshold: float, device: torch.device) -> Recordings:
        """Label the samples of a cache; a rating that is no number raises ``InputError``."""
        ratings = cache.samples[label]
        if not np.isfinite(ratings).all():
            sample = int(np.flatnonzero(~np.isfinite(ratings))[0])
            raise InputError(
                f"sample {sample} of cache {cache.path} has no {label} rating; expected a number; "
                "remedy: prepare the cache again, or choose another label"
            )
        return cls(cache, (ratings > threshold).astype(np.int64), device)

    def batch(self, indices: Indices) -> Batch:
        """The samples of these cache indices, in this order."""

        def move(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.asarray(array)).to(self.device)

        mask = self.cache.frame_mask[indices]
        return Batch(
            move(self.cache.video[indices]),
            None if mask.all() else move(mask),
            move(self.cache.eeg[indices]),
            move(self.labels[indices]),
        )

    def batches(self, indices: Indices, size: int) -> Iterator[tuple[slice, Batch]]:
        """All samples in the given order, with the places that each batch takes."""
        for start in range(0, len(indices), size):
            place = slice(start, min(start + size, len(indices)))
            yield place, self.batch(indices[place])

    def classes(self, indices: Indices) -> list[int]:
        """Samples of each class."""
        return [int(n) for n in np.bincount(self.labels[indices], minlength=NUM_CLASSES)]

    def counts(self, split: Split) -> dict[str, dict[str, Any]]:
        """Samples, trials and class sizes of each part of a split."""
        return {
            part: {
                "samples": len(indices),
                "trials": len(set(trial_keys(self.cache.samples, indices))),
                "classes": self.classes(indices),
            }
            for part, indices in parts(split).items()
        }


def parts(split: Split) -> dict[str, Indices]:
    """The three parts by name."""
    return {"train": split.train, "val": split.val, "test": split.test}


def require_all_classes(counts: dict[str, dict[str, Any]], label: str, threshold: float) -> None:
    """Raise ``InputError`` when a class does not occur in the train split."""
    for index, size in enumerate(counts["train"]["classes"]):
        if size == 0:
            side = "above" if index else "at or below"
            raise InputError(
                f"class {index} is missing from the train split: none of its "
                f"{counts['train']['samples']} samples has {label} {side} {threshold:g}; "
                "remedy: another threshold or label, or more recordings"
            )


def eeg_statistics(cache: Cache, indices: Indices) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over these samples, (C,) float32, microvolts.

    A channel without any variation raises ``InputError``: its z-score does not exist.
    """
    total = np.zeros(cache.eeg.shape[1])
    squares = np.zeros_like(total)
    for chunk in np.array_split(indices, max(1, len(indices) // 256)):
        values = np.asarray(cache.eeg[chunk], dtype=np.float64)
        total += values.sum((0, 2))
        squares += np.square(values).sum((0, 2))
    size = len(indices) * cache.eeg.shape[2]
    mean = total / size
    deviation = np.sqrt(np.maximum(squares / size - mean**2, 0.0))
    flat = np.flatnonzero(~(deviation > 1e-6 * (1.0 + np.abs(mean))))
    if flat.size:
        name = cache.channels[flat[0]]
        raise InputError(
            f"EEG channel {name} is flat or not finite over the whole train split; "
            "remedy: prepare the cache without this channel or without its recordings"
        )
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()
