from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pycdgkd.data import Split, trial_split
from pycdgkd.errors import InputError

Samples = dict[str, npt.NDArray[np.int64]]


def table(subjects: int, trials: int, windows: int) -> Samples:
    subject, trial, segment = np.meshgrid(
        np.arange(1, subjects + 1), np.arange(1, trials + 1), np.arange(windows), indexing="ij"
    )
    return {"subject": subject.ravel(), "trial": trial.ravel(), "segment": segment.ravel()}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(3, 20), st.integers(1, 5), st.integers(0, 2**31), st.data())
def test_every_sample_once_and_no_trial_in_two_parts(
    subjects: int, trials: int, windows: int, seed: int, data: st.DataObject
) -> None:
    samples = table(subjects, trials, windows)
    # Rows in any order, as a table could be.
    order = np.array(data.draw(st.permutations(range(len(samples["subject"])))))
    samples = {name: column[order] for name, column in samples.items()}
    split = trial_split(samples, seed=seed)
    split.check(samples)
    parts = [split.train, split.val, split.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(order)))
    keys = [{(samples["subject"][i], samples["trial"][i]) for i in part} for part in parts]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    total = subjects * trials
    assert [len(k) for k in keys[1:]] == [max(1, round(0.1 * total))] * 2


def test_deap_sized_split_has_87_test_trials() -> None:
    samples = table(22, 40, 15)
    keep = np.ones(len(samples["subject"]), bool)
    for subject, last in ((3, 39), (5, 39), (11, 37), (14, 39)):
        keep &= ~((samples["subject"] == subject) & (samples["trial"] > last))
    split = trial_split({k: v[keep] for k, v in samples.items()}, seed=0)
    assert [len(p) // 15 for p in (split.train, split.val, split.test)] == [700, 87, 87]


def test_seeded() -> None:
    samples = table(3, 10, 2)
    assert trial_split(samples, seed=1).hash == trial_split(samples, seed=1).hash
    assert trial_split(samples, seed=1).hash != trial_split(samples, seed=2).hash


def test_saved_and_loaded(tmp_path: Path) -> None:
    samples = table(3, 10, 2)
    split = trial_split(samples, seed=4, fractions=(0.6, 0.2, 0.2))
    split.save(tmp_path / "split.json")
    loaded = Split.load(tmp_path / "split.json")
    loaded.check(samples)
    assert (loaded.seed, loaded.hash) == (4, split.hash)
    for part in Split.PARTS:
        np.testing.assert_array_equal(getattr(loaded, part), getattr(split, part))


def test_check_finds_leakage() -> None:
    samples = table(2, 5, 2)
    split = trial_split(samples, seed=0)
    moved = Split(split.train[1:], np.append(split.val, split.train[:1]), split.test, 0, split.hash)
    with pytest.raises(InputError, match=r"leakage: trial .* lies in both train and val"):
        moved.check(samples)


def test_check_finds_doubles_strangers_and_another_cache() -> None:
    samples = table(2, 5, 2)
    split = trial_split(samples, seed=0)
    double = Split(np.append(split.train, split.train[:1]), split.val, split.test, 0, split.hash)
    with pytest.raises(InputError, match="twice"):
        double.check(samples)
    with pytest.raises(InputError, match="names sample 19 but the cache has 16"):
        split.check(table(2, 4, 2))
    with pytest.raises(InputError, match="drawn for other samples"):
        split.check({**samples, "subject": samples["subject"] + 1})


@pytest.mark.parametrize("fractions", [(0.8, 0.2), (0.8, 0.1, 0.2), (1.0, 0.0, 0.0)])
def test_wrong_fractions(fractions: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="three positive numbers"):
        trial_split(table(2, 5, 2), seed=0, fractions=fractions)


def test_too_few_trials() -> None:
    with pytest.raises(InputError, match="at least 3 trials; the cache has 2"):
        trial_split(table(1, 2, 2), seed=0)
    with pytest.raises(InputError, match="no training trials of 4"):
        trial_split(table(1, 4, 2), seed=0, fractions=(0.02, 0.49, 0.49))


@pytest.mark.parametrize("content", ["", "[]", '{"train": ["a"], "val": [], "test": []}'])
def test_a_damaged_split_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(InputError, match="is not a split"):
        Split.load(tmp_path / "split.json")
    with pytest.raises(InputError, match="cannot read the split"):
        Split.load(tmp_path / "none.json")
