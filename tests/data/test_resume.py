"""A preparation that is stopped, at whatever moment, ends in the same bytes as one that was not."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pycdgkd.data import Cache, cache_writer, prepare
from pycdgkd.data.config import PrepareConfig, config_from_dict, config_to_dict
from pycdgkd.errors import InputError

from .conftest import PREPARE

KILLED = """
import os, signal, sys
from pycdgkd.data import PrepareConfig, prepare
from pycdgkd.data.config import config_from_dict

def progress(line):
    if "s02 trial 1" in line:
        os.kill(os.getpid(), signal.SIGKILL)

config = config_from_dict(PrepareConfig, {config!r})
prepare(sys.argv[1], sys.argv[2], config, progress=progress)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".plan.json.")
    }


def kill_in_the_middle(study: Path, folder: Path) -> None:
    code = KILLED.format(config=config_to_dict(PREPARE))
    done = subprocess.run([sys.executable, "-P", "-c", code, str(study), str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_killed_torn_and_resumed(study: Path, cache_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    kill_in_the_middle(study, folder)
    with pytest.raises(InputError, match=r"unfinished \(5 of 8 trials done\)"):
        Cache.open(folder)
    other = config_from_dict(PrepareConfig, {**config_to_dict(PREPARE), "margin": 0.3})
    with pytest.raises(InputError, match=r"margin is 0.1 there, 0.3 asked for"):
        prepare(study, folder, other)
    # As if killed while writing: half a sample in one array, half a line in the journal.
    part = folder / "parts" / "002"
    for name in ("video.npy.part", "eeg.npy.part"):
        with (part / name).open("ab") as file:
            file.write(b"x" * 1000)
    with (part / "journal.jsonl").open("ab") as file:
        file.write(b'{"subject": 2, "tri')
    lines: list[str] = []
    report = prepare(study, folder, PREPARE, progress=lines.append)
    assert report.resumed_trials == 5
    assert len(lines) == 3
    assert contents(folder) == contents(cache_folder)


@pytest.mark.parametrize("left", ["draft", "plan.json", "video.npy.part"])
def test_killed_before_the_first_trial(
    study: Path, cache_folder: Path, tmp_path: Path, left: str
) -> None:
    folder = tmp_path / "cache"

    def stop(_line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(study, folder, PREPARE, progress=stop)
    part = folder / "parts" / "001"
    (part / "journal.jsonl").unlink()
    (part / "eeg.npy.part").unlink()
    if left != "video.npy.part":
        shutil.rmtree(folder / "parts")
    if left == "draft":
        (folder / "plan.json").rename(folder / ".plan.json.77")
    assert prepare(study, folder, PREPARE).resumed_trials == 0
    assert contents(folder) == contents(cache_folder)


def test_stopped_while_finishing(
    study: Path, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    real = cache_writer.write_text

    def stop_at_manifest(path: Path, text: str) -> None:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        real(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "write_text", stop_at_manifest)
        with pytest.raises(KeyboardInterrupt):
            prepare(study, folder, PREPARE)
    assert not (folder / "manifest.json").exists()
    report = prepare(study, folder, PREPARE)
    assert report.resumed_trials == 8
    assert contents(folder) == contents(cache_folder)


def test_arrays_shorter_than_the_journal_are_refused(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def stop(line: str) -> None:
        if "2/8" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(study, folder, PREPARE, progress=stop)
    part = folder / "parts" / "001" / "eeg.npy.part"
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"eeg.npy.part is shorter than its journal says"):
        prepare(study, folder, PREPARE)
