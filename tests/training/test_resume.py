"""Same seed, same bits: run twice, interrupted and resumed anywhere."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file

from pycdgkd.errors import InputError
from pycdgkd.training import loop
from pycdgkd.training.checkpoint import load_state, save_state
from pycdgkd.training.config import TrainConfig, load_config
from pycdgkd.training.recordings import Recordings
from pycdgkd.training.run import train

Run: TypeAlias = tuple[Path, dict[str, Any]]


def without_seconds(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    if "seconds" not in rows[0]:
        return rows
    drop = rows[0].index("seconds")
    return [row[:drop] + row[drop + 1 :] for row in rows]


def assert_same_run(ours: Run, theirs: Run, roles: tuple[str, ...]) -> None:
    """Weights bit for bit, every log, every prediction and every figure; times excepted."""
    (a, results), (b, expected) = ours, theirs
    for role in roles:
        assert (a / role / "model.safetensors").read_bytes() == (
            b / role / "model.safetensors"
        ).read_bytes(), role
        for name in ("log.csv", "steps.csv", "predictions.csv"):
            assert without_seconds(a / role / name) == without_seconds(b / role / name), (
                role,
                name,
            )
    assert timeless(results) == timeless(expected)


def timeless(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what may differ between equal runs."""
    networks = {
        role: {name: value for name, value in entry.items() if name != "seconds"}
        for role, entry in results["networks"].items()
    }
    return {**results, "networks": networks}


def interrupt(patch: pytest.MonkeyPatch, after: int) -> None:
    """Raise KeyboardInterrupt when the n-th batch is read, as Ctrl-C would."""
    original = Recordings.batch
    left = itertools.count(after - 1, -1)

    def batch(data: Recordings, indices: Any) -> Any:
        if next(left) == 0:
            raise KeyboardInterrupt
        return original(data, indices)

    patch.setattr(Recordings, "batch", batch)


def test_two_runs_have_equal_bits(
    cache: Path, quick: TrainConfig, finished: Run, tmp_path: Path
) -> None:
    torch.rand(17)  # the state of torch's own generator must not matter
    again = tmp_path / "again", train(cache, tmp_path / "again", quick)
    assert_same_run(again, finished, quick.roles)


def test_another_seed_gives_other_weights(
    cache: Path, quick: TrainConfig, finished: Run, tmp_path: Path
) -> None:
    short = replace(quick, seed=1, assistants=0, optim=replace(quick.optim, epochs=1))
    train(cache, tmp_path / "other", short)
    ours = load_file(tmp_path / "other" / "teacher" / "model.safetensors")
    theirs = load_file(finished[0] / "teacher" / "model.safetensors")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


# Every pass over the train split is 5 batches, over validation and test 2. Teacher: 3 epochs of 12
# (prototypes, training, validation). Assistant: 5 for its source's logits and 3 epochs of 7.
# Student: 5 for the assistant's logits, 3 epochs of 7. Control: 3 epochs of 7. Test: 4 times 2.
@pytest.mark.parametrize(
    ("after", "last_begun"),
    [
        pytest.param(3, "teacher", id="first prototype pass"),
        pytest.param(8, "teacher", id="first epoch"),
        pytest.param(20, "teacher", id="second epoch"),
        pytest.param(39, "teacher", id="source logits"),
        pytest.param(51, "assistant_1", id="assistant"),
        pytest.param(80, "student", id="student"),
        pytest.param(100, "control", id="control"),
        pytest.param(112, "control", id="test"),
    ],
)
def test_resumed_run_has_the_bits_of_an_unbroken_one(
    cache: Path,
    quick: TrainConfig,
    finished: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    last_begun: str,
) -> None:
    out, said = tmp_path / "broken", list[str]()
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            train(cache, out, quick, progress=said.append)
    assert said[-1].startswith("interrupted")
    assert "every finished epoch is kept" in said[-1]
    begun = {path.name for path in out.iterdir() if path.is_dir()}
    assert begun == set(quick.roles[: quick.roles.index(last_begun) + 1])
    torch.rand(5)
    resumed = out, train(cache, out, load_config(out / "config.toml"), resume=True)
    assert_same_run(resumed, finished, quick.roles)


def test_twice_broken_run(
    cache: Path,
    quick: TrainConfig,
    finished: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "broken"
    for after in (30, 25):
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            with pytest.raises(KeyboardInterrupt):
                train(cache, out, quick, resume=out.exists())
    assert_same_run((out, train(cache, out, quick, resume=True)), finished, quick.roles)


def test_killed_between_log_and_checkpoint(
    cache: Path,
    quick: TrainConfig,
    finished: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of an epoch whose checkpoint was never written do not stand in the log twice."""
    out, calls = tmp_path / "broken", list[int]()

    def save(folder: Path, state: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save_state(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", save)
        with pytest.raises(KeyboardInterrupt):
            train(cache, out, quick)
    assert len((out / "teacher" / "log.csv").read_text().splitlines()) == 3
    assert_same_run((out, train(cache, out, quick, resume=True)), finished, quick.roles)


def test_ctrl_c_in_a_process_of_its_own(
    cache: Path, quick: TrainConfig, finished: Run, tmp_path: Path
) -> None:
    out = tmp_path / "broken"
    code = (
        "import sys, torch; from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        "from pycdgkd.training.config import load_config\n"
        "from pycdgkd.training.run import train\n"
        "cache, config, out = map(Path, sys.argv[1:])\n"
        "train(cache, out, load_config(config), progress=lambda s: print(s, flush=True))\n"
    )
    command = [
        sys.executable,
        "-P",
        "-c",
        code,
        str(cache),
        str(finished[0] / "config.toml"),
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if line.startswith("[2/4] assistant_1  epoch 1/"):
            os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0, said
    assert "KeyboardInterrupt" in errors
    assert said[-1].startswith("interrupted: every finished epoch is kept"), said
    assert (out / "teacher" / "model.safetensors").is_file()
    assert not (out / "results.json").exists()
    assert_same_run((out, train(cache, out, quick, resume=True)), finished, quick.roles)


def test_finished_run_is_not_trained_again(
    cache: Path, quick: TrainConfig, finished: Run, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train(cache, out, quick, resume=True) == finished[1]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_checkpoint_of_another_environment_is_noted(
    cache: Path,
    quick: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "broken"
    config = replace(quick, assistants=0)
    with monkeypatch.context() as patch:
        interrupt(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            train(cache, out, config)
    state = load_state(out / "teacher")
    assert state is not None
    state["environment"]["torch"] = "2.0"
    save_state(out / "teacher", state)
    warnings = train(cache, out, config, resume=True)["warnings"]
    assert any("torch 2.0 -> " in line and "bits may differ" in line for line in warnings)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_checkpoint_is_named(
    cache: Path,
    quick: TrainConfig,
    finished: Run,
    tmp_path: Path,
    content: bytes | None,
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    (out / "results.json").unlink()
    path = out / "student" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(InputError, match=r"student/checkpoint.pt cannot be read .*delete"):
        train(cache, out, quick, resume=True)


def test_shortened_log_is_refused(
    cache: Path, quick: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            train(cache, out, quick)
    (out / "teacher" / "steps.csv").write_text("step\n")
    with pytest.raises(InputError, match=r"steps.csv has 5 bytes; its checkpoint expects at least"):
        train(cache, out, quick, resume=True)
