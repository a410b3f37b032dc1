"""Help and configuration errors answer from the standard library alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The heavy modules are made impossible to import: touching one ends in a traceback.
BLOCKED = """
import sys
for name in ("torch", "numpy", "mne", "av", "matplotlib", "jinja2", "rich", "safetensors"):
    sys.modules[name] = None
from pycdgkd.cli import main
sys.exit(main(sys.argv[1:]))
"""

COMMANDS = ("demo", "prepare", "train", "evaluate", "predict", "report", "bench", "doctor")


def run_blocked(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", BLOCKED, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_lists_every_command_without_heavy_imports():
    done = run_blocked("--help")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name in COMMANDS:
        assert f"\n    {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help_without_heavy_imports(name: str):
    done = run_blocked(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: pycdgkd {name}" in done.stdout


def test_version_without_heavy_imports():
    from pycdgkd import __version__

    done = run_blocked("--version")
    assert (done.returncode, done.stdout) == (0, f"pycdgkd {__version__}\n")


def configuration_errors(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = = 3", encoding="utf-8")
    unknown = tmp_path / "unknown.toml"
    unknown.write_text("[optim]\nepoch = 3\n", encoding="utf-8")
    train = ["train", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    prepare = ["prepare", "deap", str(tmp_path), str(tmp_path / "cache")]
    return {
        "bad toml": ([*train, "--config", str(broken)], "not valid TOML"),
        "unknown key": ([*train, "--config", str(unknown)], "'optim.epochs'"),
        "no such file": ([*train, "--config", str(tmp_path / "none.toml")], "none.toml"),
        "bad value": ([*train, "--set", "distill.kd_weight=2"], "distill.kd_weight"),
        "bad ties": ([*train, "--set", "ties=joy"], "drop"),
        "bad preset": ([*train, "--preset", "huge"], "nano"),
        "no such case": (["bench", "--case", "x"], "no case matches 'x'"),
        "bad threads": (["bench", "--threads", "0"], "expected numbers from 1"),
        "missing cache": (train, "no cache at"),
        "bad rate": ([*prepare, "--fps", "-3"], "fps must be"),
        "missing root": (["prepare", "deap", str(tmp_path / "none"), "x"], "no recordings at"),
        "missing network": (["predict", str(tmp_path), "clip.avi"], "no network at"),
        "missing run": (["evaluate", str(tmp_path / "none")], "no run at"),
        "foreign folder": (["demo", "--out", str(tmp_path)], "not made by pycdgkd demo"),
    }


def test_configuration_errors_without_heavy_imports(tmp_path: Path):
    for case, (arguments, expected) in configuration_errors(tmp_path).items():
        done = run_blocked(*arguments)
        assert done.returncode == 2, (case, done.stderr)
        assert done.stdout == "", case
        assert done.stderr.startswith("pycdgkd: error: "), case
        assert done.stderr.count("\n") == 1, case
        assert expected in done.stderr, case
