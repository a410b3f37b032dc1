"""Archives of full size and the traps that lie in them: orders, codes, missing trials, oddities."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from archives import (
    FILMED,
    RATINGS_HEADER,
    deap_ratings,
    grey,
    write_csv,
    write_dat,
    write_deap_archive,
    write_mahnob_archive,
    write_mahnob_session,
    write_video,
)

from pycdgkd.cli import main
from pycdgkd.data import Cache, PrepareConfig, prepare
from pycdgkd.data.check import check_dataset
from pycdgkd.data.config import config_to_dict
from pycdgkd.data.eeg import TSCEPTION28
from pycdgkd.data.mahnob import SUBJECTS
from pycdgkd.errors import InputError


@pytest.fixture(scope="module")
def deap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deap_archive(tmp_path_factory.mktemp("deap"))


@pytest.fixture(scope="module")
def mahnob(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mahnob_archive(tmp_path_factory.mktemp("mahnob"))


def test_deap_has_874_trials_and_13110_samples(deap: Path) -> None:
    found = check_dataset(deap, PrepareConfig(), "deap")
    assert (found.trials, found.samples) == (874, 13110)
    assert found.subjects == tuple(range(1, 23))
    missing = [(s, t) for s, count in FILMED.items() for t in range(count + 1, 41)]
    assert missing == [(3, 40), (5, 40), (11, 38), (11, 39), (11, 40), (14, 40)]
    assert [(s, t) for s, t, _ in found.skipped] == missing
    assert found.skipped[0][2] == "no video s03_trial40.avi"
    # The other ten subjects were not filmed; asked for, they are named.
    every = check_dataset(deap, PrepareConfig(subjects="all"), "deap")
    assert every.trials == 874
    assert (23, None, "no videos s23_trialMM.avi") in every.skipped


def test_the_command_says_it_in_words_and_as_json(
    deap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-data", "deap", str(deap), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["trials"], told["samples"], len(told["skipped"])) == (874, 13110, 6)
    assert told["skipped"][0] == {"subject": 3, "trial": 40, "reason": "no video s03_trial40.avi"}
    assert main(["check-data", "deap", str(deap), "--subjects", "1"]) == 0
    text = capsys.readouterr().out
    assert "usable   40 trials of 1 subjects, 600 samples" in text
    assert "label    valence: " in text
    assert not (deap / "cache").exists()


def test_mahnob_has_480_trials_and_9504_samples(mahnob: Path) -> None:
    found = check_dataset(mahnob, PrepareConfig.of("mahnob"), "mahnob")
    assert (found.trials, found.samples, len(found.subjects)) == (480, 9504, 24)
    assert found.subjects == SUBJECTS
    assert found.skipped == ()
    every = check_dataset(mahnob, PrepareConfig.of("mahnob", subjects="all"), "mahnob")
    assert every.trials == 480 + 17 + 14 + 16
    reasons = {(s, t): reason for s, t, reason in every.skipped}
    assert reasons[3, 18] == "no BDF in session 296"
    assert len(reasons) == 3 + 6 + 4 + 60


def write_small_deap(root: Path, shown: list[int]) -> list[tuple[object, ...]]:
    """Subject 1 with .dat and as many videos as numbers in ``shown``, brightness by trial."""
    rows = [row for row in deap_ratings(1) if row[2] in shown]
    rows = [(1, trial, *row[2:]) for trial, row in enumerate(rows, start=1)]
    write_dat(root / "data_preprocessed_python" / "s01.dat", rows)
    write_csv(root / "metadata_csv" / "participant_ratings.csv", [RATINGS_HEADER, *rows])
    for row in rows:
        trial = int(str(row[1]))
        name = f"s01_trial{trial:02d}.avi"
        write_video(root / "face_video" / "s01" / name, 420, lambda _, t=trial: grey(20 * t))
    return rows


DAT = PrepareConfig(source="dat", trial_seconds=8.0, faces="none", img_size=16)


def test_dat_rows_lie_in_the_order_of_the_experiments(tmp_path: Path) -> None:
    """The order trap from the other side: EEG by Experiment_id, video by Trial, one sample."""
    rows = write_small_deap(tmp_path / "root", [3, 7, 12, 30, 31])
    assert [row[2] for row in rows] != sorted(int(str(row[2])) for row in rows)
    report = prepare(tmp_path / "root", tmp_path / "cache", DAT)
    assert (report.trials, report.samples, report.skipped) == (5, 10, [])
    cache = Cache.open(tmp_path / "cache")
    amplitude = cache.eeg[:, TSCEPTION28.index("F3")].std(axis=1) * np.sqrt(2)
    np.testing.assert_allclose(amplitude, 10 * cache.samples["experiment_id"], rtol=1e-3)
    brightness = cache.video.reshape(10, -1).mean(axis=1)
    np.testing.assert_allclose(brightness, 20 * cache.samples["trial"], atol=4)
    # Geneva's channel order, and no trace of the 3 s before the video, ten times as large.
    order = cache.eeg.std(axis=2)[0] * np.sqrt(2)
    assert order[TSCEPTION28.index("Fp1")] == pytest.approx(1, rel=1e-3)
    assert order[TSCEPTION28.index("PO4")] == pytest.approx(31, rel=1e-3)
    assert order[TSCEPTION28.index("O2")] == pytest.approx(32, rel=1e-3)
    by_trial = {int(str(row[1])): row for row in rows}
    for i in range(10):
        row = by_trial[int(cache.samples["trial"][i])]
        assert cache.samples["experiment_id"][i] == row[2]
        assert cache.samples["valence"][i] == row[4]


def test_dat_labels_that_are_not_the_ratings_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    rows = write_small_deap(root, [3, 7])
    swapped = [(1, 1, rows[1][2], *rows[0][3:]), (1, 2, rows[0][2], *rows[1][3:])]
    write_csv(root / "metadata_csv" / "participant_ratings.csv", [RATINGS_HEADER, *swapped])
    with pytest.raises(InputError, match=r"rates valence of experiment \d+ .* expected the same"):
        prepare(root, tmp_path / "cache", DAT)


def test_a_baseline_of_dat_comes_from_before_the_video(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_small_deap(root, [3])
    values = {**config_to_dict(DAT), "baseline": "mean", "baseline_seconds": 4.0}
    with pytest.raises(InputError, match=r"has 3 s of baseline; got baseline_seconds=4"):
        prepare(root, tmp_path / "cache", PrepareConfig(**values))


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sessions")
    write_mahnob_session(root, 1, 1, "107")
    write_mahnob_session(root, 1, 2, "79", pulses=False, gaze=2.0)
    write_mahnob_session(root, 1, 3, "107", feltVlnc="0")
    write_mahnob_session(root, 1, 4, "107", feltArsl="-1")
    write_mahnob_session(root, 1, 5, "107")
    text = root / "Sessions" / "10" / "session.xml"
    text.write_text(text.read_text().replace(' feltVlnc="7"', ""))
    return root


MAHNOB = PrepareConfig.of("mahnob", faces="none", img_size=16)


def test_mahnob_is_cut_by_its_pulses_and_its_time_stamps(sessions: Path, tmp_path: Path) -> None:
    report = prepare(sessions, tmp_path / "cache", MAHNOB, dataset="mahnob")
    assert (report.trials, report.samples) == (2, 34 // 4 + 42 // 4)
    reasons = {(s, t): why for s, t, why in report.skipped}
    assert reasons[1, 3] == "feltVlnc is '0' in the ratings; expected 1 to 9"
    assert reasons[1, 4] == "feltArsl is '-1' in the ratings; expected 1 to 9"
    assert reasons[1, 5] == "feltVlnc is '' in the ratings; expected 1 to 9"
    assert reasons[1, 6] == "no session"
    assert reasons[1, 2] == "Status marks 0 events instead of 2: stimulus taken from 30 s on"
    cache = Cache.open(tmp_path / "cache")
    assert cache.video.shape == (18, 6, 3, 16, 16)
    assert cache.manifest["stimuli"][str(cache.samples["experiment_id"][0])] == "107"
    c3 = cache.eeg[:, TSCEPTION28.index("C3")].astype(np.float64)
    # 12 Hz from the very first sample on: in phase, and nothing of the 24 Hz before.
    expected = np.sin(2 * np.pi * 12 * np.arange(512) / 128)
    for row in range(18):
        assert np.corrcoef(c3[row, 32:], expected[32:])[0, 1] > 0.98
    # Brightness counts the video's seconds; the second session's stimulus starts 2 s later.
    second = (cache.video.reshape(18, 6, -1).mean(axis=2) - 20) / 2
    step = 40 / 61
    for row in range(18):
        later = 2.0 if cache.samples["trial"][row] == 2 else 0.0
        times = later + cache.samples["start_s"][row] + step * np.arange(6)
        assert (np.abs(second[row] - np.floor(times)) < 1.6).all()
    assert cache.frame_mask.all()
    assert cache.samples["valence"].tolist() == [7.0] * 18


def test_mahnob_frames_beyond_the_video_are_masked(sessions: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(sessions / "Sessions" / "2", root / "Sessions" / "2")
    [video] = (root / "Sessions" / "2").glob("*.avi")
    video.unlink()
    write_video(video, 61 * 6, lambda n: grey(n // 61 * 2 + 20, 32, 32), rate=61)
    report = prepare(root, tmp_path / "cache", MAHNOB, dataset="mahnob")
    cache = Cache.open(tmp_path / "cache")
    assert len(cache) == 2
    assert cache.frame_mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert "6 of 8 windows left out" in report.skipped[0][2]


def test_a_stimulus_that_was_broken_off_ends_there(tmp_path: Path) -> None:
    """By the gaze log's MovieEnd, or by the second Status pulse."""
    root = tmp_path / "root"
    early = write_mahnob_session(root, 1, 1, "107", gaze=2.0)
    [log] = early.glob("*.tsv")
    end = 1_000_000 + (2 + 34) * 48000
    log.write_text(log.read_text().replace(str(end), str(end - 13 * 48000)))
    write_mahnob_session(root, 1, 2, "107", shown=17)
    report = prepare(root, tmp_path / "cache", MAHNOB, dataset="mahnob")
    cache = Cache.open(tmp_path / "cache")
    assert cache.samples["trial"].tolist() == [1] * (21 // 4) + [2] * (17 // 4)
    reasons = {(s, t): why for s, t, why in report.skipped}
    assert reasons[1, 1] == "broken off after 21 of 34 s"
    assert reasons[1, 2].startswith("broken off after 17 of 34 s; 4 of 8 windows left out")


def test_mahnob_labels_of_one_s_choice(sessions: Path, tmp_path: Path) -> None:
    config = PrepareConfig.of("mahnob", faces="none", img_size=16, labels="emotion, predictability")
    report = prepare(sessions, tmp_path / "cache", config, dataset="mahnob")
    assert report.trials == 5
    cache = Cache.open(tmp_path / "cache")
    assert cache.labels["predictability"] == []
    assert cache.labels["emotion"][int(cache.samples["emotion"][0])] == "joy"
    with pytest.raises(InputError, match="has no label 'liking'"):
        check_dataset(sessions, PrepareConfig.of("mahnob", labels="liking"), "mahnob")
