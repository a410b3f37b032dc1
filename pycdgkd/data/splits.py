"""Trial-level splits: windows of one trial never lie in two parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Sample indices (ascending) of the three parts, with the seed that drew them.

    hash: SHA-256 (hex) over which (subject, trial, segment) lies in which part, so it also tells
    one cache's split from another's.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    train: Indices
    val: Indices
    test: Indices
    seed: int
    hash: str

    def save(self, path: Path) -> None:
        """Write the split as JSON."""
        content = {part: getattr(self, part).tolist() for part in self.PARTS}
        text = json.dumps({"seed": self.seed, "hash": self.hash, **content}, indent=None)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read a split written by ``save``; ``InputError`` when it is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            train, val, test = (np.array(content[part], dtype=np.int64) for part in cls.PARTS)
            return cls(train, val, test, int(content["seed"]), str(content["hash"]))
        except OSError as error:
            raise InputError(f"cannot read the split {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a split; expected JSON with train, val, test, seed and hash; "
                "remedy: give the split.json of a run"
            ) from error

    def check(self, samples: Mapping[str, npt.NDArray[Any]]) -> None:
        """Raise ``InputError`` on leakage or when the split was drawn for other samples."""
        size = len(samples["subject"])
        everything = np.concatenate([self.train, self.val, self.test])
        if everything.size and (everything.min() < 0 or everything.max() >= size):
            raise InputError(
                f"the split names sample {int(everything.max())} but the cache has {size}; "
                "remedy: use the cache that the split was drawn for"
            )
        owner: dict[tuple[int, int], str] = {}
        for part in self.PARTS:
            for key in trial_keys(samples, getattr(self, part)):
                if owner.setdefault(key, part) != part:
                    raise InputError(
                        f"leakage: trial {key[1]} of subject {key[0]} lies in both {owner[key]} "
                        f"and {part}; expected one part for each trial; remedy: draw a new split"
                    )
        if len(np.unique(everything)) != len(everything):
            raise InputError("the split names a sample twice; remedy: draw a new split")
        found = _split_hash(samples, [getattr(self, part) for part in self.PARTS])
        if found != self.hash:
            raise InputError(
                f"the split (hash {self.hash[:12]}) was drawn for other samples (hash "
                f"{found[:12]}); remedy: use the cache it was drawn for, or draw a new split"
            )


def trial_keys(samples: Mapping[str, npt.NDArray[Any]], indices: Indices) -> list[tuple[int, int]]:
    """(subject, presentation trial) of each of these samples."""
    subject, trial = samples["subject"][indices], samples["trial"][indices]
    return list(zip(subject.tolist(), trial.tolist(), strict=True))


def trial_split(
    samples: Mapping[str, npt.NDArray[Any]],
    *,
    seed: int,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
) -> Split:
    """Shuffle the trials of all subjects together and cut them into train, val and test.

    samples: columns with at least subject, trial and segment, (n,) each.
    fractions: shares of the trials, summing to 1; each part gets at least one trial.
    Raises ``InputError`` for bad fractions or fewer than three trials.
    """
    shares = [float(share) for share in fractions]
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise InputError(
            f"split fractions must be three positive numbers that sum to 1; got {tuple(fractions)}"
        )
    size = len(samples["subject"])
    keys = trial_keys(samples, np.arange(size, dtype=np.int64))
    trials = sorted(set(keys))
    if len(trials) < 3:
        raise InputError(f"a split needs at least 3 trials; the cache has {len(trials)}")
    order = np.random.default_rng(seed).permutation(len(trials))
    n_val = max(1, round(shares[1] * len(trials)))
    n_test = max(1, round(shares[2] * len(trials)))
    n_train = len(trials) - n_val - n_test
    if n_train < 1:
        raise InputError(
            f"fractions {tuple(fractions)} leave no training trial of {len(trials)}; "
            "remedy: a larger first fraction"
        )
    bounds = np.split(order, [n_train, n_train + n_val])
    part_of = {trials[i]: part for part, chosen in enumerate(bounds) for i in chosen.tolist()}
    owner = np.array([part_of[key] for key in keys])
    parts = [np.flatnonzero(owner == part).astype(np.int64) for part in range(3)]
    return Split(parts[0], parts[1], parts[2], seed, _split_hash(samples, parts))


def _split_hash(samples: Mapping[str, npt.NDArray[Any]], parts: Sequence[Indices]) -> str:
    digest = hashlib.sha256()
    for name, indices in zip(Split.PARTS, parts, strict=True):
        rows = np.stack([samples[c][indices] for c in ("subject", "trial", "segment")], axis=1)
        digest.update(name.encode())
        digest.update(np.concatenate([indices[:, None], rows], axis=1).astype("<i8").tobytes())
    return digest.hexdigest()
