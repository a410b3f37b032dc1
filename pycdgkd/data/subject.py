"""One subject's trials: EEG windows beside the face crops of their frames, into a cache's part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError

from .boxes import read_boxes
from .cache_plan import Plan
from .cache_writer import CacheWriter, TrialData, open_writer, part_folder
from .config import PrepareConfig
from .faces import Crops, FaceDetector, centre_boxes, crop_faces, largest_faces
from .progress import add_seconds
from .study import ReadTrial, Study, Trial
from .video import read_frames, read_frames_at

# (what, finished trials, seconds by stage)
Tell: TypeAlias = Callable[[str, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class SubjectJob:
    """The pending trials of one subject and where they go."""

    plan: Plan
    study: Study
    cache: Path
    trials: tuple[Trial, ...]
    strict: bool


def prepare_subject(job: SubjectJob, tell: Tell) -> dict[str, float]:
    """Prepare a subject's trials into its part of the cache; returns the seconds by stage."""
    with open_writer(part_folder(job.cache, job.trials[0].subject), job.plan) as writer:
        return _Subject(job, writer, tell).all()


class _Subject:
    def __init__(self, job: SubjectJob, writer: CacheWriter, tell: Tell) -> None:
        self.job, self.writer, self.tell = job, writer, tell
        self.config = config = job.plan.config
        self.detector = FaceDetector(config.min_face) if config.faces == "mtcnn" else None
        self.boxes = read_boxes(job.study.root) if config.faces == "boxes" else {}
        self.seconds: dict[str, float] = {}
        self.total: dict[str, float] = {}

    def all(self) -> dict[str, float]:
        """Every recording in turn, opened once for all of its trials."""
        for path, group in groupby(self.job.trials, key=lambda trial: trial.eeg):
            self._recording(path, list(group))
        return self.total

    def _recording(self, path: Path, trials: list[Trial]) -> None:
        try:
            with self._timed("eeg"), _readable(path):
                read = self._open(path, trials)
        except InputError as error:
            # One recording for all that is left of a subject: said once.
            whole = len(trials) > 1 and len(trials) == len(self.job.trials)
            for trial in [None] if whole else trials:
                self._skip(trials[0].subject, trial, error, len(trials) if whole else 1)
            return
        for trial in trials:
            try:
                data = self._trial(trial, read)
            except InputError as error:
                self._skip(trial.subject, trial, error, 1)
                continue
            with self._timed("write"):
                self.writer.add(*trial.key, data)
            self._told(f"s{trial.subject:02d} trial {trial.trial}", 1)

    def _open(self, path: Path, trials: Sequence[Trial]) -> ReadTrial:
        from .pipeline import dataset_module

        study = self.job.study
        opened: ReadTrial = dataset_module(study.dataset).open_eeg(study, path, trials, self.config)
        return opened

    def _skip(self, subject: int, trial: Trial | None, error: InputError, count: int) -> None:
        name = f"s{subject:02d}" if trial is None else f"s{subject:02d} trial {trial.trial}"
        if self.job.strict:
            raise InputError(f"{name}: {error}") from error
        self.writer.skip(subject, None if trial is None else trial.trial, str(error))
        self._told(f"{name} skipped: {error}", count)

    def _told(self, what: str, trials: int) -> None:
        add_seconds(self.total, self.seconds)
        spent, self.seconds = self.seconds, {}
        self.tell(what, trials, spent)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            add_seconds(self.seconds, {stage: time.perf_counter() - began})

    def _trial(self, trial: Trial, read: ReadTrial) -> TrialData:
        """Frames of each window beside its EEG; windows without either are left out."""
        config = self.config
        with self._timed("eeg"), _readable(trial.eeg):
            eeg = read(trial)
        starts = config.window_starts(trial.seconds)
        places = np.array([window_frames(config, trial, start) for start in starts])
        places = places.reshape(-1, config.frames_per_window)
        keys = np.unique(places)
        with self._timed("decode"), _readable(trial.video):
            frames, got = _frames(trial, config, keys)
        at = np.searchsorted(keys, places)
        mask = got[at]
        usable = np.flatnonzero(mask.any(axis=1) & (np.arange(len(starts)) < len(eeg.windows)))
        if len(usable) == 0:
            raise InputError(
                f"no window of {trial.seconds:g} s of subject {trial.subject} trial {trial.trial} "
                f"is covered by both recordings: {len(frames)} frames of {trial.video.name}, "
                f"{len(eeg.windows)} windows of EEG; remedy: check their lengths"
            )
        with self._timed("detect"):
            crops, found = self._crops(trial, frames, keys[got])
        crop_of = np.cumsum(got) - 1
        video = np.zeros((len(usable), places.shape[1], *crops.shape[1:]), np.uint8)
        own = np.zeros(video.shape[:2], np.bool_)
        rows = []
        for row, window in enumerate(usable.tolist()):
            seen = crop_of[at[window][mask[window]]]
            video[row, mask[window]] = crops[seen]
            own[row, mask[window]] = found[seen]
            rows.append(_row(trial, window, starts[window], int(found[seen].sum())))
        missed = 0 if config.faces == "none" else int((~found).sum())
        notes = [eeg.note, _note(mask, usable, len(eeg.windows))]
        return TrialData(
            rows=rows,
            video=video,
            mask=mask[usable],
            found=own,
            eeg=eeg.windows[usable],
            spectra=eeg.spectra,
            frames=len(frames),
            missed=missed,
            note="; ".join(note for note in notes if note),
        )

    def _crops(self, trial: Trial, frames: npt.NDArray[np.uint8], keys: npt.NDArray[Any]) -> Crops:
        config = self.config
        margin = config.margin
        if config.faces == "none":
            (boxes, found), margin = centre_boxes(frames), 0.0
        elif self.detector is not None:
            boxes, found = largest_faces(frames, self.detector)
        else:
            given = self.boxes.get(trial.video.resolve())
            if given is None:
                raise InputError(
                    f"boxes.csv speaks of no box of {trial.video}; expected at least one; "
                    "remedy: add its lines"
                )
            seconds = keys / config.fps if config.timing == "count" else keys
            boxes, found = given.at(seconds)
        if config.faces == "mtcnn" and not found.any():
            raise InputError(
                f"no face in any of {len(frames)} frames of {trial.video}; expected at least one; "
                f"remedy: a smaller min_face than {config.min_face}, or faces='none'"
            )
        return crop_faces(frames, boxes, size=config.img_size, margin=margin), found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A file that the system cannot read is bad input like any other."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; remedy: mend its permissions, or copy "
            "it again from its source"
        ) from error


def window_frames(config: PrepareConfig, trial: Trial, start: float) -> npt.NDArray[Any]:
    """Places of the frames kept of the window that starts at ``start`` seconds of the stimulus:
    frame numbers, or seconds of the video where it is sampled by its time stamps.
    """
    begin = trial.video_start + config.video_offset + start
    steps = config.frame_stride * np.arange(config.frames_per_window, dtype=np.int64)
    if config.timing == "count":
        numbers: npt.NDArray[np.int64] = round(begin * config.fps) + steps
        return numbers
    return np.round(begin + steps / config.fps, 6)


def _frames(
    trial: Trial, config: PrepareConfig, keys: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """The frames at these places and which of the places have one."""
    if config.timing == "stamps":
        return read_frames_at(trial.video, keys, 1.5 / config.fps)
    frames, numbers = read_frames(trial.video, keys)
    return frames, np.isin(keys, numbers)


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


def _row(trial: Trial, segment: int, start: float, faces: int) -> dict[str, Any]:
    return {
        "subject": trial.subject,
        "trial": trial.trial,
        "experiment_id": trial.experiment_id,
        "segment": segment,
        "start_s": start,
        **trial.labels,
        "faces_found": faces,
    }
