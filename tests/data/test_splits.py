from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pycdgkd.data import Split, trial_split
from pycdgkd.data.splits import cross_fit, draw_split, fold_count, trial_keys
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


def study(subjects: int = 6, trials: int = 10) -> Samples:
    """Two windows a trial; every subject saw the stimuli in an order of their own."""
    rng = np.random.default_rng(4)
    subject, trial, segment = (a.ravel() for a in np.indices((subjects, trials, 2)))
    shown = np.array([rng.permutation(trials) for _ in range(subjects)])
    return {
        "subject": subject + 1,
        "trial": trial + 1,
        "experiment_id": shown[subject, trial] + 1,
        "segment": segment,
    }


GROUPS = {
    "trial": ("subject", "trial"),
    "subject": ("subject",),
    "loso": ("subject",),
    "stimulus": ("experiment_id",),
}


@pytest.mark.parametrize(
    ("kind", "count"),
    [("trial-kfold", 4), ("loso", 6), ("subject-kfold", 3), ("stimulus-kfold", 5)],
)
def test_folds_test_every_group_once(kind: str, count: int) -> None:
    samples = study()
    folds = {"trial-kfold": 4, "subject-kfold": 3, "stimulus-kfold": 5}.get(kind, 2)
    assert fold_count(samples, kind, folds) == count
    columns = GROUPS[kind.removesuffix("-kfold")]
    groups = np.stack([samples[name] for name in columns], axis=1)
    tested: list[int] = []
    for fold in range(1, count + 1):
        split = draw_split(samples, kind=kind, seed=3, folds=folds, fold=fold)
        split.check(samples)
        assert (split.kind, split.fold) == (kind, fold)
        parts = [{tuple(g) for g in groups[getattr(split, part)]} for part in Split.PARTS]
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts)) == len({tuple(g) for g in groups})
        tested += split.test.tolist()
    assert sorted(tested) == list(range(120))
    with pytest.raises(
        InputError, match=f"split by {kind} has {count} folds; got fold {count + 1}"
    ):
        draw_split(samples, kind=kind, seed=3, folds=folds, fold=count + 1)


def test_a_subject_of_its_own() -> None:
    samples = study()
    assert fold_count(samples, "per-subject", 2) == 6
    split = draw_split(samples, kind="per-subject", seed=0, fold=4)
    used = np.concatenate([split.train, split.val, split.test])
    assert set(samples["subject"][used]) == {4}
    assert [len(getattr(split, part)) for part in Split.PARTS] == [16, 2, 2]


def test_stimuli_stay_in_one_part() -> None:
    samples = study()
    split = draw_split(samples, kind="stimulus", seed=0)
    parts = [set(samples["experiment_id"][getattr(split, part)]) for part in Split.PARTS]
    assert [len(part) for part in parts] == [8, 1, 1]
    assert len(set.union(*parts)) == 10
    moved = Split(split.train, split.test, split.val, 0, split.hash, "stimulus")
    with pytest.raises(InputError, match="was drawn for other samples"):
        moved.check(samples)
    leaky = Split(
        np.append(split.train, split.test[:2]), split.val, split.test[2:], 0, "x", "stimulus"
    )
    with pytest.raises(InputError, match=r"leakage: experiment_id \d+ lies in both train and test"):
        leaky.check(samples)


@pytest.mark.parametrize("kind", ["stratified", "stratified-subject"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.2, 0.3, 0.5]))
def test_stratified_parts_have_the_classes_of_the_whole(kind: str, seed: int, share: float) -> None:
    samples = study(6, 20)
    high = np.random.default_rng(seed).random((6, 20)) < share
    labels = high[samples["subject"] - 1, samples["trial"] - 1].astype(np.int64)
    split = draw_split(samples, kind=kind, seed=seed, labels=labels)
    split.check(samples)
    for part in Split.PARTS:
        indices = getattr(split, part)
        assert abs(labels[indices].sum() - labels.mean() * len(indices)) <= 2 * 2


def test_samples_without_a_class_take_no_part() -> None:
    samples = study()
    labels = np.where(samples["trial"] == 3, -1, 0)
    for kind in ("trial", "stratified", "loso", "stimulus"):
        split = draw_split(samples, kind=kind, seed=1, labels=labels)
        used = np.concatenate([split.train, split.val, split.test])
        assert len(used) == 108
        assert (samples["trial"][used] != 3).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "losso"}, "unknown split 'losso'; nearest known: 'loso'"),
        ({"kind": "stratified"}, "needs the classes"),
        ({"kind": "subject-kfold", "folds": 7}, "the cache has 6 subjects"),
        ({"kind": "trial-kfold", "folds": 1}, "need at least 2 folds"),
    ],
)
def test_splits_that_cannot_be_drawn(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        draw_split(study(), seed=0, **options)  # type: ignore[arg-type]  # wrong on purpose


def test_a_saved_split_keeps_its_kind(tmp_path: Path) -> None:
    split = draw_split(study(), kind="loso", seed=5, fold=3)
    split.save(tmp_path / "split.json")
    read = Split.load(tmp_path / "split.json")
    assert (read.kind, read.fold, read.hash) == ("loso", 3, split.hash)


def test_cross_fitting_leaves_every_train_trial_out_once() -> None:
    samples = table(3, 10, 2)
    split = trial_split(samples, seed=3)
    fitted = cross_fit(split, samples, 4)
    places = np.concatenate([left for _, left in fitted])
    assert sorted(places.tolist()) == list(range(len(split.train)))
    for own, left in fitted:
        own.check(samples)
        np.testing.assert_array_equal(own.val, split.val)
        assert len(own.test) == 0
        outside = split.train[left]
        assert not set(own.train.tolist()) & set(outside.tolist())
        assert len(own.train) + len(left) == len(split.train)
        assert not set(trial_keys(samples, own.train)) & set(trial_keys(samples, outside))
    assert len({own.hash for own, _ in fitted}) == 4
    for folds in (1, 10_000):
        with pytest.raises(InputError, match="cross-fitting needs 2 folds or more"):
            cross_fit(split, samples, folds)
