from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from pycdgkd.data import Cache, PrepareConfig, prepare
from pycdgkd.data.config import config_from_dict, config_to_dict
from pycdgkd.data.deap import read_ratings, scan
from pycdgkd.data.faces import FaceDetector, track_crops
from pycdgkd.data.study import Trial
from pycdgkd.data.subject import window_frames
from pycdgkd.data.video import read_frames
from pycdgkd.errors import InputError

from .conftest import PREPARE, frontal_asymmetry

HEADER = (
    "Participant_id,Trial,Experiment_id,Start_time,Valence,Arousal,Dominance,Liking,Familiarity"
)


def ratings(root: Path) -> list[dict[str, str]]:
    with (root / "metadata_csv" / "participant_ratings.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_ratings_follow_the_presentation_order(cache: Cache, study: Path) -> None:
    """The order trap: joined by Experiment_id, most labels would be wrong."""
    by_trial = {(int(r["Participant_id"]), int(r["Trial"])): r for r in ratings(study)}
    by_shown = {(int(r["Participant_id"]), int(r["Experiment_id"])): r for r in ratings(study)}
    wrong = 0
    for row in range(len(cache)):
        subject, trial = int(cache.samples["subject"][row]), int(cache.samples["trial"][row])
        expected = by_trial[subject, trial]
        for name in ("valence", "arousal", "dominance", "liking"):
            assert cache.samples[name][row] == float(expected[name.capitalize()])
        assert cache.samples["experiment_id"][row] == int(expected["Experiment_id"])
        wrong += by_shown[subject, trial]["Valence"] != expected["Valence"]
    assert wrong >= len(cache) // 2  # the trap is really laid in this study


def test_the_eeg_of_a_sample_fits_its_rating(cache: Cache, study: Path) -> None:
    """What the EEG itself shows agrees with its rating, and not with that of the other order."""
    pleasant = frontal_asymmetry(np.asarray(cache.eeg)) > 0
    assert (pleasant == (cache.samples["valence"] > 5)).all()
    by_shown = {(int(r["Participant_id"]), int(r["Experiment_id"])): r for r in ratings(study)}
    keys = zip(cache.samples["subject"].tolist(), cache.samples["trial"].tolist(), strict=True)
    trapped = np.array([float(by_shown[key]["Valence"]) for key in keys])
    assert (pleasant == (trapped > 5)).mean() < 0.8


def test_crops_come_from_the_frames_of_their_window(cache: Cache, study: Path) -> None:
    row = 5  # subject 1, trial 3, second window
    assert [int(cache.samples[n][row]) for n in ("subject", "trial", "segment")] == [1, 3, 1]
    path = study / "face_video" / "s01" / "s01_trial03.avi"
    frames, numbers = read_frames(path, range(0, 400, 40))
    assert numbers.tolist()[5:] == [200, 240, 280, 320, 360]
    tracked = track_crops(frames, FaceDetector(60), size=48, margin=0.1)
    assert tracked is not None
    np.testing.assert_array_equal(cache.video[row], tracked[0][5:])


def test_frame_numbers_of_a_window() -> None:
    trial = Trial(1, 1, 1, {}, 60.0, Path("a.avi"), Path("a.bdf"))
    assert window_frames(PrepareConfig(), trial, 4.0).tolist() == [200, 240, 280, 320, 360]
    later = PrepareConfig(video_offset=3.0)
    assert window_frames(later, trial, 0.0).tolist() == [150, 190, 230, 270, 310]
    stamps = PrepareConfig.of("mahnob")
    seconds = window_frames(stamps, trial, 4.0)
    np.testing.assert_allclose(seconds, 4.0 + np.arange(6) * 40 / 61, atol=1e-6)


def test_report_of_a_clean_study(study: Path, cache_folder: Path) -> None:
    report = prepare(study, cache_folder, PREPARE)  # already there: nothing is done again
    assert (report.samples, report.trials, report.resumed_trials) == (16, 8, 8)
    assert report.skipped == []
    assert report.face_miss_rate < 0.05
    assert Cache.open(cache_folder).samples["faces_found"].sum() >= 0.95 * 80


def test_progress_counts_trials(study: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = config_from_dict(PrepareConfig, {**config_to_dict(PREPARE), "faces": "none"})
    report = prepare(study, tmp_path / "cache", config, progress=lines.append)
    assert [line.split(",")[1].strip() for line in lines] == [f"{k}/8 trials" for k in range(1, 9)]
    assert lines[0].startswith("prepare deap: s01 trial 1, 1/8 trials, ")
    assert ", 8/8 trials, 0 s left (s a trial: video " in lines[-1]
    assert (report.face_miss_rate, report.samples) == (0.0, 16)
    assert Cache.open(tmp_path / "cache").samples["faces_found"].tolist() == [0] * 16


@pytest.fixture(scope="module")
def damaged(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damaged") / "root"
    shutil.copytree(study, root)
    bdf = root / "data_original" / "s02.bdf"
    bdf.write_bytes(bdf.read_bytes()[: bdf.stat().st_size * 2 // 3])
    videos = root / "face_video" / "s01"
    (videos / "s01_trial01.avi").write_bytes(b"no video")
    (videos / "s01_trial02.avi").unlink()
    short = videos / "s01_trial04.avi"
    short.write_bytes(short.read_bytes()[: short.stat().st_size // 3])
    return root


def test_bad_recordings_are_named_and_do_not_stop_the_rest(
    damaged: Path, cache: Cache, tmp_path: Path
) -> None:
    lines: list[str] = []
    report = prepare(damaged, tmp_path / "cache", PREPARE, progress=lines.append)
    assert (report.trials, report.samples) == (2, 3)
    assert [(subject, trial) for subject, trial, _ in report.skipped] == [
        (1, 1), (1, 2), (1, 4), (2, None),
    ]  # fmt: skip
    reasons = [reason for _, _, reason in report.skipped]
    assert "cannot open video" in reasons[0]
    assert "s01_trial01.avi" in reasons[0]
    assert reasons[1] == "no video s01_trial02.avi"
    assert reasons[2].startswith("1 of 2 windows left out: the recordings cover 2 windows of EEG")
    assert "s02.bdf is truncated" in reasons[3]
    assert any("s02 skipped" in line for line in lines)
    assert any("s01 trial 1 skipped" in line for line in lines)
    # What is left is what the whole study has at the same place.
    got = Cache.open(tmp_path / "cache")
    assert got.samples["trial"].tolist() == [3, 3, 4]
    np.testing.assert_array_equal(got.video[:2], cache.video[4:6])
    np.testing.assert_array_equal(got.eeg, cache.eeg[4:7])
    assert got.frame_mask[:2].all()
    # The end of the short video is masked, and its frames are zero.
    seen = int(got.frame_mask[2].sum())
    assert 0 < seen < 5
    assert got.frame_mask[2].tolist() == [True] * seen + [False] * (5 - seen)
    assert f"{5 - seen} frames past the end of the video are masked" in reasons[2]
    assert not got.video[2, seen:].any()
    assert got.video[2, :seen].any()


def test_a_cache_of_other_parameters_is_refused(study: Path, cache_folder: Path) -> None:
    other = config_from_dict(
        PrepareConfig, {**config_to_dict(PREPARE), "img_size": 64, "margin": 0.2}
    )
    with pytest.raises(InputError) as caught:
        prepare(study, cache_folder, other)
    assert "img_size is 48 there, 64 asked for; margin is 0.1 there, 0.2 asked for" in str(
        caught.value
    )
    assert "remedy" in str(caught.value)


def test_a_cache_of_other_files_is_refused(damaged: Path, cache_folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare(damaged, cache_folder, PREPARE)
    assert (
        "was made from other files: data_original/s02.bdf, face_video/s01/s01_trial01.avi"
        in str(caught.value)
    )


def test_a_folder_that_is_no_cache_is_left_alone(study: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="is no cache and not empty"):
        prepare(study, tmp_path, PREPARE)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_trigger_too_few_is_not_guessed_at(study: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(study, root)
    path = root / "metadata_csv" / "participant_ratings.csv"
    path.write_text(path.read_text() + "1,5,5,0,5.5,5.5,5.5,5.5,1\n")
    shutil.copy(root / "face_video/s01/s01_trial04.avi", root / "face_video/s01/s01_trial05.avi")
    report = prepare(root, tmp_path / "cache", PREPARE)
    assert report.trials == 4
    assert report.skipped[0][:2] == (1, None)
    assert "holds 4 video starts (code 4); expected 5" in report.skipped[0][2]


def test_nothing_usable_is_an_error(study: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(study, root)
    for path in (root / "data_original").iterdir():
        path.write_bytes(b"\xffBIOSEMI")
    with pytest.raises(InputError, match=r"no usable trial in .*s01.bdf is not a BDF recording"):
        prepare(root, tmp_path / "cache", PREPARE)


def tree(root: Path, lines: list[str], videos: list[tuple[int, int]], bdfs: list[int]) -> Path:
    """Folders with empty files in DEAP's layout."""
    for folder in ("data_original", "face_video", "metadata_csv"):
        (root / folder).mkdir(parents=True)
    (root / "metadata_csv" / "participant_ratings.csv").write_text("\n".join(lines) + "\n")
    for subject in bdfs:
        (root / "data_original" / f"s{subject:02d}.bdf").touch()
    for subject, trial in videos:
        folder = root / "face_video" / f"s{subject:02d}"
        folder.mkdir(exist_ok=True)
        (folder / f"s{subject:02d}_trial{trial:02d}.avi").touch()
    return root


def test_missing_parts_are_reported_not_fatal(tmp_path: Path) -> None:
    lines = [HEADER]
    lines += [f"{s},{t},{3 - t},0,5,6,7,8,1" for s in (1, 2, 5, 23) for t in (1, 2)]
    lines += ["4,1,1,0,0.5,5,5,5,1", "4,2,2,0,,5,5,5,1"]
    root = tree(tmp_path, lines, [(1, 1), (1, 2), (2, 1), (4, 1), (4, 2)], [1, 4, 5, 23])
    files = scan(root, PrepareConfig())
    assert [(t.subject, t.trial, t.experiment_id) for t in files.trials] == [(1, 1, 2), (1, 2, 1)]
    assert files.presented[1] == 2
    assert files.skipped == [
        (2, None, "no recording s02.bdf"),
        (4, 1, "Valence is '0.5' in the ratings; expected 1 to 9"),
        (4, 2, "Valence is '' in the ratings; expected 1 to 9"),
        (5, None, "no videos s05_trialMM.avi"),
    ]
    asked = scan(root, PrepareConfig(subjects="all")).skipped
    assert asked[-1] == (23, None, "no videos s23_trialMM.avi")
    assert scan(root, PrepareConfig(subjects="1")).skipped == []


def test_a_root_of_another_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no recording sNN.bdf; expected DEAP's folders"):
        scan(tmp_path, PrepareConfig())
    root = tree(tmp_path / "a", [HEADER, "1,1,1,0,5,5,5,5,1"], [(2, 1)], [2])
    with pytest.raises(InputError, match=r"no subject in .* has both recording and videos"):
        scan(root, PrepareConfig())
    with pytest.raises(InputError, match=r"no recording sNN.dat; .* holds them, or --source bdf"):
        scan(root, PrepareConfig(source="dat"))
    (root / "metadata_csv" / "participant_ratings.csv").unlink()
    with pytest.raises(InputError, match=r"no participant_ratings \(.csv, .xls, .xlsx, .ods\)"):
        scan(root, PrepareConfig())


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_ratings_saved_by_spreadsheets(tmp_path: Path, separator: str) -> None:
    decimal = "," if separator == ";" else "."
    cells = ["1", "2", "7", "0", f"5{decimal}25", "6", "7", "8", ""]
    path = tmp_path / "r.csv"
    path.write_text(
        HEADER.replace(",", separator) + "\r\n" + separator.join(cells) + "\r\n",
        encoding="utf-8-sig",
    )
    [((subject, trial), row)] = read_ratings(path).items()
    assert (subject, trial, row["experiment_id"]) == (1, 2, "7")
    assert row["valence"] == f"5{decimal}25"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["Participant_id,Trial,Valence", "1,1,5"], "lacks the columns experiment_id, arousal"),
        (
            [HEADER, "1,1,1,0,5,5,5,5,1", "1,1,2,0,5,5,5,5,1"],
            "line 3: participant 1 trial 1 is there",
        ),
        (
            [HEADER, "1,1,1,0,5,5,5,5,1", "1,2,1,0,5,5,5,5,1"],
            "line 3: participant 1 experiment 1 is there twice",
        ),
        ([HEADER, "1,x,1,0,5,5,5,5,1"], "line 2: participant_id, trial, experiment_id must be"),
        ([], "lacks the columns"),
    ],
)
def test_a_damaged_table_of_ratings(tmp_path: Path, lines: list[str], words: str) -> None:
    (tmp_path / "r.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match=words):
        read_ratings(tmp_path / "r.csv")
