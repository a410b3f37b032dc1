"""The cache as training sees it: labels, batches on the device, statistics of the train split."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import Split, trial_keys
from pycdgkd.errors import InputError

from .config import TrainConfig

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
    """A cache with one class for each sample.

    labels: (n,) int64, -1 for a sample that takes no part. classes: their names, low first.
    """

    cache: Cache
    labels: Indices
    classes: tuple[str, ...]
    device: torch.device

    @classmethod
    def open(cls, cache: Cache, config: TrainConfig, device: torch.device) -> Recordings:
        """Class the samples of a cache by its classes, or by the thresholds of a rating.

        Raises ``InputError`` for a column that the cache does not have, or a rating that is no
        number.
        """
        if config.label not in cache.labels:
            near = difflib.get_close_matches(config.label, cache.labels, n=1, cutoff=0.0)
            raise InputError(
                f"cache {cache.path} has no label '{config.label}'; nearest of its labels "
                f"{', '.join(cache.labels)}: '{near[0] if near else ''}'"
            )
        values, names = cache.samples[config.label], cache.labels[config.label]
        if not np.isfinite(values).all():
            sample = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(
                f"sample {sample} of cache {cache.path} has no {config.label} rating; expected a "
                "number; remedy: prepare the cache again, or choose another label"
            )
        if names:
            labels = values.astype(np.int64)
            if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(names):
                raise InputError(
                    f"cache {cache.path} has a class of {config.label} that is none of "
                    f"{', '.join(names)}; remedy: prepare the cache again"
                )
            return cls(cache, labels, tuple(names), device)
        return cls(cache, _by_threshold(values, config), _class_names(config.thresholds), device)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

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

    def class_sizes(self, indices: Indices) -> list[int]:
        """Samples of each class."""
        return [int(n) for n in np.bincount(self.labels[indices], minlength=self.num_classes)]

    def counts(self, split: Split) -> dict[str, dict[str, Any]]:
        """Samples, trials and class sizes of each part of a split."""
        return {
            part: {
                "samples": len(indices),
                "trials": len(set(trial_keys(self.cache.samples, indices))),
                "classes": self.class_sizes(indices),
            }
            for part, indices in parts(split).items()
        }


def parts(split: Split) -> dict[str, Indices]:
    """The three parts by name."""
    return {"train": split.train, "val": split.val, "test": split.test}


def _by_threshold(values: npt.NDArray[np.float64], config: TrainConfig) -> Indices:
    """Number of thresholds that a rating exceeds; at one it is the ties' side, or -1 to drop it."""
    side: Literal["left", "right"] = "right" if config.ties == "high" else "left"
    labels = np.searchsorted(np.array(config.thresholds), values, side=side).astype(np.int64)
    if config.ties == "drop":
        labels[np.isin(values, config.thresholds)] = -1
    return labels


def _class_names(thresholds: Sequence[float]) -> tuple[str, ...]:
    if len(thresholds) == 1:
        return ("low", "high")
    middle = (f"{low:g} to {high:g}" for low, high in itertools.pairwise(thresholds))
    return (f"up to {thresholds[0]:g}", *middle, f"above {thresholds[-1]:g}")


def require_all_classes(counts: dict[str, dict[str, Any]], data: Recordings, label: str) -> None:
    """Raise ``InputError`` when a class does not occur in the train split, or there is but one."""
    if data.num_classes < 2:
        raise InputError(
            f"{label} has the single class {', '.join(data.classes)}; expected at least two; "
            "remedy: another label"
        )
    for name, size in zip(data.classes, counts["train"]["classes"], strict=True):
        if size == 0:
            raise InputError(
                f"class '{name}' of {label} is missing from the train split of "
                f"{counts['train']['samples']} samples; remedy: other thresholds, another label or "
                "split, or more recordings"
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
