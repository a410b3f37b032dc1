"""The plan of ``make gpu-check`` and what it does with a stage that fails or hangs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from check import ROOT, Stage, plan, run


@pytest.mark.parametrize("sanitizer", [None, "compute-sanitizer"])
def test_the_plan_fits_nine_minutes_and_names_what_is_there(sanitizer: str | None) -> None:
    stages = plan("python", sanitizer, build=True, arch="90", workers=4)
    assert sum(stage.seconds for stage in stages) < 540
    names = [stage.name for stage in stages]
    assert names[0] == "build"
    assert ("racecheck" in names) == (sanitizer is not None)
    paths = [
        word.split("::")[0]
        for stage in stages
        for word in stage.command
        if word.startswith(("tests/", "benchmarks/"))
    ]
    assert paths
    assert all((ROOT / path).exists() for path in paths)


def test_what_fails_is_told_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    assert run(Stage("good", [sys.executable, "-c", "print('fine')"], 60), log)
    assert not run(Stage("bad", [sys.executable, "-c", "raise SystemExit('broken')"], 60), log)
    slow = "import time; print('half way', flush=True); time.sleep(60)"
    assert not run(Stage("slow", [sys.executable, "-c", slow], 3), log)
    text = log.read_text()
    assert "good: passed" in text
    assert "fine" in text
    assert "bad: FAILED" in text
    assert "broken" in capsys.readouterr().out
    assert "slow: FAILED: took more than 3 s (3 s of 3)\nhalf way" in text
