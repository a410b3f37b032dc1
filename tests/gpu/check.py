"""Everything that needs a GPU, in one go: ``make gpu-check``.

Builds with what is installed, then runs the op tests on the device, what only a GPU can show, the
benchmark, and the memory and race checkers on a part of the tests. Each stage goes on after one
that failed; the exit status is 1 if any did. Needs no network.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Few blocks of every kernel are enough for the checkers, which slow a program down a hundredfold.
REDUCED = "test_on_gpu.py::test_the_host_never_waits"


@dataclass(frozen=True)
class Stage:
    """One command with the time it may take, in seconds."""

    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)


def plan(
    python: str, sanitizer: str | None, *, build: bool, arch: str, workers: int
) -> list[Stage]:
    """The stages in order; budgets add up to less than nine minutes.

    arch: compute capability to build for, e.g. "90". workers: processes of the op tests.
    """
    # Warnings are the errors of the packages that CI has, not of those found here.
    pytest = [python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    install = ["-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    stages = []
    if build:
        cuda = {"PYCDGKD_CUDA": "ON", "PYCDGKD_CUDA_ARCHS": arch, "PYCDGKD_WERROR": "ON"}
        stages.append(Stage("build", [python, *install, str(ROOT)], 105, cuda))
    ops = {"PYCDGKD_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1"}
    spread = ["-n", str(workers)] if workers > 1 else []
    chosen = ["tests/ops", "-k", "not process_group"]
    stages.append(Stage("op tests", [*pytest, *spread, *chosen], 75, ops))
    stages.append(Stage("on the GPU", [*pytest, "tests/gpu/test_on_gpu.py"], 50))
    stages.append(Stage("benchmark", [python, "benchmarks/gpu.py"], 225))
    for tool, seconds in (("memcheck", 25), ("racecheck", 45)) if sanitizer else ():
        check = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", "--target-processes=all"]
        # The vendor's matrix products would take minutes.
        ours = ["--kernel-name", "kernel_substring=pycdgkd"] if tool == "racecheck" else []
        stages.append(Stage(tool, [*check, *ours, *pytest, f"tests/gpu/{REDUCED}"], seconds))
    return stages


def run(stage: Stage, log: Path) -> bool:
    """Whether the stage passed; its output goes to the log, the end of it to the terminal."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            stage.command,
            cwd=ROOT,
            env={**os.environ, **stage.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=stage.seconds,
            check=False,
        )
        told, verdict = done.stdout, "passed" if done.returncode == 0 else "FAILED"
    except subprocess.TimeoutExpired as error:
        told = error.stdout or b""
        verdict = f"FAILED: took more than {stage.seconds} s"
    took, output = time.monotonic() - began, told.decode(errors="replace")
    line = f"{stage.name}: {verdict} ({took:.0f} s of {stage.seconds})"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"=== {line}\n{output}\n")
    print("\n".join(output.splitlines()[-15:]))
    print(f"=== {line}", flush=True)
    return verdict == "passed"


def main() -> int:
    """Run all stages; 0 if every one passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-build", action="store_true", help="test what is installed")
    parser.add_argument(
        "--without-sanitizer", action="store_true", help="pass without compute-sanitizer"
    )
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no GPU: nothing was checked")
        return 1
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    log = RESULTS / f"{name}.log"
    log.write_text(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", encoding="utf-8")
    sanitizer = shutil.which("compute-sanitizer")
    stages = plan(
        sys.executable,
        sanitizer,
        build=not options.no_build,
        arch="{}{}".format(*torch.cuda.get_device_capability()),
        workers=min(12, os.cpu_count() or 1) if find_spec("xdist") else 1,
    )
    passed = [run(stage, log) for stage in stages]
    if sanitizer is None and not options.without_sanitizer:
        print("gpu-check: compute-sanitizer is not there; --without-sanitizer does without it")
        passed.append(False)
    print(f"gpu-check: {'all passed' if all(passed) else 'FAILED'}; log {log}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
