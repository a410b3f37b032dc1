from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

import pycdgkd
from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import Split
from pycdgkd.errors import InputError
from pycdgkd.training.config import OptimConfig, TrainConfig, load_config
from pycdgkd.training.recordings import Recordings
from pycdgkd.training.run import evaluate, train

Run: TypeAlias = tuple[Path, dict[str, Any]]
FIGURES = ("accuracy", "balanced_accuracy", "f1")


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def predictions(run: Path, role: str) -> list[dict[str, str]]:
    with (run / role / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_results_have_the_documented_content(
    finished: Run, cache: Path, quick: TrainConfig
) -> None:
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == results
    opened = Cache.open(cache)
    split = Split.load(out / "split.json")
    expected = {
        "pycdgkd": pycdgkd.__version__,
        "torch": torch.__version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": 1,
        "label": "valence",
        "thresholds": [5.0],
        "classes": ["low", "high"],
        "split": {"kind": "trial", "fold": 1},
        "seed": 0,
        "preset": "nano",
        "split_hash": split.hash,
        "cache_hash": opened.hash,
        "cache": str(cache.resolve()),
        "synthetic": True,
    }
    assert {name: results[name] for name in expected} == expected
    assert set(results) - set(expected) == {
        *("counts", "majority", "networks", "sources", "comparison", "warnings")
    }
    assert load_config(out / "config.toml") == quick
    for part, size, trials in (("train", 72, 36), ("val", 24, 12), ("test", 24, 12)):
        entry = results["counts"][part]
        labels = opened.samples["valence"][getattr(split, part)] > 5
        assert (entry["samples"], entry["trials"]) == (size, trials)
        assert entry["classes"] == [int((~labels).sum()), int(labels.sum())]
    assert results["sources"] == {
        role: {"val_accuracy": results["networks"][role]["val_accuracy"]}
        for role in ("teacher", "assistant_1")
    }


def test_networks_are_described_in_order(finished: Run) -> None:
    networks = finished[1]["networks"]
    assert list(networks) == ["teacher", "assistant_1", "student", "control"]
    assert [entry["modalities"] for entry in networks.values()] == [["video", "eeg"]] * 2 + [
        ["video"]
    ] * 2
    assert [entry["sources"] for entry in networks.values()] == [
        [],
        ["teacher"],
        ["teacher", "assistant_1"],
        [],
    ]
    for role, entry in networks.items():
        with (finished[0] / role / "log.csv").open(newline="") as file:
            log = list(csv.DictReader(file))
        assert entry["epochs"] == len(log)
        best = log[entry["best_epoch"] - 1]
        assert float(best["val_accuracy"]) == pytest.approx(entry["val_accuracy"], rel=1e-6)
        assert entry["val_accuracy"] == max(float(row["val_accuracy"]) for row in log)
        seconds = sum(float(row["seconds"]) for row in log)
        assert entry["seconds"] == pytest.approx(seconds, abs=0.01)


def test_figures_are_those_of_the_predictions(finished: Run) -> None:
    out, results = finished
    split = Split.load(out / "split.json")
    for role, entry in results["networks"].items():
        rows = predictions(out, role)
        assert [int(row["sample"]) for row in rows] == split.test.tolist()
        labels = np.array([int(row["label"]) for row in rows])
        answers = np.array([int(row["predicted"]) for row in rows])
        chances = np.array([[float(row[f"probability_{k}"]) for k in (0, 1)] for row in rows])
        assert np.allclose(chances.sum(1), 1, atol=1e-6)
        assert (chances.argmax(1) == answers).all()
        test = entry["test"]
        assert test["accuracy"]["value"] == pytest.approx((labels == answers).mean())
        assert (test["samples"], test["trials"]) == (24, 12)
        counts = [[int(((labels == a) & (answers == b)).sum()) for b in (0, 1)] for a in (0, 1)]
        assert test["confusion"] == counts
        for name in FIGURES:
            assert 0 <= test[name]["low"] <= test[name]["value"] <= test[name]["high"] <= 1


def test_majority_is_chosen_on_the_train_split(finished: Run) -> None:
    results = finished[1]
    choice = int(np.argmax(results["counts"]["train"]["classes"]))
    test = results["counts"]["test"]["classes"]
    assert results["majority"]["class"] == choice
    assert results["majority"]["accuracy"]["value"] == pytest.approx(test[choice] / sum(test))


def test_chain_learns(cache: Path, quick: TrainConfig, tmp_path: Path) -> None:
    """All networks beat the majority class clearly on recordings that show their labels."""
    said: list[str] = []
    config = replace(quick, optim=replace(quick.optim, epochs=6, patience=6))
    results = train(cache, tmp_path / "run", config, progress=said.append)
    for role, entry in results["networks"].items():
        assert entry["test"]["balanced_accuracy"]["value"] > 0.8, role
        assert entry["test"]["accuracy"]["low"] > 0.6, role
    assert said[:3] == [
        "train: 72 samples of 36 trials, valence low {} high {}".format(
            *results["counts"]["train"]["classes"]
        ),
        "val: 24 samples of 12 trials, valence low {} high {}".format(
            *results["counts"]["val"]["classes"]
        ),
        "test: 24 samples of 12 trials, valence low {} high {}".format(
            *results["counts"]["test"]["classes"]
        ),
    ]
    assert any("rate video" in line and "lambda video" in line for line in said)


def test_no_information_no_learning(
    make_cache: Callable[..., Path], quick: TrainConfig, tmp_path: Path
) -> None:
    """Recordings without any trace of the label: a better result would be leakage."""
    results = train(make_cache(seed=5, strength=0.0), tmp_path / "run", quick)
    for role, entry in results["networks"].items():
        assert entry["test"]["accuracy"]["low"] < 0.6, role


def test_evaluate_finds_the_same_figures(finished: Run) -> None:
    again = evaluate(finished[0])
    assert again.pop("differences") == []
    assert again == finished[1]


def test_evaluate_names_what_differs(copy: Path) -> None:
    results = json.loads((copy / "results.json").read_text())
    true = results["networks"]["student"]["test"]["accuracy"]["value"]
    results["networks"]["student"]["test"]["accuracy"]["value"] = 0.123
    (copy / "results.json").write_text(json.dumps(results))
    again = evaluate(copy)
    assert again["differences"] == [
        f"networks/student/test/accuracy/value: 0.123 in results.json, {true} computed"
    ]
    assert again["networks"]["student"]["test"]["accuracy"]["value"] == true


def test_evaluate_with_a_moved_cache(finished: Run, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "moved")
    assert evaluate(finished[0], cache=tmp_path / "moved")["differences"] == []


def test_evaluate_refuses_another_cache(finished: Run, make_cache: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="trained with another cache"):
        evaluate(finished[0], cache=make_cache(seed=7))


def test_evaluate_refuses_another_split(copy: Path) -> None:
    content = json.loads((copy / "split.json").read_text())
    content["train"], content["test"] = content["test"], content["train"]
    (copy / "split.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="was drawn for other samples"):
        evaluate(copy)


def test_evaluate_refuses_a_network_of_another_run(
    copy: Path, cache: Path, quick: TrainConfig, tmp_path: Path
) -> None:
    """Its teacher may have seen our test trials."""
    other = replace(
        quick,
        assistants=0,
        split=replace(quick.split, seed=3),
        optim=OptimConfig(epochs=1, batch_size=36),
    )
    train(cache, tmp_path / "other", other)
    shutil.copy(tmp_path / "other" / "student" / "model.safetensors", copy / "student")
    with pytest.raises(InputError, match="student was trained with another split hash"):
        evaluate(copy)


def test_evaluate_needs_a_finished_run(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run"):
        evaluate(tmp_path)
    (copy / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results.json is damaged"):
        evaluate(copy)


def test_used_folder_is_refused(cache: Path, quick: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty; .*--resume"):
        train(cache, tmp_path, quick)
    with pytest.raises(InputError, match="holds no run to resume"):
        train(cache, tmp_path, quick, resume=True)
    with pytest.raises(InputError, match="is a file; expected a folder"):
        train(cache, tmp_path / "notes.txt", quick)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_refuses_another_configuration(copy: Path, cache: Path, quick: TrainConfig) -> None:
    other = replace(quick, optim=replace(quick.optim, lr=0.5))
    with pytest.raises(InputError, match=r"optim.lr: 0.5 instead of 0.002.*--config .*config.toml"):
        train(cache, copy, other, resume=True)
    assert train(cache, copy, replace(quick, device="cpu", threads=1), resume=True)


def test_resume_refuses_another_cache(
    copy: Path, quick: TrainConfig, make_cache: Callable[..., Path]
) -> None:
    """Same trials, so the same split, but other recordings."""
    (copy / "results.json").unlink()
    with pytest.raises(InputError, match="teacher was trained with another cache hash"):
        train(make_cache(seed=7), copy, quick, resume=True)


def test_resume_refuses_another_split(copy: Path, cache: Path, quick: TrainConfig) -> None:
    content = json.loads((copy / "split.json").read_text())
    content["hash"] = "0" * 64
    (copy / "split.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="started with another split"):
        train(cache, copy, quick, resume=True)


def test_one_class_in_the_train_split_is_an_error(
    cache: Path, quick: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"class 'high' of arousal is missing from the train split of 72"
    ):
        train(cache, tmp_path / "run", replace(quick, label="arousal"))
    with pytest.raises(InputError, match=r"class 'low' of dominance is missing"):
        train(cache, tmp_path / "run", replace(quick, label="dominance"))
    assert not (tmp_path / "run").exists()


def test_rating_at_the_threshold_is_low(cache: Path) -> None:
    opened = Cache.open(cache)
    data = Recordings.open(opened, TrainConfig(thresholds=(7.0,)), torch.device("cpu"))
    assert data.labels.sum() == 0
    for config, expected in (
        (TrainConfig(thresholds=(np.nextafter(7.0, 0.0),)), [0, 1]),
        (TrainConfig(thresholds=(7.0,), ties="high"), [0, 1]),
        (TrainConfig(thresholds=(7.0,), ties="drop"), [-1, 0]),
        (TrainConfig(thresholds=(2.0, 6.0, 8.0)), [1, 2]),
    ):
        data = Recordings.open(opened, config, torch.device("cpu"))
        assert np.unique(data.labels).tolist() == expected
        assert (data.labels == expected[1]).sum() == len(opened) // 2
    assert data.classes == ("up to 2", "2 to 6", "6 to 8", "above 8")


def test_missing_rating_is_named(cache: Path) -> None:
    opened = Cache.open(cache)
    opened.samples["liking"][13] = np.nan
    with pytest.raises(InputError, match=r"sample 13 .* has no liking rating"):
        Recordings.open(opened, TrainConfig(label="liking"), torch.device("cpu"))


def test_unknown_device_is_named(cache: Path, quick: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device 'cuda:99' is not there: torch sees"):
        train(cache, tmp_path / "run", replace(quick, device="cuda:99"))


def test_training_leaves_no_trace_in_torch(cache: Path, quick: TrainConfig, tmp_path: Path) -> None:
    """Generator state, thread count and the deterministic switch are the caller's."""
    torch.set_num_threads(2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    config = replace(quick, assistants=0, threads=1, optim=replace(quick.optim, epochs=1))
    results = train(cache, tmp_path / "run", config)
    assert results["threads"] == 1
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009 - untyped


def test_source_worse_than_the_student_is_warned_of(
    cache: Path, quick: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycdgkd.training import results as module
    from pycdgkd.training.task import FitState

    said: list[list[str]] = []
    original = module._warnings

    def lowered(chain: Any, states: dict[str, FitState]) -> list[str]:
        states["teacher"].best_accuracy, states["student"].best_accuracy = 0.5, 0.75
        said.append(original(chain, states))
        return said[-1]

    monkeypatch.setattr(module, "_warnings", lowered)
    config = replace(quick, assistants=0, optim=replace(quick.optim, epochs=1))
    results = train(cache, tmp_path / "run", config)
    assert results["warnings"] == [
        "teacher is worse on the validation split than the student that learned from it "
        "(0.500 against 0.750)"
    ]
