"""The controlled study: its truth, its trainings, its journal, and a page that follows numbers."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pycdgkd.errors import InputError
from pycdgkd.experiments.controlled import claims, run, verdicts
from pycdgkd.experiments.controlled.lab import Lab, Recipe, linear_probe, nearest_prototype
from pycdgkd.experiments.controlled.nets import Output, build_net
from pycdgkd.experiments.controlled.page import write_page
from pycdgkd.experiments.controlled.run import Size, run_size
from pycdgkd.experiments.controlled.study import (
    Condition,
    Study,
    draw_study,
    oracle_accuracy,
    trial_folds,
)
from pycdgkd.experiments.controlled.summary import summarise
from pycdgkd.experiments.controlled.training import Eq9, Guidance, Rebalancing, Schedule
from pycdgkd.experiments.controlled.verdicts import tally, verdict
from pycdgkd.experiments.statistics import Difference

SMALL = Condition("usual study", train_trials=30, val_trials=10, test_trials=30, subjects=5)
BRIEF = Schedule(epochs=2, patience=2)
TINY = Size(
    "tiny", 2, (SMALL, replace(SMALL, name="clean labels", label_noise=0.0)), schedule=BRIEF
)


@pytest.fixture(scope="module")
def study() -> Study:
    return draw_study(SMALL, 0)


# The study.


def test_trials_lie_in_one_part_and_share_what_they_should(study: Study) -> None:
    parts = (study.train, study.val, study.test)
    trials = [set(part.trials) for part in parts]
    assert [len(some) for some in trials] == [30, 10, 30]
    assert not trials[0] & trials[1]
    assert not (trials[0] | trials[1]) & trials[2]
    for part in parts:
        for trial in set(part.trials):
            inside = part.trials == trial
            assert inside.sum() == SMALL.samples
            for values in (part.labels.numpy(), part.truth.numpy(), part.subjects):
                assert len(set(values[inside])) == 1


def test_labels_are_wrong_as_often_as_said_and_never_in_the_test() -> None:
    drawn = draw_study(Condition("large", label_noise=0.3, train_trials=4000, samples=1), 0)
    assert (drawn.train.labels != drawn.train.truth).double().mean() == pytest.approx(0.3, abs=0.03)
    assert (drawn.val.labels != drawn.val.truth).any()
    assert torch.equal(drawn.test.labels, drawn.test.truth)


def test_conditions_of_a_seed_share_what_they_can(study: Study) -> None:
    noisier = draw_study(replace(SMALL, label_noise=0.4), 0)
    assert torch.equal(study.train.video, noisier.train.video)
    wrong = study.train.labels != study.train.truth
    assert torch.equal(noisier.train.labels[wrong], study.train.labels[wrong])
    assert not torch.equal(draw_study(SMALL, 1).train.video, study.train.video)


def test_features_are_scaled_by_the_train_part_alone(study: Study) -> None:
    torch.testing.assert_close(study.train.eeg.mean(0), torch.zeros(14), atol=1e-6, rtol=0)
    assert (study.test.eeg.mean(0).abs() > 1e-3).any()


def test_the_best_possible_accuracy_rises_with_strength() -> None:
    steps = [0.0, 0.7, 1.4, 2.1]
    large = Condition("large", test_trials=2000)
    found = [
        oracle_accuracy(draw_study(replace(large, video_strength=s), 0).test, ("video",))
        for s in steps
    ]
    assert found[0] == pytest.approx(0.5, abs=0.03)
    assert (np.diff(found) > 0.03).all()
    test = draw_study(large, 0).test
    video, eeg, both = (oracle_accuracy(test, m) for m in (("video",), ("eeg",), ("video", "eeg")))
    assert video < eeg < both


def test_a_linear_signal_gives_the_accuracy_of_its_law() -> None:
    condition = Condition("linear", video_strength=1.0, nonlinear=0.0, test_trials=5000)
    found = oracle_accuracy(draw_study(condition, 0).test, ("video",))
    assert found == pytest.approx(0.8413, abs=0.01)  # the normal law at 1


def test_a_network_reads_what_no_linear_map_can() -> None:
    condition = Condition("pair", video_strength=2.5, nonlinear=1.0, label_noise=0.0)
    drawn = draw_study(condition, 0)
    told, truth = drawn.train.labels, drawn.test.truth
    assert linear_probe(drawn.train.video, told, drawn.test.video, truth) < 0.6
    assert Lab(drawn, 0, Schedule()).measure(claims.VIDEO)["accuracy"] > 0.8


@pytest.mark.parametrize(
    "wrong", [{"label_noise": 0.6}, {"video_dims": 2}, {"train_trials": 0}, {"nonlinear": -1}]
)
def test_impossible_conditions_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"condition 'bad': {next(iter(wrong))}: expected"):
        Condition("bad", **wrong)


def test_folds_part_the_trials(study: Study) -> None:
    folds = trial_folds(study.train, 4, 0)
    rows = np.sort(np.concatenate([inside for _, inside in folds]))
    assert np.array_equal(rows, np.arange(len(study.train)))
    for outside, inside in folds:
        assert not set(study.train.trials[outside]) & set(study.train.trials[inside])
        assert len(outside) + len(inside) == len(study.train)
    with pytest.raises(InputError, match="folds: expected 2 to 30"):
        trial_folds(study.train, 31, 0)


# Networks and their training.


def test_students_of_a_seed_start_from_equal_weights(study: Study) -> None:
    taught = Recipe(sees=("video",), sources=(claims.TEACHER,))
    assert taught.role == claims.VIDEO.role != claims.TEACHER.role
    first, second = (build_net(("video",), 0, study.train, 16, 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_eeg_branches_are_ever_simpler(study: Study) -> None:
    sizes = [
        sum(p.numel() for p in build_net(("eeg",), level, study.train, 16, 0).parameters())
        for level in range(3)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("weights", ["step", "epoch"])
def test_rebalancing_is_the_papers_loss(study: Study, weights: str) -> None:
    """Eqs. 1-6 written out; by epoch the rates are those of the whole part."""
    part = study.train
    net = build_net(("video", "eeg"), 0, part, 16, 0)
    objective = Rebalancing(part, 16, "dataset", weights)
    objective.begin_epoch(net)
    output, rows = net(*net.inputs(part)), torch.arange(0, len(part), 3)
    chosen = Output(output.logits[rows], {n: z[rows] for n, z in output.features.items()})
    rates, terms = [], []
    for features in output.features.values():
        means = torch.stack([features[part.labels == c].mean(0) for c in range(2)])
        log_p = -((features[:, None] - means) ** 2).sum(2)
        log_true = log_p.log_softmax(1)[torch.arange(len(part)), part.labels]
        asked = log_true[rows] if weights == "step" else log_true
        rates.append(float(asked.detach().exp().sum()))
        terms.append(-log_true[rows].mean())
    lambdas = [min(1.0, max(rates) / rate - 1) for rate in rates]
    expected = 0.5 * F.cross_entropy(chosen.logits, part.labels[rows])
    expected += 0.5 * sum(w * term for w, term in zip(lambdas, terms, strict=True))
    torch.testing.assert_close(objective(chosen, rows), expected, rtol=1e-4, atol=1e-6)
    assert objective.log()["lambda_video"] == pytest.approx(lambdas[0], rel=1e-3)
    assert max(lambdas) > 0


def test_batch_means_are_of_the_batch(study: Study) -> None:
    objective = Rebalancing(study.train, 16, "batch", "step")
    net = build_net(("video", "eeg"), 0, study.train, 16, 0)
    objective.begin_epoch(net)
    rows = torch.tensor([0, 1])  # a trial alone: its own mean, so both modalities look converged
    output = net(*(tensor[rows] for tensor in net.inputs(study.train)))
    objective(output, rows)
    assert objective.log() == pytest.approx(
        {"lambda_video": 0.0, "lambda_eeg": 0.0, "rate_video": 1.0, "rate_eeg": 1.0}
    )


def test_guidance_is_eq_9(study: Study) -> None:
    torch.manual_seed(0)
    table = torch.randn(2, len(study.train), 2)
    settings = Eq9("all", "forward", 4.0, 0.7)
    logits, rows = torch.randn(5, 2), torch.arange(5)
    loss = Guidance(study.train, table, settings, 0)(Output(logits, {}), rows)
    sources = (table[:, :5] / 4).softmax(2)
    kl = (sources * (sources.log() - (logits / 4).log_softmax(1))).sum(2).mean()
    expected = 0.3 * F.cross_entropy(logits, study.train.labels[:5]) + 0.7 * kl
    torch.testing.assert_close(loss, expected)


def test_out_of_fold_sources_never_saw_the_labels_that_they_teach(study: Study) -> None:
    source = claims.DENSE[1]
    lab = Lab(study, 0, BRIEF)
    _, inside = trial_folds(study.train, 4, 0)[0]
    labels = study.train.labels.clone()
    labels[inside] = 1 - labels[inside]
    other = Lab(replace(study, train=replace(study.train, labels=labels)), 0, BRIEF)
    assert torch.equal(lab.teaching(source, 4)[inside], other.teaching(source, 4)[inside])
    assert not torch.equal(lab.teaching(source, 0)[inside], other.teaching(source, 0)[inside])
    assert lab.trainings == 2 + 4 * 2  # teacher and assistant, and both without each fold


def test_probes_agree_with_their_definitions(study: Study) -> None:
    z, told, asked = study.train.eeg, study.train.labels, study.test.eeg
    with_one = np.c_[z.double().numpy(), np.ones(len(z))]
    weights = np.linalg.lstsq(with_one, 2.0 * told.numpy() - 1, rcond=None)[0]
    score = np.c_[asked.double().numpy(), np.ones(len(asked))] @ weights
    right = ((score > 0) == study.test.truth.numpy().astype(bool)).mean()
    assert linear_probe(z, told, asked, study.test.truth) == pytest.approx(right, abs=0.02)
    means = [z[told == c].mean(0) for c in (0, 1)]
    nearer = (asked - means[1]).norm(dim=1) < (asked - means[0]).norm(dim=1)
    right = (nearer.long() == study.test.truth).double().mean()
    assert nearest_prototype(z, told, asked, study.test.truth) == pytest.approx(float(right))


def test_every_arm_of_a_comparison_exists() -> None:
    for claim in claims.CLAIMS:
        names = {arm.name for arm in claim.arms}
        assert len(names) == len(claim.arms)
        assert claim.reference in names
        assert set(claim.conditions) <= {condition.name for condition in claims.CONDITIONS}
        for one in claim.comparisons:
            assert {*one.ours, *one.theirs} <= names
            assert not set(one.ours) & set(one.theirs)


# The run.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("controlled")
    assert run_size(out, TINY) == out / "controlled.html"
    return out


def test_the_number_of_processes_changes_no_digit(finished: Path, tmp_path: Path) -> None:
    run_size(tmp_path, TINY, 2)
    for name in ("controlled.json", "controlled.html"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_stopped_run_goes_on_where_it_was(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (finished / run.JOURNAL).read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 4
    (tmp_path / run.JOURNAL).write_bytes(b"".join(lines[:4]) + lines[4][:50])  # killed in a line
    done = []
    original = run.run_job
    monkeypatch.setattr(run, "run_job", lambda job: done.append(job.key) or original(job))
    told: list[str] = []
    run_size(tmp_path, TINY, progress=told.append)
    assert done == [("clean labels", 1)]
    assert len(told) == 1
    assert told[0].startswith("controlled study 4/4  clean labels, seed 1  58 networks in ")
    assert (tmp_path / run.RESULTS).read_bytes() == (finished / run.RESULTS).read_bytes()


def test_jobs_of_other_settings_are_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / run.JOURNAL).write_bytes((finished / run.JOURNAL).read_bytes())
    with pytest.raises(InputError, match="holds jobs of other settings or versions"):
        run_size(tmp_path, replace(TINY, schedule=Schedule(epochs=3)))
    (tmp_path / run.JOURNAL).write_bytes(b"{\n")
    with pytest.raises(InputError, match="is damaged"):
        run_size(tmp_path, TINY)


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="size: expected one of full, quick, got 'huge'"):
        run.run_controlled(tmp_path, "huge")
    with pytest.raises(InputError, match="jobs: expected at least 1, got 0"):
        run_size(tmp_path, TINY, 0)


def test_the_results_say_what_they_depend_on(finished: Path) -> None:
    results = json.loads((finished / run.RESULTS).read_text())
    assert results["torch"] == str(torch.__version__)
    assert results["seeds"] == [0, 1]
    assert results["networks"] == 4 * 58
    assert [entry["name"] for entry in results["conditions"]] == ["usual study", "clean labels"]
    arm = results["claims"][1]["arms"]["usual study"]["CDGKD"]["accuracy"]
    assert arm["mean"] == pytest.approx(np.mean(arm["values"]))
    assert arm["error"] == pytest.approx(np.std(arm["values"], ddof=1) / 2**0.5)


# Verdicts and the page.


@pytest.mark.parametrize(
    ("low", "high", "p", "expects", "word"),
    [
        (0.001, 0.02, 0.01, "higher", "holds"),
        (0.001, 0.02, 0.2, "higher", "leans that way"),
        (-0.001, 0.02, 0.01, "higher", "no difference seen"),
        (-0.02, -0.001, 0.01, "higher", "the opposite"),
        (-0.02, -0.001, 0.2, "higher", "leans the other way"),
        (-0.02, -0.001, 0.01, "lower", "holds"),
        (0.001, 0.02, 0.01, "lower", "the opposite"),
        (0.001, 0.02, 0.01, "either", "higher"),
        (-0.02, -0.001, 0.2, "either", "leans lower"),
        (-0.009, 0.003, 0.01, "not lower", "holds"),
        (-0.009, 0.003, 0.2, "not lower", "leans that way"),
        (-0.011, 0.003, 0.01, "not lower", "not settled"),
        (-0.03, -0.011, 0.01, "not lower", "the opposite"),
    ],
)
def test_verdicts_follow_interval_and_p(
    low: float, high: float, p: float, expects: str, word: str
) -> None:
    assert verdict(Difference((low + high) / 2, low, high, p), p, expects) == word
    assert word in verdicts.ORDER


def test_tallies_put_the_best_first() -> None:
    words = {"a": "the opposite", "b": "holds", "c": "holds"}
    assert tally(words) == [("holds", ["b", "c"]), ("the opposite", ["a"])]


def made_up(finished: Path, gain: float) -> dict[str, Any]:
    """Results of 12 seeds in which CDGKD is ``gain`` above every other arm, give or take."""
    results: dict[str, Any] = json.loads((finished / run.RESULTS).read_text())
    lines = (finished / run.JOURNAL).read_text().splitlines()[1:]
    patterns = {entry["condition"]: entry for entry in map(json.loads, lines)}
    noise = np.random.default_rng(0)
    jobs = {}
    for name, pattern in patterns.items():
        for seed in range(12):
            entry = json.loads(json.dumps(pattern))
            for arms in entry["values"].values():
                for arm, values in arms.items():
                    for metric in values:
                        shift = gain if arm == "CDGKD" else 0.0
                        values[metric] = 0.7 + shift + 0.001 * noise.standard_normal()
            jobs[name, seed] = entry
    summary = summarise(claims.CLAIMS, list(patterns), range(12), jobs)
    return {**results, "seeds": list(range(12)), **summary}


@pytest.mark.parametrize(("gain", "word"), [(0.03, "holds"), (-0.03, "the opposite")])
def test_the_page_says_what_the_numbers_say(
    finished: Path, tmp_path: Path, gain: float, word: str
) -> None:
    results = made_up(finished, gain)
    guidance = results["claims"][1]
    for comparison in guidance["comparisons"]:
        expected = word if comparison["title"].startswith("CDGKD") else "no difference seen"
        for found in comparison["by_condition"].values():
            assert found["verdict"] == expected
            assert found["p"] <= found["p_holm"]
    text = visible(write_page(tmp_path, results))
    assert f"CDGKD is better than KD {word} (2 of 2: usual study, clean labels)" in text
    assert "KD helps no difference seen (2 of 2: usual study, clean labels)" in text
    assert f"{word} {100 * gain:+.1f}"[:-1] in text
    assert "rebalancing does no harm to fusion holds (2 of 2" in text
    assert "run the full size" not in text


def test_the_page_is_whole_and_owns_up_to_few_seeds(finished: Path) -> None:
    page = finished / "controlled.html"
    text = visible(page)
    assert "With 2 seeds no p can be below 0.500" in text
    assert "says nothing about accuracies on DEAP" in text
    for claim in claims.CLAIMS:
        assert claim.title in text
    source = page.read_text(encoding="utf-8")
    assert source.count("<svg") == len(claims.CLAIMS)
    assert "http://" not in source.replace("http://www.w3.org", "")


def visible(page: Path) -> str:
    """The words of a page, without its style and drawings."""
    text = re.sub(r"<(style|svg).*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())
