"""The command `bench` on one small case, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from pycdgkd.bench import cases, records
from pycdgkd.cli import main


def test_one_case_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = "distillation_loss/N128-K2-S3"
    arguments = ["bench", "--case", name, "--quick", "--seconds", "0.05", "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert f"[1/1] {name}: " in text
    assert ">= 5x D1" in text
    assert "smallest step through autograd" in text
    (path,) = (tmp_path / "out").glob("*.json")
    assert f"written  {path}" in text
    run = records.load(path)
    assert [case.name for case in run.cases] == [name]
    ours = run.cases[0].entry("pycdgkd")
    assert ours is not None
    assert set(ours.seconds) == {"forward", "backward", "both"}
    assert ours.ratio["both"].median == 1.0
    assert {"op", "kernel", "D1", "D3", "D4"} <= {entry.name for entry in run.cases[0].entries}
    assert path.with_suffix(".md").is_file()


def test_two_threads_are_timed_beside_one(capsys: pytest.CaptureFixture[str]) -> None:
    name = "distillation_loss/N65536-K7-S3"
    arguments = ["bench", "--case", name, "--quick", "--seconds", "0.01", "--threads", "1", "2"]
    try:
        status = main(arguments)
    finally:
        output = capsys.readouterr()
    if status == 2 and "this machine's cores" in output.err:
        pytest.skip("this machine has one core")
    assert status == 0
    assert ">= 1.6x with 2 threads" in output.out
    assert "x (D1)" in output.out


def test_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    assert capsys.readouterr().out.split() == [case.name for case in cases.CASES]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--case", "teacher"], "no case matches 'teacher'; expected a shell pattern"),
        (["--op", "teacher"], "unknown op 'teacher'; expected one of class_prototypes"),
        (["--threads", "0"], "--threads: expected numbers from 1 to"),
        (["--threads", "1", "1"], "--threads: expected different numbers, got 1 1; remedy"),
        (["--threads", "two"], "invalid int value: 'two'"),
        (["--seconds", "-1"], "--seconds: expected a number above 0, got -1; remedy"),
        (["--quik"], "did you mean '--quick'?"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert main(["bench", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_an_output_that_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    assert main(["bench", "--quick", "--out", str(tmp_path / "out")]) == 2
    expected = f"--out: expected a folder, got the file {tmp_path / 'out'}; remedy"
    assert expected in capsys.readouterr().err
