"""Parameters of the preparation and of the synthetic study (standard library only)."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pycdgkd.errors import InputError

DATASETS = ("deap", "mahnob", "folder")
CHANNEL_SETS = ("tsception28", "all32")
FACE_MODES = ("mtcnn", "boxes", "none")
SOURCES = ("bdf", "dat")
TIMINGS = ("count", "stamps")
BASELINES = ("none", "mean")

ConfigT = TypeVar("ConfigT", "PrepareConfig", "StudyConfig")


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _at_least(name: str, value: float, low: float) -> None:
    if not (math.isfinite(value) and value >= low):
        raise InputError(f"{name} must be a finite number of at least {low}; got {value}")


def _above(name: str, value: float, low: float) -> None:
    if not (math.isfinite(value) and value > low):
        raise InputError(f"{name} must be a finite number above {low}; got {value}")


def split_names(text: str) -> tuple[str, ...]:
    """The names in a list such as "Fz,Cz"."""
    return tuple(part.strip() for part in text.split(","))


def _names(name: str, text: str, expected: str) -> None:
    names = split_names(text)
    if not all(re.match("[A-Za-z]", part) for part in names) or len(
        {part.casefold() for part in names}
    ) != len(names):
        raise InputError(f"{name} must be {expected} separated by commas, each once; got {text!r}")


@dataclass(frozen=True)
class PrepareConfig:
    """How raw recordings become samples. The defaults are those of DEAP; ``of`` has the others'.

    source: "bdf" (original recordings) or "dat" (DEAP's preprocessed files).
    subjects: "" (those that the dataset's papers use), "all", or numbers as in "1,2,7".
    labels: columns kept as labels, as in "valence,arousal"; "" for the dataset's own.
    sfreq: EEG rate of the cache in hertz.
    channels: "tsception28" (28 electrodes, left half then mirrored right half), "all32", or names
    as in "Fz,Cz,Pz".
    notch: mains frequency in hertz, 0 for none. low, high: band-pass edges in hertz.
    baseline: "mean" subtracts each electrode's mean over the last ``baseline_seconds`` before the
    stimulus.
    window, stride: length and distance of the samples of one trial, in seconds.
    trial_seconds: length of the stimulus from its start on, 0 for each stimulus's own.
    fps: true frame rate of the face videos; metadata of real files is wrong too often to be used.
    timing: frames are found by "count" at that rate, or by the video's own time "stamps".
    frame_stride: one face is kept every so many frames of a window. frames: at most so many, 0 for
    all.
    img_size: edge of the square face crop in pixels. margin: widening of the box, as a share of it.
    faces: "mtcnn" (detected faces), "boxes" (ROOT/boxes.csv) or "none" (largest centred square).
    min_face: smallest face edge that is looked for, in pixels.
    video_offset: seconds of video that precede the stimulus start.
    """

    source: str = "bdf"
    subjects: str = ""
    labels: str = ""
    sfreq: float = 128.0
    channels: str = "tsception28"
    notch: float = 50.0
    low: float = 4.0
    high: float = 45.0
    baseline: str = "none"
    baseline_seconds: float = 3.0
    window: float = 4.0
    stride: float = 4.0
    trial_seconds: float = 60.0
    fps: float = 50.0
    timing: str = "count"
    frame_stride: int = 40
    frames: int = 0
    img_size: int = 224
    margin: float = 0.1
    faces: str = "mtcnn"
    min_face: int = 60
    video_offset: float = 0.0

    @classmethod
    def of(cls, dataset: str, **values: Any) -> PrepareConfig:
        """The defaults of a dataset ("deap", "mahnob" or "folder") with some values changed."""
        _choice("dataset", dataset, DATASETS)
        return config_from_dict(cls, {**DATASET_DEFAULTS[dataset], **values})

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        _choice("source", self.source, SOURCES)
        _choice("faces", self.faces, FACE_MODES)
        _choice("timing", self.timing, TIMINGS)
        _choice("baseline", self.baseline, BASELINES)
        if self.channels not in CHANNEL_SETS:
            _names("channels", self.channels, f"{', '.join(CHANNEL_SETS)}, or electrodes")
        if self.labels:
            _names("labels", self.labels, "columns")
        self._check_subjects()
        for name in ("sfreq", "low", "window", "stride", "fps", "baseline_seconds"):
            _above(name, getattr(self, name), 0.0)
        for name in ("notch", "margin", "video_offset", "trial_seconds"):
            _at_least(name, getattr(self, name), 0.0)
        _at_least("frame_stride", self.frame_stride, 1)
        _at_least("frames", self.frames, 0)
        _at_least("img_size", self.img_size, 8)
        _at_least("min_face", self.min_face, 12)
        self._check_filter()
        if 0 < self.trial_seconds < self.window:
            raise InputError(
                f"window={self.window:g} s is longer than trial_seconds={self.trial_seconds:g}"
            )
        for name in ("window", "stride"):
            samples = getattr(self, name) * self.sfreq
            if abs(samples - round(samples)) > 1e-6:
                raise InputError(f"{name}={getattr(self, name)} s is no whole number of samples")

    def _check_filter(self) -> None:
        if not self.low < self.high:
            raise InputError(f"low must be below high; got low={self.low}, high={self.high}")
        if self.stop_edge > self.sfreq / 2:
            raise InputError(
                f"high={self.high} Hz (stop band from {self.stop_edge:g} Hz) does not fit "
                f"sfreq={self.sfreq:g}; expected sfreq of at least {2 * self.stop_edge:g}"
            )

    def _check_subjects(self) -> None:
        parts = [part.strip() for part in self.subjects.split(",")]
        if self.subjects not in ("", "all") and not all(part.isdecimal() for part in parts):
            raise InputError(
                f"subjects must be 'all' or numbers as in 1,2,7; got {self.subjects!r}"
            )

    def wants(self, subject: int, default: Sequence[int] | None) -> bool:
        """Whether a subject is asked for; default: the dataset's own choice, None for all."""
        if self.subjects == "":
            return default is None or subject in default
        return self.subjects == "all" or str(subject) in split_names(self.subjects)

    @property
    def stop_edge(self) -> float:
        """Frequency in hertz from which the band-pass lets nothing through."""
        return self.high + max(0.25 * self.high, 2.0)

    @property
    def n_times(self) -> int:
        """EEG samples in one window."""
        return round(self.window * self.sfreq)

    @property
    def frames_per_window(self) -> int:
        """Frames kept of one window: frame 0, frame_stride, 2*frame_stride, ... before its end."""
        fit = math.ceil(round(self.window * self.fps, 6) / self.frame_stride)
        return min(fit, self.frames or fit)

    def window_starts(self, seconds: float) -> tuple[float, ...]:
        """Start of each whole window of a trial of ``seconds``, from the stimulus start."""
        count = math.floor((seconds - self.window) / self.stride + 1e-6) + 1
        return tuple(k * self.stride for k in range(max(count, 0)))


DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "deap": {},
    # About 61 frames a second: 6 of every 40 always fit into 4 s, a 7th sometimes.
    "mahnob": {"trial_seconds": 0.0, "fps": 61.0, "timing": "stamps", "frames": 6},
    "folder": {"trial_seconds": 0.0, "fps": 25.0, "timing": "stamps", "frame_stride": 20},
}


@dataclass(frozen=True)
class StudyConfig:
    """A synthetic study. Equal values (and package version) give equal files, byte for byte.

    video_strength, eeg_strength: how far the latent emotion moves the evidence that a trial's face
    or EEG shows, against a per-trial evidence noise of fixed size; 0 leaves noise alone.
    label_noise: probability that a trial's rating lies on the wrong side (mirrored about 5).
    rating_noise: standard deviation of the ratings about the latent value, in points (scale 1-9).
    subject_effect: standard deviation of what a subject's face and EEG show at rest, in every trial
    alike, in the units of the evidence noise (0.45 in the face, 0.35 in the EEG).
    fixation: seconds of each fixation screen (5 before a trial and 3 after it in DEAP).
    hold: number of video frames for which a drawn face stands still.
    """

    subjects: int = 10
    trials: int = 20
    trial_seconds: float = 8.0
    video_strength: float = 1.0
    eeg_strength: float = 1.0
    label_noise: float = 0.02
    rating_noise: float = 0.5
    subject_effect: float = 0.0
    seed: int = 0
    width: int = 240
    height: int = 192
    fps: int = 50
    hold: int = 20
    fixation: float = 1.0

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        for name in ("subjects", "trials", "fps", "hold"):
            _at_least(name, getattr(self, name), 1)
        for name in ("video_strength", "eeg_strength", "rating_noise", "subject_effect", "seed"):
            _at_least(name, getattr(self, name), 0.0)
        _at_least("trial_seconds", self.trial_seconds, 1.0)
        _at_least("fixation", self.fixation, 0.1)
        if not 0.0 <= self.label_noise <= 0.5:
            raise InputError(f"label_noise must lie in [0, 0.5]; got {self.label_noise}")
        if self.subjects > 99 or self.trials > 99:
            raise InputError(
                f"subjects and trials must be at most 99; got {self.subjects} and {self.trials}"
            )
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < 128 or value % 2:
                raise InputError(f"{name} must be even and at least 128 pixels; got {value}")


def config_to_dict(config: PrepareConfig | StudyConfig) -> dict[str, Any]:
    """Plain values by field name, ready for JSON."""
    return dataclasses.asdict(config)


def config_from_dict(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Inverse of ``config_to_dict``; an unknown key raises ``InputError`` naming the nearest."""
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key '{key}' for {kind.__name__}; nearest known: '{near}'")
    return kind(**values)


def parameter_hash(config: PrepareConfig | StudyConfig) -> str:
    """SHA-256 (hex) over every parameter's name and value."""
    text = json.dumps(config_to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
