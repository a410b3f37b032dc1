"""The controlled study on recordings: its truth, its networks, and what is left on the disk."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pycdgkd.data.synthetic import plan_study, resting
from pycdgkd.errors import InputError
from pycdgkd.experiments.controlled import claims as drawn
from pycdgkd.experiments.controlled import run
from pycdgkd.experiments.controlled.claim import branches
from pycdgkd.experiments.controlled.lab import Recipe
from pycdgkd.experiments.controlled.recordings import claims
from pycdgkd.experiments.controlled.recordings.lab import RecordedLab
from pycdgkd.experiments.controlled.recordings.study import RecordedStudy, record_study
from pycdgkd.experiments.controlled.run import recorded_size, run_size
from pycdgkd.training.chain import Chain

from .test_controlled import TINY as TINY_FEATURES
from .test_controlled import visible

USUAL, NOISY = (claims.smaller(one, 2, 10) for one in claims.CONDITIONS)
BRIEF = replace(claims.TRAINING, optim=replace(claims.TRAINING.optim, epochs=1, warmup=0))
# One claim for each condition.
SOME = tuple(claim for claim in claims.CLAIMS if claim.key in ("rebalancing", "direction"))
TINY = replace(recorded_size("tiny", 1, (USUAL, NOISY), BRIEF), claims=SOME)
FEATURES = replace(TINY_FEATURES, seeds=1, claims=drawn.CLAIMS[:1])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> RecordedStudy:
    return record_study(NOISY, 0, tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def lab(study: RecordedStudy, tmp_path: Path) -> RecordedLab:
    return RecordedLab.open(study, BRIEF, 0, tmp_path)


# The study.


def test_noise_of_the_labels_changes_ratings_and_nothing_else(
    study: RecordedStudy, tmp_path: Path
) -> None:
    cleaner = record_study(USUAL, 0, tmp_path)
    assert np.array_equal(cleaner.truth, study.truth)
    for name in ("video", "eeg", "frame_mask"):
        assert np.array_equal(getattr(cleaner.cache, name), getattr(study.cache, name))
    ratings = [one.cache.samples["arousal"] for one in (cleaner, study)]
    wrong = [
        (values > 5) != one.truth.astype(bool)
        for values, one in zip(ratings, (cleaner, study), strict=True)
    ]
    assert not np.array_equal(*ratings)
    assert wrong[1].sum() > wrong[0].sum()
    assert wrong[1][wrong[0]].all()


def test_the_truth_is_the_latent_class(study: RecordedStudy) -> None:
    assert study.cache.synthetic
    assert not list(study.cache.path.parent.glob("study*"))  # the recordings are gone
    config = NOISY.seeded(0)
    trials = {(t.subject, t.trial): t for one in plan_study(config) for t in one}
    keys = zip(study.cache.samples["subject"], study.cache.samples["trial"], strict=True)
    found = [trials[int(subject), int(trial)] for subject, trial in keys]
    assert study.truth.tolist() == [int(trial.arousal > 0) for trial in found]
    for name, row in (("video", 0), ("eeg", 1)):
        shown = np.array([np.arctanh(getattr(trial, f"{name}_arousal")) for trial in found])
        rest = np.array([resting(config, trial.subject)[row, 1] for trial in found])
        assert np.array_equal(study.oracle[name] > 0, shown > rest)


def test_crops_hold_the_faces_that_the_detector_found(study: RecordedStudy) -> None:
    manifest = study.cache.manifest
    assert manifest["parameters"]["faces"] == "mtcnn"
    assert manifest["face_miss_rate"] < 0.05
    assert study.cache.video.shape[1:] == (4, 3, 48, 48)
    middle = study.cache.video[:, :, :, 16:32, 16:32].astype(float)
    assert (middle[:, :, 0] > middle[:, :, 2]).mean() > 0.95  # skin: more red than blue


def test_the_best_possible_accuracy_rises_with_strength(
    study: RecordedStudy, tmp_path: Path
) -> None:
    everything = np.arange(len(study.truth))
    weak = replace(NOISY, study=replace(NOISY.study, video_strength=0.0, eeg_strength=0.5))
    other = record_study(weak, 0, tmp_path)
    assert other.oracle_accuracy(everything, ("video",)) == pytest.approx(0.5, abs=0.25)
    assert study.oracle_accuracy(everything) > other.oracle_accuracy(everything)
    assert weak.weaker == ("video",)
    assert replace(weak, study=replace(weak.study, video_strength=1.0)).weaker == ("eeg",)


# Networks and their training.


def test_accuracy_is_on_true_classes_of_test_trials(lab: RecordedLab) -> None:
    net = lab.network(drawn.PLAIN).net
    answers = lab.bench.logits(net, lab.data, lab.test).argmax(1).numpy()
    found = lab.measure(drawn.PLAIN)["accuracy"]
    assert found == pytest.approx((answers == lab.study.truth[lab.test]).mean())
    lab.data.labels[lab.test] = 1 - lab.data.labels[lab.test]  # what test trials were rated
    assert lab.measure(drawn.PLAIN)["accuracy"] == found
    lab.study.truth[lab.test] = 1 - lab.study.truth[lab.test]
    assert lab.measure(drawn.PLAIN)["accuracy"] == pytest.approx(1 - found)
    lab.study.truth[lab.test] = 1 - lab.study.truth[lab.test]


def test_training_sees_ratings_and_no_test_sample(lab: RecordedLab) -> None:
    train = lab.bench.split.train
    rated = lab.study.cache.samples["arousal"][train] > 5
    assert np.array_equal(lab.bench.data.labels[train], rated)
    assert (lab.bench.data.labels[lab.test] == -1).all()
    with pytest.raises(InputError, match="leakage"):
        lab.bench.data.batch(lab.test[:1])


def test_the_student_is_that_of_the_chain_to_the_bit(lab: RecordedLab, tmp_path: Path) -> None:
    bench = lab.bench
    chain = Chain(bench.config, tmp_path / "chain", bench.data, bench.split)
    chain.train()
    for role, recipe in (("teacher", drawn.TEACHER), ("student", drawn.student(drawn.DENSE))):
        ours, theirs = (
            lab.bench.logits(net, lab.data, lab.test)
            for net in (lab.network(recipe).net, chain.load(role))
        )
        assert torch.equal(ours, theirs)


def test_out_of_fold_sources_never_saw_the_ratings_that_they_teach(
    lab: RecordedLab, tmp_path: Path
) -> None:
    other = RecordedLab.open(lab.study, BRIEF, 0, tmp_path / "other")
    lab.teaching(drawn.TEACHER, 4)
    left_out = lab.others[4, 0].bench.split.train
    inside = np.flatnonzero(~np.isin(lab.bench.split.train, left_out))
    places = lab.bench.split.train[inside]
    other.bench.data.labels[places] = 1 - other.bench.data.labels[places]
    for folds, equal in ((4, True), (0, False)):
        ours, theirs = (one.teaching(drawn.TEACHER, folds)[inside] for one in (lab, other))
        assert torch.equal(ours, theirs) is equal
    assert lab.trainings == 4 + 1


def test_branches_are_probed_and_weights_are_logged(lab: RecordedLab) -> None:
    alone, plain, rebalanced = (branches(lab, arm) for arm in claims.CLAIMS[0].arms)
    assert set(alone) == {"weaker", "weaker_nearest", "stronger", "stronger_nearest"}
    assert set(plain) == {*alone, "accuracy"}
    assert set(rebalanced) == {*plain, "lambda"}
    assert 0 <= rebalanced["lambda"] <= 1


def test_other_prototypes_are_refused(lab: RecordedLab) -> None:
    with pytest.raises(InputError, match="prototypes of the dataset and weights by step alone"):
        lab.network(Recipe(prototypes="batch"))


def test_every_arm_of_a_comparison_exists() -> None:
    for claim in claims.CLAIMS:
        names = {arm.name for arm in claim.arms}
        assert claim.reference in names
        assert claim.comparisons
        assert set(claim.conditions) <= {condition.name for condition in claims.CONDITIONS}
        assert all({*one.ours, *one.theirs} <= names for one in claim.comparisons)


# The run.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        run_size(out, FEATURES, recordings=TINY)
        assert not list(Path(tempfile.gettempdir()).iterdir())  # recordings, caches, checkpoints
    return out


def test_the_number_of_processes_changes_no_digit(finished: Path, tmp_path: Path) -> None:
    (tmp_path / run.JOURNAL).write_bytes((finished / run.JOURNAL).read_bytes())
    told: list[str] = []
    run_size(tmp_path, FEATURES, 2, told.append, TINY)
    assert [line.split("  ")[0] for line in told] == ["recorded study 1/2", "recorded study 2/2"]
    for name in ("controlled.json", "controlled.html"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_results_and_page_have_both_parts(finished: Path) -> None:
    results = json.loads((finished / run.RESULTS).read_text())
    recorded = results["recordings"]
    assert results["seeds"] == recorded["seeds"] == [0]
    assert [entry["name"] for entry in recorded["conditions"]] == [USUAL.name, NOISY.name]
    assert recorded["schedule"]["preset"] == "nano"
    assert recorded["ground"]["usual study"]["test trials"]["mean"] == 9
    # Both alone, fusion, teacher and assistants; the chain and four students beside the control.
    assert recorded["networks"] == 6 + 8
    source = (finished / "controlled.html").read_text(encoding="utf-8")
    assert source.count("<svg") == 1 + len(SOME)
    text = visible(finished / "controlled.html")
    for number, claim in enumerate(SOME, start=1):
        assert f"R{number}. {claim.title}" in text
        assert f'id="R{claim.key}"' in source
    assert "so nothing on recordings can be firm" in text
    assert "usual study 0.8, 2.0 10 %" in text


def test_a_change_of_one_part_leaves_the_jobs_of_the_other(finished: Path, tmp_path: Path) -> None:
    for name in (run.JOURNAL, run.RECORDED_JOURNAL):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    other = replace(BRIEF, optim=replace(BRIEF.optim, lr=1e-4))
    with pytest.raises(InputError, match=r"recorded_jobs\.jsonl holds jobs of other settings"):
        run_size(tmp_path, FEATURES, recordings=replace(TINY, schedule=other))
    told: list[str] = []
    run_size(tmp_path, FEATURES, 1, told.append, TINY)
    assert told == []
    assert (tmp_path / run.RESULTS).read_bytes() == (finished / run.RESULTS).read_bytes()
