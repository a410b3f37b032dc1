"""DEAP's original recordings (BDF and face video) to a cache.

    ROOT/data_original/sNN.bdf   ROOT/face_video/sNN/sNN_trialMM.avi
    ROOT/metadata_csv/participant_ratings.csv

The order trap: videos and BDF trials lie in presentation order (the column Trial), while
Experiment_id names the video that was shown, in another order for each participant. Ratings are
therefore always joined by (Participant_id, Trial) here; Experiment_id is only carried along.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError

from .cache import MANIFEST
from .cache_writer import (
    CacheWriter,
    Plan,
    TrialData,
    check_same,
    fingerprints,
    open_writer,
    read_plan,
)
from .config import PrepareConfig
from .deap_files import Rated, recording_path, scan
from .eeg import CHANNEL_ORDER, clean, cut_windows, read_recording, trial_starts
from .faces import FaceDetector, track_crops
from .synthetic import MARKER
from .video import read_frames

Progress = Callable[[str], None] | None


@dataclass(frozen=True)
class PrepareReport:
    """What ``prepare`` did.

    samples, trials: how many the cache holds. skipped: (subject, trial or None for all of the
    subject, reason), also for single windows left out. resumed_trials: trials that an earlier,
    interrupted run had done. face_miss_rate: share of frames without a face of their own.
    """

    samples: int
    trials: int
    skipped: list[tuple[int, int | None, str]]
    resumed_trials: int
    face_miss_rate: float


def prepare(
    root: Path | str, cache: Path | str, config: PrepareConfig, *, progress: Progress = None
) -> PrepareReport:
    """Prepare all subjects that have a recording, ratings and videos.

    A recording, video or trial that cannot be used is skipped and named in the report. An
    interrupted preparation resumes; a finished one is left alone. Raises ``InputError`` when the
    folders are not laid out as above, when nothing can be used, or when ``cache`` was made with
    other parameters or from other files (the differences are named): after mending a recording,
    prepare a new cache.
    """
    root, cache = Path(root), Path(cache)
    rated, plan = _plan(root, config)
    found = read_plan(cache)
    if found is not None:
        check_same(cache, found, plan)
        if (cache / MANIFEST).is_file():
            return _report(found, len(plan.trials))
    writer = open_writer(cache, plan)
    resumed = sum(writer.done(*trial) for trial in plan.trials)
    _Run(root, config, writer, progress).all(rated)
    if writer.count == 0:
        reasons = "; ".join(str(entry["skipped"]) for entry in writer.journal[:2])
        raise InputError(
            f"no usable trial in {root} ({len(plan.trials)} tried): {reasons}; "
            f"remedy: mend the recordings and delete {cache}"
        )
    return _report(writer.finish(), resumed)


def _plan(root: Path, config: PrepareConfig) -> tuple[list[Rated], Plan]:
    """The trials that have everything they need, and the plan of the cache."""
    files = scan(root)
    inputs = {files.ratings, *(trial.video for trial in files.trials)}
    inputs |= {recording_path(root, trial.subject) for trial in files.trials}
    plan = Plan(
        config=config,
        dataset="deap",
        synthetic=(root / MARKER).is_file(),
        channels=CHANNEL_ORDER[config.channels],
        inputs=fingerprints(root, inputs),
        trials=tuple((trial.subject, trial.trial) for trial in files.trials),
        skipped=tuple(files.skipped),
    )
    return files.trials, plan


def _report(manifest: dict[str, Any], resumed: int) -> PrepareReport:
    return PrepareReport(
        samples=manifest["samples"],
        trials=manifest["used_trials"],
        skipped=[(subject, trial, reason) for subject, trial, reason in manifest["skipped"]],
        resumed_trials=resumed,
        face_miss_rate=manifest["face_miss_rate"],
    )


class _Run:
    """One run over the trials that the writer does not have yet."""

    def __init__(
        self, root: Path, config: PrepareConfig, writer: CacheWriter, progress: Progress
    ) -> None:
        self.root, self.config, self.writer, self.progress = root, config, writer, progress
        self.detector = FaceDetector(config.min_face) if config.faces == "mtcnn" else None
        self.began = time.monotonic()
        self.total = self.before = self.finished = 0

    def all(self, trials: list[Rated]) -> None:
        """Every subject in turn; its BDF is read once."""
        self.total = len(trials)
        self.before = sum(self.writer.done(trial.subject, trial.trial) for trial in trials)
        for subject in sorted({trial.subject for trial in trials}):
            mine = [trial for trial in trials if trial.subject == subject]
            pending = [trial for trial in mine if not self.writer.done(subject, trial.trial)]
            if pending:
                self._subject(subject, pending)

    def _subject(self, subject: int, pending: list[Rated]) -> None:
        try:
            recording = read_recording(recording_path(self.root, subject))
            starts = trial_starts(recording)
            if len(starts) != pending[0].presented:
                raise InputError(
                    f"{recording.path} holds {len(starts)} video starts (code 4); expected "
                    f"{pending[0].presented}, the trials that were presented by the ratings; "
                    "remedy: check the recording"
                )
            cleaned = clean(recording, self.config)
        except InputError as error:
            self.writer.skip(subject, None, str(error))
            self._tell(f"s{subject:02d} skipped: {error}", len(pending))
            return
        for trial in pending:
            name = f"s{subject:02d} trial {trial.trial}"
            try:
                start = int(starts[trial.trial - 1])
                windows = cut_windows(cleaned, start, recording, self.config)
                self.writer.add(subject, trial.trial, self._trial(trial, windows))
                self._tell(name, 1)
            except InputError as error:
                self.writer.skip(subject, trial.trial, str(error))
                self._tell(f"{name} skipped: {error}", 1)

    def _trial(self, trial: Rated, eeg: npt.NDArray[np.float32]) -> TrialData:
        """Frames of each window beside its EEG; windows without either are left out."""
        config = self.config
        numbers = np.array([window_frames(config, start) for start in config.window_starts])
        frames, got = read_frames(trial.video, numbers)
        mask = np.isin(numbers, got)
        usable = np.flatnonzero(mask.any(axis=1) & (np.arange(len(numbers)) < len(eeg)))
        if len(usable) == 0:
            raise InputError(
                f"no window of subject {trial.subject} trial {trial.trial} is covered by both "
                f"recordings: {len(got)} frames of {trial.video.name}, {len(eeg)} windows of EEG; "
                "remedy: check their lengths"
            )
        crops, found = self._crops(trial, frames)
        place = np.searchsorted(got, numbers)
        video = np.zeros((len(usable), numbers.shape[1], *crops.shape[1:]), np.uint8)
        rows = []
        for row, window in enumerate(usable.tolist()):
            seen = place[window][mask[window]]
            video[row, mask[window]] = crops[seen]
            rows.append(_row(trial, window, config.window_starts[window], int(found[seen].sum())))
        missed = int((~found).sum()) if self.detector is not None else 0
        note = _note(mask, usable, len(eeg))
        return TrialData(rows, video, mask[usable], eeg[usable], len(got), missed, note)

    def _crops(
        self, trial: Rated, frames: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        config = self.config
        tracked = track_crops(frames, self.detector, size=config.img_size, margin=config.margin)
        if tracked is None:
            raise InputError(
                f"no face in any of {len(frames)} frames of {trial.video}; expected at least one; "
                f"remedy: a smaller min_face than {config.min_face}, or faces='none'"
            )
        return tracked

    def _tell(self, what: str, trials: int) -> None:
        self.finished += trials
        if self.progress is not None:
            left = self.total - self.before - self.finished
            seconds = (time.monotonic() - self.began) / self.finished * left
            done = self.before + self.finished
            self.progress(f"prepare deap: {what}, {done}/{self.total} trials, {seconds:.0f} s left")


def window_frames(config: PrepareConfig, start: float) -> npt.NDArray[np.int64]:
    """Numbers of the frames kept of the window that starts at ``start`` seconds of the stimulus."""
    first = round((config.video_offset + start) * config.fps)
    return first + config.frame_stride * np.arange(config.frames_per_window, dtype=np.int64)


def _note(mask: npt.NDArray[np.bool_], usable: npt.NDArray[np.int64], eeg: int) -> str:
    """What of a trial could not be used, in words; empty when all of it could."""
    windows, used = len(mask), mask[usable]
    notes = []
    if len(usable) < windows:
        notes.append(
            f"{windows - len(usable)} of {windows} windows left out: the recordings cover {eeg} "
            f"windows of EEG and {int(mask.any(axis=1).sum())} of video"
        )
    if not used.all():
        notes.append(f"{int((~used).sum())} frames past the end of the video are masked")
    return "; ".join(notes)


def _row(trial: Rated, segment: int, start: float, faces: int) -> dict[str, Any]:
    return {
        "subject": trial.subject,
        "trial": trial.trial,
        "experiment_id": trial.experiment_id,
        "segment": segment,
        "start_s": start,
        "valence": trial.valence,
        "arousal": trial.arousal,
        "dominance": trial.dominance,
        "liking": trial.liking,
        "faces_found": faces,
    }
