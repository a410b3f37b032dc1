"""Workers end with who started them: by an error, by Ctrl-C, by SIGTERM and by SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_cache import write_cache

from pycdgkd.data import StudyConfig, write_study
from pycdgkd.processes import worker_pool

SECONDS = 20.0  # in which processes must be gone or have begun; a busy machine is slow

POOL = """
import os, sys, time
from pathlib import Path
from pycdgkd.processes import worker_pool

def work(folder):
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(600)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with worker_pool(2) as pool:
        list(pool.map(work, [folder, folder, folder]))
"""


def wait_for(what: str, happened: object) -> None:
    end = time.monotonic() + SECONDS
    while not happened():  # type: ignore[operator]  # a function without arguments
        assert time.monotonic() < end, f"{what}: not within {SECONDS} s"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether there is such a process; one that has ended and that nobody asks about is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not status.parent.parent.is_dir()


def children(pid: int) -> list[int]:
    """Processes that a process has started, all the way down."""
    try:
        direct = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, direct) for found in (child, *children(child))]


def names(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    parent = subprocess.Popen(
        [sys.executable, "-P", str(script), str(tmp_path)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for("both workers at work", lambda: len(names(tmp_path)) == 2)
    workers = names(tmp_path)
    assert all(runs(pid) for pid in workers)
    parent.send_signal(how)
    assert parent.wait(SECONDS) == -how
    wait_for("workers gone", lambda: not any(runs(pid) for pid in workers))
    assert names(tmp_path) == workers  # none took up the third job


def fails_or_sleeps(folder: Path, seconds: float) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    if seconds:
        time.sleep(seconds)
    wait_for("the other at work", lambda: len(names(folder)) == 2)
    raise ValueError("this job cannot be done")


def work_together(folder: Path) -> None:
    with worker_pool(2) as pool:
        jobs = [pool.submit(fails_or_sleeps, folder, seconds) for seconds in (0.0, 600.0)]
        jobs[0].result()


def test_an_error_in_one_ends_the_others_and_nothing_else(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with pytest.raises(ValueError, match="cannot be done"):
            work_together(tmp_path)
        assert not any(runs(pid) for pid in names(tmp_path))
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


_word = ""


def learn(word: str) -> None:
    global _word
    _word = word


def square(number: int) -> tuple[int, str]:
    return number**2, _word


def test_results_come_back_from_workers_that_were_set_up() -> None:
    with worker_pool(2, learn, "here") as pool:
        assert list(pool.map(square, range(4))) == [(n**2, "here") for n in range(4)]
    assert _word == ""


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="workers of a command are found in /proc"
)


class Command:
    """``pycdgkd`` in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pycdgkd", *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def stop(self, how: signal.Signals) -> tuple[int, str]:
        """Exit status and standard error; all that it started must end with it."""
        started = children(self.process.pid)
        assert len(started) >= 2
        if how == signal.SIGINT:  # as a terminal does: to the workers as well
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        _, said = self.process.communicate(timeout=SECONDS)
        wait_for("workers gone", lambda: not any(runs(pid) for pid in started))
        return self.process.returncode, said

    def finish(self) -> None:
        _, said = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, said


ENDINGS = {
    signal.SIGTERM: (143, "\npycdgkd: interrupted; run the same command again"),
    signal.SIGINT: (130, "\npycdgkd: interrupted; run the same command again"),
    signal.SIGKILL: (-signal.SIGKILL, ""),
}


def check_ending(ending: tuple[int, str], how: signal.Signals) -> None:
    status, words = ENDINGS[how]
    assert ending[0] == status, ending[1]
    assert ending[1].startswith(words)
    assert "Traceback" not in ending[1]


@needs_proc
def test_a_stopped_preparation_goes_on(tmp_path: Path) -> None:
    study = tmp_path / "study"
    write_study(study, StudyConfig(subjects=2, trials=6, trial_seconds=8.0), workers=2)

    def prepare(cache: str) -> Command:
        options = ("--trial-seconds", 8, "--img-size", 48, "--jobs", 2)
        return Command("prepare", "deap", study, tmp_path / cache, *options)

    def journalled() -> int:
        found = (tmp_path / "cache").glob("parts/*/journal.jsonl")
        return sum(len(path.read_text().splitlines()) for path in found)

    prepare("whole").finish()
    for how in ENDINGS:
        before = journalled()
        command = prepare("cache")
        wait_for("a trial more", lambda before=before: journalled() > before)
        check_ending(command.stop(how), how)
        assert not (tmp_path / "cache" / "manifest.json").exists()
        stopped_at = journalled()
        time.sleep(0.3)
        assert journalled() == stopped_at  # nobody goes on in secret
    prepare("cache").finish()
    for name in ("video.npy", "eeg.npy", "samples.csv", "manifest.json"):
        found, expected = (tmp_path / part / name for part in ("cache", "whole"))
        assert found.read_bytes() == expected.read_bytes(), name


@needs_proc
def test_a_stopped_experiment_goes_on(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "small")

    def experiment(out: str) -> Command:
        options = ("--seeds", 2, "--labels", "valence", "--methods", "none,cdgkd", "--jobs", 2)
        settings = ("preset=nano", "optim.epochs=3", "split.fractions=0.6,0.2,0.2", "threads=1")
        sets = [word for setting in settings for word in ("--set", setting)]
        return Command("experiment", "table5", cache, "--out", tmp_path / out, *options, *sets)

    def checkpoints() -> float:
        found = (tmp_path / "out").rglob("checkpoint.pt")
        return max((path.stat().st_mtime for path in found), default=0.0)

    experiment("whole").finish()
    for how in (signal.SIGTERM, signal.SIGKILL):
        before = checkpoints()
        command = experiment("out")
        wait_for("an epoch more", lambda before=before: checkpoints() > before)
        check_ending(command.stop(how), how)
        assert not (tmp_path / "out" / "table5.html").exists()
    experiment("out").finish()
    results = sorted((tmp_path / "whole").rglob("predictions.csv"))
    assert len(results) == 4
    for path in results:
        assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == (
            path.read_bytes()
        )
    assert (tmp_path / "out" / "table5.html").is_file()
