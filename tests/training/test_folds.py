"""Cross-validated runs, other labels and more classes than two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pycdgkd.cli import main
from pycdgkd.data import Cache
from pycdgkd.data.splits import Split
from pycdgkd.errors import InputError
from pycdgkd.report import write_report
from pycdgkd.report.folds import folds_table, write_folds_report
from pycdgkd.training.config import SplitConfig, TrainConfig, to_toml
from pycdgkd.training.folds import fold_folder, summarise, train_folds
from pycdgkd.training.recordings import Recordings
from pycdgkd.training.run import evaluate, train


@pytest.fixture(scope="module")
def brief(quick: TrainConfig) -> TrainConfig:
    split = SplitConfig(kind="subject-kfold", folds=3, fractions=(0.6, 0.2, 0.2))
    return replace(quick, assistants=0, split=split, optim=replace(quick.optim, epochs=1))


@pytest.fixture(scope="module")
def folded(
    cache: Path, brief: TrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("folds") / "run"
    return out, train_folds(cache, out, brief)


def test_every_fold_is_an_ordinary_run(cache: Path, folded: tuple[Path, dict[str, Any]]) -> None:
    out, summary = folded
    samples = Cache.open(cache).samples
    tested: list[int] = []
    for fold in (1, 2, 3):
        split = Split.load(fold_folder(out, fold) / "split.json")
        split.check(samples)
        assert (split.kind, split.fold) == ("subject-kfold", fold)
        subjects = [set(samples["subject"][getattr(split, part)]) for part in Split.PARTS]
        assert not subjects[0] & subjects[1]
        assert not subjects[0] & subjects[2]
        assert not subjects[1] & subjects[2]
        tested += split.test.tolist()
        assert evaluate(fold_folder(out, fold))["differences"] == []
    assert sorted(tested) == list(range(len(samples["subject"])))
    assert [entry["fold"] for entry in summary["folds"]] == [1, 2, 3]
    assert summary["unfinished"] == []


def test_pooled_figures_are_those_of_all_test_samples(
    folded: tuple[Path, dict[str, Any]],
) -> None:
    out, summary = folded
    for role, figures in summary["networks"].items():
        right = samples = 0
        for fold in (1, 2, 3):
            results = json.loads((fold_folder(out, fold) / "results.json").read_text())
            confusion = np.array(results["networks"][role]["test"]["confusion"])
            right, samples = right + np.trace(confusion), samples + confusion.sum()
        assert figures["samples"] == samples == 120
        assert figures["trials"] == 60
        assert figures["accuracy"]["value"] == pytest.approx(right / samples)
        assert figures["accuracy"]["low"] <= figures["accuracy"]["value"]
    gain = summary["comparison"]["student_minus_control"]["value"]
    networks = summary["networks"]
    expected = networks["student"]["accuracy"]["value"] - networks["control"]["accuracy"]["value"]
    assert gain == pytest.approx(expected)
    assert json.loads((out / "folds.json").read_text()) == summary


def test_some_folds_here_and_some_elsewhere(
    cache: Path, brief: TrainConfig, folded: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Folds of two machines laid together are summed up as those of one."""
    out, whole = folded
    part = train_folds(cache, tmp_path / "run", brief, folds=[2])
    assert [entry["fold"] for entry in part["folds"]] == [2]
    for fold in (1, 3):
        shutil.copytree(fold_folder(out, fold), fold_folder(tmp_path / "run", fold))
    (fold_folder(tmp_path / "run", 4)).mkdir()
    again = summarise(tmp_path / "run")
    assert again["unfinished"] == ["fold_04"]
    assert again["networks"] == whole["networks"]
    page = write_folds_report(tmp_path / "run", again).read_text()
    assert "3 folds by subject-kfold" in page
    assert "Not finished, left out here: fold_04." in page
    assert "warning  not finished, left out: fold_04" in folds_table(again)


def test_folds_that_do_not_belong_together_are_refused(
    cache: Path, brief: TrainConfig, folded: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(folded[0], tmp_path / "run")
    path = fold_folder(tmp_path / "run", 2) / "results.json"
    path.write_text(path.read_text().replace('"label": "valence"', '"label": "liking"'))
    with pytest.raises(InputError, match=r"fold_02 was trained with another label: liking"):
        summarise(tmp_path / "run")
    with pytest.raises(InputError, match=r"has 3 folds; got 4"):
        train_folds(cache, tmp_path / "other", brief, folds=[4])
    with pytest.raises(InputError, match=r"is not empty"):
        train_folds(cache, tmp_path / "run", brief)
    with pytest.raises(InputError, match=r"holds no finished fold"):
        summarise(tmp_path / "none")


def test_the_command_trains_resumes_and_reports(
    cache: Path, brief: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(to_toml(brief))
    command = ["train", str(cache), "--out", str(tmp_path / "run"), "--split", "stimulus-kfold:4"]
    command += ["--config", str(tmp_path / "c.toml")]
    assert main([*command, "--folds", "1"]) == 0
    assert main([*command, "--folds", "1,3", "--resume"]) == 0
    text = capsys.readouterr().out
    assert "valence, split by stimulus-kfold: 2 folds" in text
    assert "fold 1 of 4: train: " in text
    assert (tmp_path / "run" / "report.html").is_file()
    assert main([*command[:-2], "--folds", "2"]) == 2
    assert main([*command[:4], "--folds", "2"]) == 2
    assert "--folds needs a --split of several folds" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["mood", "valence"])
def test_more_classes_than_two(cache: Path, brief: TrainConfig, tmp_path: Path, label: str) -> None:
    """By class names as by thresholds: prototypes, distillation, figures and report follow."""
    split = SplitConfig(kind="stratified", fractions=(0.6, 0.2, 0.2))
    steps = (5.0,) if label == "mood" else (2.0, 4.0)
    config = replace(brief, label=label, thresholds=steps, split=split)
    if label == "valence":
        with pytest.raises(InputError, match=r"class 'up to 2' of valence is missing"):
            train(cache, tmp_path / "run", config)
        return
    results = train(cache, tmp_path / "run", config)
    assert results["classes"] == ["calm", "glad", "sad"]
    for part in results["counts"].values():
        shares = np.array(part["classes"]) / part["samples"]
        np.testing.assert_allclose(shares, [0.4, 0.3, 0.3], atol=0.1)  # 2 samples a trial
    confusion = results["networks"]["student"]["test"]["confusion"]
    assert np.array(confusion).shape == (3, 3)
    assert "glad" in write_report(tmp_path / "run").read_text()


def test_dropped_ties_take_no_part(make_cache: Callable[..., Path], brief: TrainConfig) -> None:
    cache = Cache.open(make_cache())
    cache.samples["valence"][:20] = 5.0
    config = replace(brief, ties="drop", split=SplitConfig(fractions=(0.6, 0.2, 0.2)))
    data = Recordings.open(cache, config, torch.device("cpu"))
    from pycdgkd.training.run import split_of

    split = split_of(data, config)
    used = np.concatenate([split.train, split.val, split.test])
    assert sorted(used.tolist()) == list(range(20, 120))
    split.check(cache.samples)


def test_an_unknown_label_is_answered_with_the_nearest(cache: Path, brief: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"has no label 'moods'; nearest .*: 'mood'"):
        Recordings.open(Cache.open(cache), replace(brief, label="moods"), torch.device("cpu"))
