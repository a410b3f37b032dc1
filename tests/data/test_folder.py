"""A study of one's own: any names, any classes, any recording that mne reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import mne
import numpy as np
import pytest
import torch
from archives import grey, write_csv, write_video

from pycdgkd.cli import main
from pycdgkd.data import Cache, PrepareConfig, prepare
from pycdgkd.data.check import check_dataset
from pycdgkd.errors import InputError
from pycdgkd.training.config import TrainConfig
from pycdgkd.training.recordings import Recordings

RATE, NAMES = 250, ("Fz", "Cz", "C3", "C4", "Pz", "Oz")
CONFIG = PrepareConfig.of("folder", faces="none", img_size=16, channels="C3,C4,Fz,Pz")
HEADER = (
    "Subject",
    "Trial",
    "Video",
    "EEG",
    "video_start",
    "eeg_start",
    "Valence",
    "Mood",
    "stimulus",
)


def write_eeg(path: Path, seconds: int, beat: float) -> None:
    """Noise of 1 uV, and 20 uV on C3: 12 Hz from second ``beat`` on."""
    rng = np.random.default_rng(round(beat))
    signal = rng.normal(0, 1, (len(NAMES), seconds * RATE))
    time = np.arange(seconds * RATE) / RATE - beat
    signal[2] += 20 * np.sin(2 * np.pi * 12 * time) * (time >= 0)
    info = mne.create_info(list(NAMES), RATE, "eeg")
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = mne.io.RawArray(signal * 1e-6, info, verbose="error")
    raw.save(path, verbose="error")


def write_folder(root: Path, rows: Sequence[Sequence[object]]) -> Path:
    """Two recordings of 30 s and one video of 30 s that counts its seconds in brightness."""
    write_eeg(root / "eeg" / "anna_raw.fif", 30, 5.0)
    write_eeg(root / "eeg" / "ben_raw.fif", 30, 2.0)
    write_video(root / "video" / "a.mp4", 750, lambda n: grey(20 + n // 25 * 5, 32, 32), rate=25)
    write_csv(root / "trials.csv", [HEADER, *rows])
    return root


ROWS: list[Sequence[object]] = [
    ("anna", 1, "video/a.mp4", "eeg/anna_raw.fif", 3, 5, "2,5", "glad", "sea"),
    ("ben", 1, "video/a.mp4", "eeg/ben_raw.fif", "", 2, 6, "calm", "fire"),
    ("ben", 2, "video/a.mp4", "eeg/ben_raw.fif", 1, 12, 7, "tense", "sea"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quoted = [[f'"{cell}"' for cell in row] for row in ROWS]
    return write_folder(tmp_path_factory.mktemp("folder"), quoted)


def test_recordings_labels_and_names(folder: Path, tmp_path: Path) -> None:
    report = prepare(folder, tmp_path / "cache", CONFIG, dataset="folder")
    assert (report.trials, report.samples, report.skipped) == (3, 6 + 7 + 4, [])
    cache = Cache.open(tmp_path / "cache")
    assert cache.channels == ("C3", "C4", "Fz", "Pz")
    assert cache.labels == {"valence": [], "mood": ["calm", "glad", "tense"]}
    assert cache.manifest["subjects"] == {"1": "anna", "2": "ben"}
    assert cache.manifest["stimuli"] == {"1": "fire", "2": "sea"}
    assert cache.samples["valence"][[0, 6, 13]].tolist() == [2.5, 6.0, 7.0]
    assert cache.samples["mood"][[0, 6, 13]].tolist() == [1.0, 0.0, 2.0]
    assert cache.samples["experiment_id"][[0, 6, 13]].tolist() == [2, 1, 2]
    # The stimulus starts where the table says: in phase from the first sample on.
    expected = 20 * 3 / 4 * np.sin(2 * np.pi * 12 * np.arange(512) / 128)
    for row in (0, 5, 6):
        assert np.corrcoef(cache.eeg[row, 0, 32:], expected[32:])[0, 1] > 0.9
    # Frames by the video's own time: 5 of 4 s, 0.8 s apart, from video_start on.
    second = (cache.video.reshape(17, 5, -1).mean(axis=2) - 20) / 5
    for row, start in ((0, 3.0), (1, 7.0), (6, 0.0), (13, 1.0)):
        times = np.floor(start + 0.8 * np.arange(5) + 1e-6)
        np.testing.assert_allclose(second[row], times, atol=0.7)


def test_trained_by_the_class_it_names(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "cache", CONFIG, dataset="folder")
    config = TrainConfig(label="mood")
    data = Recordings.open(Cache.open(tmp_path / "cache"), config, torch.device("cpu"))
    assert data.classes == ("calm", "glad", "tense")
    assert np.bincount(data.labels).tolist() == [7, 6, 4]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--faces", "none", "--img-size", "16", "--channels", "C3,C4"]
    assert main(["check-data", "folder", str(folder), *options]) == 0
    assert "label    mood: calm 1, glad 1, tense 1" in capsys.readouterr().out
    assert main(["prepare", "folder", str(folder), str(tmp_path / "c"), *options]) == 0
    assert "prepared 17 samples of 3 trials" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({2: "video/none.mp4"}, r"line 4: no file video/none.mp4"),
        ({3: "../x.fif"}, r"line 4 names the file '../x.fif', which does not lie in"),
        ({5: "-3"}, r"line 4: eeg_start is '-3'; expected seconds"),
        ({6: ""}, r"line 4: valence is ''; expected a label"),
        ({7: ""}, r"line 4: mood is ''; expected a label"),
        ({1: "1"}, r"line 4: the trial is there twice"),
    ],
)
def test_a_bad_line_costs_its_trial(
    folder: Path, tmp_path: Path, change: dict[int, str], words: str
) -> None:
    row = [change.get(i, cell) for i, cell in enumerate(ROWS[2])]
    quoted = [[f'"{cell}"' for cell in each] for each in (*ROWS[:2], row)]
    root = tmp_path / "root"
    root.mkdir()
    for name in ("eeg", "video"):
        (root / name).mkdir()
        for path in (folder / name).iterdir():
            (root / name / path.name).hardlink_to(path)
    write_csv(root / "trials.csv", [HEADER, *quoted])
    found = check_dataset(root, CONFIG, "folder")
    assert (found.trials, len(found.skipped)) == (2, 1)
    assert re.search(words, found.skipped[0][2])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "lacks the columns subject, trial, video, eeg"),
        ([HEADER[:4]], "has no label column"),
        ([(*HEADER[:4], "segment"), ("1", "1", "a", "b", "1")], "calls a label 'segment'"),
        ([HEADER], "no usable trial in .* it names no trial"),
        ([(*HEADER[:4], "Mood", "mood")], "has the column mood twice"),
        ([(*HEADER[:4], "mood"), ("1", "x", "a", "b", "1")], "line 2: trial is 'x'"),
    ],
)
def test_a_table_that_cannot_be_meant(
    tmp_path: Path, lines: list[Sequence[object]], words: str
) -> None:
    write_csv(tmp_path / "trials.csv", lines)
    with pytest.raises(InputError, match=words):
        check_dataset(tmp_path, CONFIG, "folder")


def test_given_boxes_take_the_detectors_place(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_folder(root, [[f'"{cell}"' for cell in row] for row in ROWS])
    lines = [("video", "second", "x1", "y1", "x2", "y2"), ("video/a.mp4", 4, 8, 8, 24, 24)]
    write_csv(root / "boxes.csv", lines)
    config = PrepareConfig.of(
        "folder", faces="boxes", img_size=16, margin=0.0, channels="C3,C4,Fz,Pz"
    )
    report = prepare(root, tmp_path / "cache", config, dataset="folder")
    assert report.trials == 3
    # A box speaks for the second around it; beyond, frames borrow it and count as missed.
    assert 0.8 < report.face_miss_rate < 1
    cache = Cache.open(tmp_path / "cache")
    assert cache.samples["faces_found"].sum() == round((1 - report.face_miss_rate) * 85)
    assert "boxes.csv" in cache.manifest["inputs"]
    (root / "boxes.csv").write_text("video,x1,y1,x2,y2\nvideo/a.mp4,9,9,3,12\n")
    with pytest.raises(InputError, match=r"boxes.csv line 2: expected x1 < x2"):
        prepare(root, tmp_path / "other", config, dataset="folder")
