"""Splits into train, validation and test: windows of one trial never lie in two parts.

Kinds, all seeded; every kind of more than one fold tests each group exactly once:

* ``trial``: trials of all subjects pooled, 8:1:1 (the paper); ``stratified`` does so with the
  classes in proportion, ``stratified-subject`` with the classes of each subject in proportion;
* ``trial-kfold``: trials in n folds; ``per-subject``: a fold for each subject, of its trials alone;
* ``loso``: leave one subject out; ``subject-kfold``: subjects in n folds;
* ``stimulus``: stimuli 8:1:1; ``stimulus-kfold``: stimuli in n folds.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError

from .kinds import KINDS

Indices = npt.NDArray[np.int64]
Keys = list[tuple[int, int]]

# The column whose values may not lie in two parts, besides (subject, trial).
GROUPS = {"loso": "subject", "subject": "subject", "stimulus": "experiment_id"}


@dataclass(frozen=True)
class Split:
    """Sample indices (ascending) of the three parts, with the seed that drew them.

    hash: SHA-256 (hex) over which (subject, trial, segment) lies in which part, so it also tells
    one cache's split from another's. kind, fold (from 1): how it was drawn.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    train: Indices
    val: Indices
    test: Indices
    seed: int
    hash: str
    kind: str = "trial"
    fold: int = 1

    def save(self, path: Path) -> None:
        """Write the split as JSON."""
        content = {part: getattr(self, part).tolist() for part in self.PARTS}
        drawn = {"seed": self.seed, "hash": self.hash, "kind": self.kind, "fold": self.fold}
        text = json.dumps({**drawn, **content}, indent=None)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read a split written by ``save``; ``InputError`` when it is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            train, val, test = (np.array(content[part], dtype=np.int64) for part in cls.PARTS)
            return cls(
                train, val, test, int(content["seed"]), str(content["hash"]),
                str(content["kind"]), int(content["fold"]),
            )  # fmt: skip
        except OSError as error:
            raise InputError(f"cannot read the split {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
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
        self._check_leakage("trial", trial_keys(samples, np.arange(size)))
        column = GROUPS.get(self.kind.removesuffix("-kfold"))
        if column is not None:
            self._check_leakage(self.kind, [(int(value),) for value in samples[column]])
        if len(np.unique(everything)) != len(everything):
            raise InputError("the split names a sample twice; remedy: draw a new split")
        found = _split_hash(samples, [getattr(self, part) for part in self.PARTS])
        if found != self.hash:
            raise InputError(
                f"the split (hash {self.hash[:12]}) was drawn for other samples (hash "
                f"{found[:12]}); remedy: use the cache it was drawn for, or draw a new split"
            )

    def _check_leakage(self, what: str, keys: Sequence[tuple[int, ...]]) -> None:
        """Raise ``InputError`` when samples of one key lie in two parts."""
        owner: dict[tuple[int, ...], str] = {}
        for part in self.PARTS:
            for key in (keys[index] for index in getattr(self, part).tolist()):
                if owner.setdefault(key, part) != part:
                    name = (
                        f"trial {key[1]} of subject {key[0]}"
                        if len(key) == 2
                        else f"{GROUPS[what.removesuffix('-kfold')]} {key[0]}"
                    )
                    raise InputError(
                        f"leakage: {name} lies in both {owner[key]} and {part}; expected one part "
                        f"for each (split by {what}); remedy: draw a new split"
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
    return draw_split(samples, kind="trial", seed=seed, fractions=fractions)


def draw_split(
    samples: Mapping[str, npt.NDArray[Any]],
    *,
    kind: str,
    seed: int,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    folds: int = 5,
    fold: int = 1,
    labels: Indices | None = None,
) -> Split:
    """The split of a kind (see the module), or one fold of it.

    samples: columns with at least subject, trial, experiment_id and segment, (n,) each.
    fractions: shares of train, val and test; of folds only val's counts. fold: from 1.
    labels: class of each sample (n,), -1 for one that takes no part; all take part without.
    Raises ``InputError`` for bad settings or too few trials, subjects or stimuli.
    """
    shares = _check_fractions(fractions)
    size = len(samples["subject"])
    keys = trial_keys(samples, np.arange(size, dtype=np.int64))
    valid = np.ones(size, np.bool_) if labels is None else labels >= 0
    trials = sorted({key for key, used in zip(keys, valid.tolist(), strict=True) if used})
    count = fold_count(samples, kind, folds, labels)
    if not 1 <= fold <= count:
        raise InputError(f"split by {kind} has {count} folds; got fold {fold}")
    rng = np.random.default_rng(seed)
    if kind.startswith("stratified"):
        part_of = _stratified(trials, _strata(kind, keys, labels), shares, rng)
    elif kind == "per-subject":
        subject = sorted({key[0] for key in trials})[fold - 1]
        mine = [key for key in trials if key[0] == subject]
        part_of = _cut([(key,) for key in mine], f"trials of subject {subject}", shares, rng)
    else:
        units = _units(kind, trials, keys, samples)
        single = kind in ("trial", "stimulus")
        what = {"trial": "trials", "stimulus": "stimuli"}.get(
            kind.removesuffix("-kfold"), "subjects"
        )
        part_of = (
            _cut(units, what, shares, rng)
            if single
            else _fold(units, what, count, fold, shares, rng)
        )
    owner = np.array([part_of.get(key, -1) for key in keys])
    parts = [np.flatnonzero((owner == part) & valid).astype(np.int64) for part in range(3)]
    return Split(parts[0], parts[1], parts[2], seed, _split_hash(samples, parts), kind, fold)


def fold_count(
    samples: Mapping[str, npt.NDArray[Any]], kind: str, folds: int, labels: Indices | None = None
) -> int:
    """How many folds a kind of split has on these samples: 1 for a single split."""
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown split '{kind}'; nearest known: '{near}' of {', '.join(KINDS)}")
    if kind in ("loso", "per-subject"):
        used = samples["subject"] if labels is None else samples["subject"][labels >= 0]
        return len(np.unique(used))
    return folds if kind.endswith("-kfold") else 1


def _check_fractions(fractions: Sequence[float]) -> list[float]:
    shares = [float(share) for share in fractions]
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise InputError(
            f"split fractions must be three positive numbers that sum to 1; got {tuple(fractions)}"
        )
    return shares


def _units(
    kind: str, trials: Keys, keys: Keys, samples: Mapping[str, npt.NDArray[Any]]
) -> list[tuple[tuple[int, int], ...]]:
    """Trials that must stay together, in order."""
    column = GROUPS.get(kind.removesuffix("-kfold"))
    if column is None:
        return [(key,) for key in trials]
    group_of = dict(zip(keys, samples[column].tolist(), strict=True))
    groups: dict[int, list[tuple[int, int]]] = {}
    for key in trials:
        groups.setdefault(group_of[key], []).append(key)
    return [tuple(groups[name]) for name in sorted(groups)]


Parts = dict[tuple[int, int], int]


def _cut(
    units: Sequence[tuple[tuple[int, int], ...]],
    what: str,
    shares: Sequence[float],
    rng: np.random.Generator,
) -> Parts:
    """Part of each trial: units shuffled, then cut by the shares."""
    count = len(units)
    if count < 3:
        raise InputError(f"a split needs at least 3 {what}; the cache has {count}")
    order = rng.permutation(count)
    n_val = max(1, round(shares[1] * count))
    n_test = max(1, round(shares[2] * count))
    n_train = count - n_val - n_test
    if n_train < 1:
        raise InputError(
            f"fractions {tuple(shares)} leave no training {what} of {count} {what}; "
            "remedy: a larger first fraction"
        )
    bounds = np.split(order, [n_train, n_train + n_val])
    return {
        key: part for part, chosen in enumerate(bounds) for i in chosen.tolist() for key in units[i]
    }


def _fold(
    units: Sequence[tuple[tuple[int, int], ...]],
    what: str,
    folds: int,
    fold: int,
    shares: Sequence[float],
    rng: np.random.Generator,
) -> Parts:
    """Part of each trial: every folds-th unit of the shuffled ones is tested, others validate."""
    count = len(units)
    if folds < 2 or count < max(folds, 3):
        raise InputError(
            f"{folds} folds need at least 2 folds and as many {what} (3 at least); the cache has "
            f"{count} {what}; remedy: other folds, or another split"
        )
    order = rng.permutation(count)
    tested = np.zeros(count, np.bool_)
    tested[fold - 1 :: folds] = True
    rest = order[~tested]
    n_val = min(max(1, round(shares[1] * count)), len(rest) - 1)
    rest = rest[np.random.default_rng([fold, *rng.integers(2**31, size=1)]).permutation(len(rest))]
    chosen = {2: order[tested], 1: rest[:n_val], 0: rest[n_val:]}
    return {
        key: part for part, places in chosen.items() for i in places.tolist() for key in units[i]
    }


def _strata(
    kind: str, keys: Keys, labels: Indices | None
) -> dict[tuple[int, int], tuple[int, ...]]:
    if labels is None:
        raise InputError("a stratified split needs the classes of the samples")
    pairs = zip(keys, labels.tolist(), strict=True)
    return {key: (c, key[0]) if kind == "stratified-subject" else (c,) for key, c in pairs}


def _stratified(
    trials: Keys,
    stratum: Mapping[tuple[int, int], tuple[int, ...]],
    shares: Sequence[float],
    rng: np.random.Generator,
) -> Parts:
    """Part of each trial: trials shuffled within their strata, then test and val dealt out of the
    row of all strata in even steps, so that each gets its share of every stratum.
    """
    count = len(trials)
    sizes = {part: max(1, round(shares[part] * count)) for part in (2, 1)}
    held = sum(sizes.values())
    if held >= count:
        raise InputError(f"a stratified split needs more than {held} trials; the cache has {count}")
    rest = [trials[i] for i in rng.permutation(count).tolist()]
    rest.sort(key=lambda key: stratum[key])  # stable: still shuffled within a stratum
    part_of = dict.fromkeys(rest, 0)
    for part, size in sizes.items():
        places = ((np.arange(size) + rng.random()) * len(rest) / size).astype(np.int64)
        part_of.update((rest[i], part) for i in places.tolist())
        rest = [key for key in rest if part_of[key] == 0]
    return part_of


def cross_fit(
    split: Split, samples: Mapping[str, npt.NDArray[Any]], folds: int
) -> list[tuple[Split, Indices]]:
    """Each fold of the train trials left out in turn.

    Returns for each the split without it, which tests nothing, and the places of the samples left
    out in the train split.
    Raises ``InputError`` when there are fewer trials than folds, or less than two folds.
    """
    keys = trial_keys(samples, split.train)
    trials = sorted(set(keys))
    if not 2 <= folds <= len(trials):
        raise InputError(
            f"cross-fitting needs 2 folds or more, and as many train trials; got {folds} folds of "
            f"{len(trials)} trials"
        )
    order = np.random.default_rng([split.seed, folds]).permutation(len(trials))
    fold_of = {trials[i]: place % folds for place, i in enumerate(order.tolist())}
    owner = np.array([fold_of[key] for key in keys])
    fitted = []
    for fold in range(folds):
        parts = [split.train[owner != fold], split.val, split.test[:0]]
        digest = _split_hash(samples, parts)
        own = Split(parts[0], parts[1], parts[2], split.seed, digest, split.kind, split.fold)
        fitted.append((own, np.flatnonzero(owner == fold)))
    return fitted


def _split_hash(samples: Mapping[str, npt.NDArray[Any]], parts: Sequence[Indices]) -> str:
    digest = hashlib.sha256()
    for name, indices in zip(Split.PARTS, parts, strict=True):
        rows = np.stack([samples[c][indices] for c in ("subject", "trial", "segment")], axis=1)
        digest.update(name.encode())
        digest.update(np.concatenate([indices[:, None], rows], axis=1).astype("<i8").tobytes())
    return digest.hexdigest()
