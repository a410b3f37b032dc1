"""A small synthetic study, written as raw files in the layout of DEAP's original recordings.

    ROOT/data_original/sNN.bdf                  32 EEG + 15 peripheral channels + Status, 512 Hz
    ROOT/face_video/sNN/sNN_trialMM.avi         50 frames a second, MM = presentation order
    ROOT/metadata_csv/participant_ratings.csv   DEAP's columns; Experiment_id: the video shown
    ROOT/truth.csv                              the latent values behind it all
    ROOT/README.txt, ROOT/synthetic.json        what this is; the marker that preparation looks for

Each trial has a latent valence and arousal in [-1, 1], given by its video and a little by the
subject. Three things see it, each with noise of its own: the ratings, the face and the EEG. Face
and EEG each get one evidence value a trial, tanh(strength * latent + rest + noise), rest being the
subject's own, so either alone is right only most of the time and the two together are right more
often. It shows that the chain works; it says nothing about how well emotions can be read from real
faces or real EEG.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError, require
from pycdgkd.processes import worker_pool

from .config import StudyConfig, config_to_dict
from .synthetic_eeg import RATE, plan_timeline, write_recording
from .synthetic_faces import Identity, Scene, draw_face, draw_identity

Pairs = npt.NDArray[np.float64]

MARKER = "synthetic.json"
RATING_COLUMNS = (
    "Participant_id", "Trial", "Experiment_id", "Start_time",
    "Valence", "Arousal", "Dominance", "Liking", "Familiarity",
)  # fmt: skip
TRUTH_COLUMNS = ("subject", "trial", "experiment_id", "latent_valence", "latent_arousal")
VIDEO_NOISE = 0.45  # standard deviation of a trial's evidence noise in the face
EEG_NOISE = 0.35  # the same in the EEG
# Streams of random numbers: each draws from default_rng([seed, stream, ...]), so that no file
# depends on the order, or the process, in which the files are written.
STIMULI, RATINGS, RECORDING, IDENTITY, TRIAL_VIDEO, TIMELINE, REST = range(7)

README = """\
Synthetic recordings in the layout of DEAP's original files (see synthetic.json for the
parameters). No human being was recorded: faces and EEG are drawn from a formula. The latent
valence and arousal of each trial are in truth.csv. Results on these files show that the
software works; they say nothing about emotion recognition on real people.
"""


@dataclass(frozen=True)
class Trial:
    """One trial of one subject; evidence values lie in [-1, 1], ratings in [1, 9]."""

    subject: int
    trial: int
    experiment_id: int
    valence: float
    arousal: float
    video_valence: float
    video_arousal: float
    eeg_valence: float
    eeg_arousal: float
    ratings: tuple[float, float, float, float]
    familiarity: int


def plan_study(config: StudyConfig) -> list[list[Trial]]:
    """All trials by subject, in presentation order."""
    stimuli = _stimuli(config)
    return [_plan_subject(config, stimuli, subject) for subject in range(1, config.subjects + 1)]


def _stimuli(config: StudyConfig) -> list[tuple[float, float]]:
    """(valence, arousal) of each video: the four quadrants in turn, never close to neutral."""
    rng = np.random.default_rng([config.seed, STIMULI])
    size = rng.uniform(0.35, 1.0, (config.trials, 2))
    signs = [(1 - 2 * (k % 2), 1 - 2 * (k // 2 % 2)) for k in range(config.trials)]
    return [(float(s[0] * m[0]), float(s[1] * m[1])) for s, m in zip(signs, size, strict=True)]


def resting(config: StudyConfig, subject: int) -> Pairs:
    """What a subject shows without any emotion: (face, EEG) by (valence, arousal), (2, 2)."""
    drawn = np.random.default_rng([config.seed, REST, subject]).standard_normal((2, 2))
    return config.subject_effect * np.array([[VIDEO_NOISE], [EEG_NOISE]]) * drawn


def _plan_subject(
    config: StudyConfig, stimuli: list[tuple[float, float]], subject: int
) -> list[Trial]:
    rng = np.random.default_rng([config.seed, RATINGS, subject])
    order = rng.permutation(config.trials)
    face_rest, eeg_rest = resting(config, subject)
    trials = []
    for trial, shown in enumerate(order.tolist(), start=1):
        latent = np.clip(np.array(stimuli[shown]) + rng.normal(0, 0.1, 2), -1, 1)
        video = np.tanh(config.video_strength * latent + face_rest + rng.normal(0, VIDEO_NOISE, 2))
        eeg = np.tanh(config.eeg_strength * latent + eeg_rest + rng.normal(0, EEG_NOISE, 2))
        ratings = _rate(config, latent, rng)
        trials.append(
            Trial(
                subject, trial, shown + 1, float(latent[0]), float(latent[1]),
                float(video[0]), float(video[1]), float(eeg[0]), float(eeg[1]),
                ratings, int(rng.integers(1, 6)),
            )
        )  # fmt: skip
    return trials


def _rate(
    config: StudyConfig,
    latent: np.ndarray[tuple[int], np.dtype[np.float64]],
    rng: np.random.Generator,
) -> tuple[float, float, float, float]:
    """Valence, arousal, dominance, liking on DEAP's continuous 1-9 scale, two decimals."""
    centre = np.array([latent[0], latent[1], 0.3 * latent[0], 0.7 * latent[0]])
    centre = np.where(rng.random(4) < config.label_noise, -centre, centre)
    points = np.clip(5 + 4 * centre + rng.normal(0, config.rating_noise, 4), 1, 9).round(2)
    return (float(points[0]), float(points[1]), float(points[2]), float(points[3]))


def write_study(
    root: Path,
    config: StudyConfig,
    *,
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write a study into ``root``, which must be empty or not exist yet.

    workers: processes that write the recordings; the files do not depend on it. More than one is
    only for programs guarded by ``if __name__ == "__main__"``, as Python's spawn method asks for.
    Raises ``InputError`` when ``root`` already holds something.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(
            f"{root} is not empty; expected a new folder for the synthetic study; "
            "remedy: delete it or give another path"
        )
    (root / "data_original").mkdir(parents=True)
    study = plan_study(config)
    _write_tables(root, config, study)
    # The marker goes first: an interrupted study must never pass for real recordings.
    marker = {"synthetic": True, "generator": "pycdgkd", **config_to_dict(config)}
    (root / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    (root / "README.txt").write_text(README, encoding="utf-8")
    began = time.monotonic()
    for done, subject in enumerate(_run(root, config, study, workers), start=1):
        if progress is not None:
            left = (time.monotonic() - began) / done * (len(study) - done)
            progress(f"synthetic study: s{subject:02d}, {done}/{len(study)}, {left:.0f} s left")


def _run(root: Path, config: StudyConfig, study: list[list[Trial]], workers: int) -> Iterator[int]:
    """Write every subject, yielding each one's number when it is done."""
    if workers <= 1:
        for trials in study:
            yield write_subject(root, config, trials)
        return
    with worker_pool(workers) as pool:
        jobs = [pool.submit(write_subject, root, config, trials) for trials in study]
        for job in as_completed(jobs):
            yield job.result()


def _write_tables(root: Path, config: StudyConfig, study: list[list[Trial]]) -> None:
    (root / "metadata_csv").mkdir()
    ratings, truth = [RATING_COLUMNS], [TRUTH_COLUMNS]
    rows: list[tuple[object, ...]] = []
    latent: list[tuple[object, ...]] = []
    for trials in study:
        timeline = plan_timeline(config, _timeline_rng(config, trials[0].subject))
        for trial, start in zip(trials, timeline.starts, strict=True):
            key = (trial.subject, trial.trial, trial.experiment_id)
            rows.append((*key, round(start / RATE * 1e6), *trial.ratings, trial.familiarity))
            latent.append((*key, repr(trial.valence), repr(trial.arousal)))
    _write_csv(root / "metadata_csv" / "participant_ratings.csv", [*ratings, *rows])
    _write_csv(root / "truth.csv", [*truth, *latent])


def _write_csv(path: Path, rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _timeline_rng(config: StudyConfig, subject: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, TIMELINE, subject])


def write_subject(root: Path, config: StudyConfig, trials: list[Trial]) -> int:
    """Write one subject's BDF and videos; returns the subject's number."""
    subject = trials[0].subject
    write_recording(
        root / "data_original" / f"s{subject:02d}.bdf",
        config,
        plan_timeline(config, _timeline_rng(config, subject)),
        [trial.eeg_valence for trial in trials],
        [trial.eeg_arousal for trial in trials],
        np.random.default_rng([config.seed, RECORDING, subject]),
    )
    folder = root / "face_video" / f"s{subject:02d}"
    folder.mkdir(parents=True)
    person = draw_identity(np.random.default_rng([config.seed, IDENTITY, subject]))
    for trial in trials:
        rng = np.random.default_rng([config.seed, TRIAL_VIDEO, subject, trial.trial])
        path = folder / f"s{subject:02d}_trial{trial.trial:02d}.avi"
        write_video(path, config, person, trial, rng)
    return subject


def draw_scenes(config: StudyConfig, trial: Trial, rng: np.random.Generator) -> Iterator[Scene]:
    """The scenes of one trial's video, each of which stands for ``config.hold`` frames."""
    count = -(-round(config.trial_seconds * config.fps) // config.hold)
    unit = min(config.width, config.height)
    x, y = config.width / 2 + rng.normal(0, 0.03 * unit), 0.49 * config.height + rng.normal(0, 2)
    size, turn = 0.23 * unit * rng.uniform(0.92, 1.08), rng.normal(0, 0.05)
    light, gain = rng.uniform(-0.8, 0.8), rng.uniform(0.8, 1.1)
    back = tuple(rng.uniform(80, 170) + rng.uniform(-18, 18, 3))
    for _ in range(count):
        yield Scene(
            smile=float(np.clip(trial.video_valence + rng.normal(0, 0.15), -1, 1)),
            arousal=float(np.clip(trial.video_arousal + rng.normal(0, 0.15), -1, 1)),
            blink=float(rng.uniform(0.6, 1.0)) if rng.random() < 0.05 else 0.0,
            x=x + rng.normal(0, 0.015 * unit),
            y=y + rng.normal(0, 0.015 * unit),
            size=size * rng.uniform(0.97, 1.03),
            turn=turn + rng.normal(0, 0.03),
            light=light,
            gain=gain,
            back=back,
        )


def write_video(
    path: Path, config: StudyConfig, person: Identity, trial: Trial, rng: np.random.Generator
) -> None:
    """Write one trial's AVI (MPEG-4, as every FFmpeg build has it) with the exact frame count."""
    av = require("av", "train")
    total = round(config.trial_seconds * config.fps)
    # bitexact leaves out library versions and random identifiers: equal seeds, equal bytes.
    with av.open(str(path), "w", format="avi", options={"fflags": "+bitexact"}) as container:
        options = {"flags": "+bitexact+qscale", "global_quality": str(4 * 118)}
        stream = container.add_stream("mpeg4", rate=config.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = config.width, config.height, "yuv420p"
        stream.codec_context.thread_count = 1
        number = 0
        for scene in draw_scenes(config, trial, rng):
            grain = 3 * rng.standard_normal((config.height, config.width), dtype=np.float32)
            pixels = draw_face(config.width, config.height, person, scene, grain)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            for _ in range(min(config.hold, total - number)):
                frame.pts = number
                container.mux(stream.encode(frame))
                number += 1
        container.mux(stream.encode())
