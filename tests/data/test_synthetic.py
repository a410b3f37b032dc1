from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import edfio
import numpy as np
import pytest

from pycdgkd.data import Cache, StudyConfig, sample_frames, video_fps, write_study
from pycdgkd.data.eeg import open_bdf
from pycdgkd.data.faces import FaceDetector, track_crops
from pycdgkd.data.synthetic import EEG_NOISE, VIDEO_NOISE, plan_study, resting
from pycdgkd.data.synthetic_eeg import EEG_NAMES, PERIPHERALS
from pycdgkd.data.synthetic_faces import Scene, draw_face, draw_identity
from pycdgkd.errors import InputError

from .conftest import STUDY, frontal_asymmetry

SMALL = StudyConfig(subjects=2, trials=2, trial_seconds=2.0, seed=9)


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_same_seed_same_bytes_whatever_the_number_of_processes(tmp_path: Path) -> None:
    write_study(tmp_path / "a", SMALL)
    write_study(tmp_path / "b", SMALL, workers=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    other = StudyConfig(subjects=1, trials=2, trial_seconds=2.0, seed=10)
    write_study(tmp_path / "c", other)
    first, last = digests(tmp_path / "a"), digests(tmp_path / "c")
    for name in ("data_original/s01.bdf", "face_video/s01/s01_trial01.avi", "truth.csv"):
        assert first[name] != last[name]


def test_layout_is_that_of_deap(study: Path) -> None:
    videos = sorted(str(p.relative_to(study)) for p in (study / "face_video").rglob("*.avi"))
    assert videos == [
        f"face_video/s{s:02d}/s{s:02d}_trial{t:02d}.avi" for s in (1, 2) for t in range(1, 5)
    ]
    ratings = table(study / "metadata_csv" / "participant_ratings.csv")
    assert ",".join(ratings[0]) == (
        "Participant_id,Trial,Experiment_id,Start_time,Valence,Arousal,Dominance,Liking,Familiarity"
    )
    assert len(ratings) == 8
    for subject in ("1", "2"):
        mine = [row for row in ratings if row["Participant_id"] == subject]
        assert [row["Trial"] for row in mine] == ["1", "2", "3", "4"]
        shown = [row["Experiment_id"] for row in mine]
        assert sorted(shown) == ["1", "2", "3", "4"]
        assert shown != sorted(shown)
    assert json.loads((study / "synthetic.json").read_text())["synthetic"] is True
    assert "No human being was recorded" in (study / "README.txt").read_text()


def test_recording_has_deaps_channels_and_triggers(study: Path) -> None:
    bdf = edfio.read_bdf(study / "data_original" / "s02.bdf")
    assert [signal.label for signal in bdf.signals] == [*EEG_NAMES, *PERIPHERALS, "Status"]
    assert len(bdf.signals) == 48
    assert {signal.sampling_frequency for signal in bdf.signals} == {512}
    status = bdf.signals[-1].digital
    assert set(np.unique(status & ~0xFF).tolist()) == {0x19FF00, 0x18FF00}
    assert (status == 0x19FF00).mean() > 0.99
    events = open_bdf(study / "data_original" / "s02.bdf").events()
    assert events[:, 1].tolist() == [1, 1, 2, *[3, 4, 5, 1] * 4, 2, 7]
    starts = events[events[:, 1] == 4, 0]
    ends = events[events[:, 1] == 5, 0]
    assert (ends - starts).tolist() == [8 * 512] * 4
    ratings = table(study / "metadata_csv" / "participant_ratings.csv")[4:]
    np.testing.assert_allclose([int(r["Start_time"]) for r in ratings], starts / 512e-6, atol=1)


def test_electrodes_have_the_offset_of_a_coupled_amplifier(study: Path) -> None:
    bdf = edfio.read_bdf(study / "data_original" / "s01.bdf")
    offsets = np.array([signal.data.mean() for signal in bdf.signals[:32]])
    spread = np.array([signal.data.std() for signal in bdf.signals[:32]])
    assert np.abs(offsets).max() > 5000
    assert spread.max() < 100


def test_videos_have_the_exact_number_of_frames(study: Path) -> None:
    for path in sorted((study / "face_video" / "s01").iterdir()):
        assert sum(1 for _ in sample_frames(path, stride=1)) == 400
        assert video_fps(path) == 50


def test_a_folder_with_something_in_it_is_refused(study: Path) -> None:
    with pytest.raises(InputError, match="is not empty; expected a new folder"):
        write_study(study, SMALL)


def test_progress_is_one_line_a_subject(tmp_path: Path) -> None:
    lines: list[str] = []
    write_study(tmp_path / "a", SMALL, progress=lines.append)
    assert [line.rsplit(",", 1)[0] for line in lines] == [
        "synthetic study: s01, 1/2",
        "synthetic study: s02, 2/2",
    ]
    assert lines[-1].endswith("0 s left")


def evidence(config: StudyConfig) -> dict[str, np.ndarray]:
    trials = [trial for subject in plan_study(config) for trial in subject]
    names = ("valence", "video_valence", "eeg_valence", "video_arousal")
    columns = {name: np.array([getattr(trial, name) for trial in trials]) for name in names}
    return {**columns, "rating": np.array([trial.ratings[0] for trial in trials])}


def test_strength_moves_the_evidence() -> None:
    share = {}
    for strength in (0.0, 1.0, 3.0):
        got = evidence(StudyConfig(30, 40, video_strength=strength, eeg_strength=strength))
        for name in ("video_valence", "eeg_valence"):
            share[name, strength] = ((got[name] > 0) == (got["valence"] > 0)).mean()
    for name in ("video_valence", "eeg_valence"):
        assert share[name, 0.0] == pytest.approx(0.5, abs=0.05)
        assert 0.8 < share[name, 1.0] < 0.99
        assert share[name, 3.0] > 0.99
    assert share["video_valence", 1.0] < share["eeg_valence", 1.0]


def test_a_subject_shows_its_rest_in_every_trial() -> None:
    plain = StudyConfig(subjects=3, trials=10, seed=4)
    shifted = replace(plain, subject_effect=0.8)
    for before, after in zip(plan_study(plain), plan_study(shifted), strict=True):
        rest = resting(shifted, before[0].subject)
        for old, new in zip(before, after, strict=True):
            assert (old.valence, old.arousal, old.ratings) == (
                new.valence,
                new.arousal,
                new.ratings,
            )
            for row, name in enumerate(("video", "eeg")):
                for column, what in enumerate(("valence", "arousal")):
                    values = [np.arctanh(getattr(t, f"{name}_{what}")) for t in (old, new)]
                    assert values[1] - values[0] == pytest.approx(rest[row, column], abs=1e-6)
    rests = np.stack([resting(replace(shifted, subjects=99), s) for s in range(1, 100)])
    assert rests.std(0)[0] == pytest.approx(0.8 * VIDEO_NOISE, rel=0.2)
    assert rests.std(0)[1] == pytest.approx(0.8 * EEG_NOISE, rel=0.2)
    assert not resting(plain, 1).any()


def test_the_two_modalities_err_independently() -> None:
    got = evidence(StudyConfig(30, 40))
    wrong = [(got[name] > 0) != (got["valence"] > 0) for name in ("video_valence", "eeg_valence")]
    assert (wrong[0] & wrong[1]).mean() < 2 * wrong[0].mean() * wrong[1].mean() + 0.01
    both = (got["video_valence"] + got["eeg_valence"] > 0) != (got["valence"] > 0)
    assert both.mean() < min(w.mean() for w in wrong)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_label_noise_is_the_share_of_wrong_ratings(noise: float) -> None:
    got = evidence(StudyConfig(40, 40, label_noise=noise, rating_noise=0.0))
    wrong = (got["rating"] > 5) != (got["valence"] > 0)
    assert wrong.mean() == pytest.approx(noise, abs=0.03)
    assert got["rating"].min() >= 1
    assert got["rating"].max() <= 9


def test_prepared_eeg_shows_the_valence_that_was_drawn(cache: Cache) -> None:
    """The evidence of each trial comes back as frontal alpha asymmetry, subject by subject."""
    asymmetry = frontal_asymmetry(np.asarray(cache.eeg))
    drawn = {(t.subject, t.trial): t.eeg_valence for s in plan_study(STUDY) for t in s}
    keys = zip(cache.samples["subject"].tolist(), cache.samples["trial"].tolist(), strict=True)
    expected = np.array([drawn[key] for key in keys])
    assert np.corrcoef(asymmetry, expected)[0, 1] > 0.9


def test_prepared_eeg_shows_the_arousal_that_was_drawn(cache: Cache) -> None:
    eeg = np.asarray(cache.eeg)
    frequency = np.fft.rfftfreq(512, 1 / 128)
    power = np.abs(np.fft.rfft(eeg * np.hanning(512))) ** 2
    bands = [
        np.log(power[..., (frequency >= low) & (frequency <= high)].sum(-1)).mean(axis=1)
        for low, high in ((15, 30), (8, 13))
    ]
    drawn = {(t.subject, t.trial): t.eeg_arousal for s in plan_study(STUDY) for t in s}
    keys = zip(cache.samples["subject"].tolist(), cache.samples["trial"].tolist(), strict=True)
    expected = np.array([drawn[key] for key in keys])
    for subject in (1, 2):
        mine = cache.samples["subject"] == subject
        assert np.corrcoef((bands[0] - bands[1])[mine], expected[mine])[0, 1] > 0.9


def test_the_expression_can_be_read_from_detected_crops() -> None:
    """A plain ridge regression on 48x48 crops tells smile and arousal of faces it has not seen."""
    rng = np.random.default_rng(0)
    people = [draw_identity(rng) for _ in range(6)]
    drawn = rng.uniform(-1, 1, (300, 2))
    frames = []
    for index, (smile, arousal) in enumerate(drawn.tolist()):
        scene = Scene(
            smile, arousal, 0.0, 120 + rng.normal(0, 8), 94 + rng.normal(0, 4),
            44 * rng.uniform(0.9, 1.1), rng.normal(0, 0.06), rng.uniform(-0.8, 0.8),
            rng.uniform(0.8, 1.1), tuple(rng.uniform(80, 170, 3)),
        )  # fmt: skip
        grain = 3 * rng.standard_normal((192, 240), dtype=np.float32)
        frames.append(draw_face(240, 192, people[index % 6], scene, grain))
    tracked = track_crops(np.stack(frames), FaceDetector(60), size=48, margin=0.1)
    assert tracked is not None
    assert tracked[1].mean() > 0.97
    grey = tracked[0].astype(np.float64).mean(axis=1).reshape(300, -1)
    grey = (grey - grey.mean(axis=1, keepdims=True)) / grey.std(axis=1, keepdims=True)
    grey -= grey[:220].mean(axis=0)
    kernel = grey[:220] @ grey[:220].T + 100 * np.eye(220)
    guess = grey[220:] @ grey[:220].T @ np.linalg.solve(kernel, drawn[:220])
    for column in range(2):
        assert np.corrcoef(guess[:, column], drawn[220:, column])[0, 1] > 0.75
