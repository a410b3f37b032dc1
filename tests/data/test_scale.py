"""Many processes, shards, kills, a full disk: the finished bytes are always the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pycdgkd.cli import main
from pycdgkd.data import Cache, prepare
from pycdgkd.data.config import config_to_dict
from pycdgkd.errors import InputError

from .conftest import PREPARE
from .test_resume import contents

RUN = """
import resource, signal, sys
from pycdgkd.data import PrepareConfig, prepare
from pycdgkd.errors import InputError

if __name__ == "__main__":
    limit = int(sys.argv[4])
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        prepare(sys.argv[1], sys.argv[2], PrepareConfig(**{config!r}), jobs=int(sys.argv[3]))
    except InputError as error:
        print(error)
        sys.exit(2)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "run.py"
    path.write_text(RUN.replace("{config!r}", repr(config_to_dict(PREPARE))))
    return path


def start(
    script: Path, study: Path, cache: Path, jobs: int, limit: int = 0, output: int | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", str(script), str(study), str(cache), str(jobs), str(limit)],
        stdout=output,
        text=True,
        start_new_session=True,
    )


def test_ten_kills_at_random_moments(
    script: Path, study: Path, cache_folder: Path, tmp_path: Path
) -> None:
    """Start and end, one process and two: nothing is lost, nothing is doubled."""
    rng = random.Random(7)
    kills = finished = 0
    folder = tmp_path / "cache"
    while kills < 10:
        process = start(script, study, folder, 1 + kills % 2)
        time.sleep(rng.uniform(0.8, 4.0))
        if process.poll() is not None:
            assert process.returncode == 0
            assert contents(folder) == contents(cache_folder)
            finished += 1
            folder = tmp_path / f"cache{finished}"
            continue

        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert start(script, study, folder, 2).wait() == 0
    assert contents(folder) == contents(cache_folder)


def test_processes_and_shards_give_the_same_bytes(
    script: Path, study: Path, cache_folder: Path, tmp_path: Path
) -> None:
    assert start(script, study, tmp_path / "jobs", 2).wait() == 0
    assert contents(tmp_path / "jobs") == contents(cache_folder)
    folder = tmp_path / "shards"
    second = prepare(study, folder, PREPARE, shard=(2, 2))
    assert (second.finished, second.trials, second.samples) == (False, 4, 8)
    with pytest.raises(InputError, match=r"unfinished \(4 of 8 trials done\)"):
        Cache.open(folder)
    first = prepare(study, folder, PREPARE, shard=(1, 2))
    assert (first.finished, first.trials) == (False, 4)
    joined = prepare(study, folder, PREPARE)
    assert (joined.finished, joined.resumed_trials, joined.trials) == (True, 8, 8)
    assert contents(folder) == contents(cache_folder)


def test_a_full_disk_is_told_and_loses_nothing(
    script: Path, study: Path, cache_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    process = start(script, study, folder, 1, limit=150_000, output=subprocess.PIPE)
    text, _ = process.communicate()
    assert process.returncode == 2
    assert "cannot write to" in text
    assert "every trial finished before is kept; remedy: free some space" in text
    report = prepare(study, folder, PREPARE)
    assert report.resumed_trials == 1
    assert contents(folder) == contents(cache_folder)


def test_two_at_once_are_told(study: Path, tmp_path: Path) -> None:
    """The second of two equal commands stops before it writes where the first does."""
    folder = tmp_path / "cache"
    told: list[str] = []

    def second(_line: str) -> None:
        if not told:
            with pytest.raises(InputError, match=r"parts/001 is being written by another process"):
                prepare(study, folder, PREPARE)
            told.append("yes")

    prepare(study, folder, PREPARE, progress=second)
    assert told == ["yes"]


def test_strict_stops_at_the_first_bad_recording(study: Path, tmp_path: Path) -> None:

    root = tmp_path / "root"
    shutil.copytree(study, root)
    (root / "face_video" / "s01" / "s01_trial02.avi").write_bytes(b"no video")
    with pytest.raises(InputError, match=r"s01 trial 2: cannot open video .*s01_trial02.avi"):
        prepare(root, tmp_path / "cache", PREPARE, strict=True)
    # What was done before is kept, and the rest can be had without.
    assert prepare(root, tmp_path / "cache", PREPARE).resumed_trials == 1
    (root / "face_video" / "s02" / "s02_trial01.avi").unlink()
    with pytest.raises(InputError, match=r"subject 2 trial 1: no video s02_trial01.avi"):
        prepare(root, tmp_path / "other", PREPARE, strict=True)


def test_shards_by_the_command(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(study), str(tmp_path / "c"), "--trial-seconds", "8", "--img-size", "48"]
    for shard in ("1/2", "2/2"):
        assert main(["prepare", "deap", *options, "--faces", "none", "--shard", shard]) == 0
        assert "the same command without --shard to join them" in capsys.readouterr().out
    assert main(["prepare", "deap", *options, "--faces", "none"]) == 0
    text = capsys.readouterr().out
    assert "prepared 16 samples of 8 trials (8 done before), skipped 0" in text
