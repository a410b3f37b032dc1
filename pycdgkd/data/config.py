"""Parameters of the preparation and of the synthetic study (standard library only)."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pycdgkd.errors import InputError

CHANNEL_SETS = ("tsception28", "all32")
FACE_MODES = ("mtcnn", "none")
SOURCES = ("bdf",)

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


@dataclass(frozen=True)
class PrepareConfig:
    """How raw recordings become samples. The defaults are those of DEAP.

    sfreq: EEG rate of the cache in hertz; the recording's rate must be a whole multiple of it.
    channels: "tsception28" (28 electrodes, left half then mirrored right half) or "all32".
    notch: mains frequency in hertz, 0 for none. low, high: band-pass edges in hertz.
    window, stride: length and distance of the samples of one trial, in seconds.
    trial_seconds: length of the stimulus from its start event on.
    fps: true frame rate of the face videos; metadata of real files is wrong too often to be used.
    frame_stride: one face is kept every so many frames of a window.
    img_size: edge of the square face crop in pixels. margin: widening of the box, as a share of it.
    faces: "mtcnn" (detected faces) or "none" (the largest centred square of each frame).
    min_face: smallest face edge that is looked for, in pixels.
    video_offset: seconds of video that precede the stimulus start.
    """

    source: str = "bdf"
    sfreq: float = 128.0
    channels: str = "tsception28"
    notch: float = 50.0
    low: float = 4.0
    high: float = 45.0
    window: float = 4.0
    stride: float = 4.0
    trial_seconds: float = 60.0
    fps: float = 50.0
    frame_stride: int = 40
    img_size: int = 224
    margin: float = 0.1
    faces: str = "mtcnn"
    min_face: int = 60
    video_offset: float = 0.0

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        _choice("source", self.source, SOURCES)
        _choice("channels", self.channels, CHANNEL_SETS)
        _choice("faces", self.faces, FACE_MODES)
        for name in ("sfreq", "low", "window", "stride", "trial_seconds", "fps"):
            _above(name, getattr(self, name), 0.0)
        for name in ("notch", "margin", "video_offset"):
            _at_least(name, getattr(self, name), 0.0)
        _at_least("frame_stride", self.frame_stride, 1)
        _at_least("img_size", self.img_size, 8)
        _at_least("min_face", self.min_face, 12)
        if not self.low < self.high:
            raise InputError(f"low must be below high; got low={self.low}, high={self.high}")
        if self.stop_edge > self.sfreq / 2:
            raise InputError(
                f"high={self.high} Hz (stop band from {self.stop_edge:g} Hz) does not fit "
                f"sfreq={self.sfreq:g}; expected sfreq of at least {2 * self.stop_edge:g}"
            )
        if self.window > self.trial_seconds:
            raise InputError(
                f"window={self.window:g} s is longer than trial_seconds={self.trial_seconds:g}"
            )
        for name in ("window", "stride"):
            if (
                abs(getattr(self, name) * self.sfreq - round(getattr(self, name) * self.sfreq))
                > 1e-6
            ):
                raise InputError(f"{name}={getattr(self, name)} s is no whole number of samples")

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
        return math.ceil(round(self.window * self.fps, 6) / self.frame_stride)

    @property
    def window_starts(self) -> tuple[float, ...]:
        """Start of each whole window of a trial, in seconds from the stimulus start."""
        count = math.floor((self.trial_seconds - self.window) / self.stride + 1e-9) + 1
        return tuple(k * self.stride for k in range(count))


@dataclass(frozen=True)
class StudyConfig:
    """A synthetic study. Equal values (and package version) give equal files, byte for byte.

    video_strength, eeg_strength: how far the latent emotion moves the evidence that a trial's face
    or EEG shows, against a per-trial evidence noise of fixed size; 0 leaves noise alone.
    label_noise: probability that a trial's rating lies on the wrong side (mirrored about 5).
    rating_noise: standard deviation of the ratings about the latent value, in points (scale 1-9).
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
        for name in ("video_strength", "eeg_strength", "rating_noise", "seed"):
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
