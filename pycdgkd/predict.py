"""A trained student on a video file: the emotion over time as a table and a picture.

The clip goes the way of the training data: the same spacing of frames in seconds, the same face
crops, the same windows. Memory does not grow with the clip's length; frames are decoded once.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, require

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Frames = npt.NDArray[np.uint8]

WEIGHTS = "model.safetensors"
TELL_EVERY = 5  # windows between two lines of progress


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip make up its windows.

    fps: frame rate of the clip. window: seconds. frames: frames of a whole window. spacing: seconds
    between them, as in training; each frame is the clip's nearest one.
    """

    fps: float
    window: float
    frames: int
    spacing: float

    def numbers(self, window: int) -> list[int]:
        """Frame numbers of window 0, 1, ...; repeated when the clip has too few frames a second."""
        start = window * self.window
        times = (start + j * self.spacing for j in range(self.frames))
        return [math.floor(time * self.fps + 0.5) for time in times]

    @property
    def stride(self) -> int:
        """Greatest common step of all frame numbers, 1 if they follow no common step."""
        period = self.window * self.fps
        if abs(period - round(period)) > 1e-6:
            return 1
        return math.gcd(round(period), *self.numbers(0))


@dataclass(frozen=True)
class Window:
    """One window: seconds from the clip's start, class probabilities (empty: no face), faces."""

    start: float
    end: float
    probabilities: tuple[float, ...]
    faces_found: int

    @property
    def predicted(self) -> int | None:
        """The most probable class, None where no face was found."""
        if not self.probabilities:
            return None
        return self.probabilities.index(max(self.probabilities))


@dataclass(frozen=True)
class Prediction:
    """All windows of one clip. detects_faces: False for a network trained on centre crops."""

    clip: str
    label: str
    class_names: tuple[str, ...]
    detects_faces: bool
    windows: tuple[Window, ...]

    def summary(self) -> str:
        """One line: how long, how many windows, how many without a face, how they were judged."""
        seen = [window for window in self.windows if window.predicted is not None]
        judged = ", ".join(
            f"{sum(window.predicted == k for window in seen)} {name}"
            for k, name in enumerate(self.class_names)
        )
        return (
            f"{self.clip}: {self.windows[-1].end:.1f} s, {len(self.windows)} windows, "
            f"{len(self.windows) - len(seen)} without a face; {self.label}: {judged}"
        )


def check_inputs(network: Path, clip: Path) -> None:
    """Raise ``InputError`` for paths that cannot be meant, before anything heavy is imported."""
    if not (network / WEIGHTS).is_file():
        inner = network / "student"
        remedy = f"give {inner}" if (inner / WEIGHTS).is_file() else "check the path"
        raise InputError(
            f"no network at {network}: {WEIGHTS} is not there; expected the folder of a trained "
            f"student, as runs/x/student; remedy: {remedy}"
        )
    if not clip.is_file():
        raise InputError(f"no video at {clip}; expected a file; remedy: check the path")


def predict_clip(
    network: Path,
    clip: Path,
    *,
    fps: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Prediction:
    """Class probabilities of every window of a clip.

    fps: true frame rate of the clip, None for what the file states. The last window may be shorter
    than the others; it counts if it has at least half of its frames, or is the only one.
    Raises ``InputError`` when the folder is no network, when the network needs EEG, when the file
    cannot be read or when no window has a face.
    """
    from .data.faces import FaceDetector
    from .data.video import video_fps
    from .training.checkpoint import load_network

    check_inputs(network, clip)
    net, meta = load_network(network)
    _check_visual(network, meta)
    rate = video_fps(clip) if fps is None else fps
    if not (math.isfinite(rate) and rate > 0):
        raise InputError(f"fps must be a finite number above 0; got {rate}")
    sampling = Sampling(
        rate, float(meta["window"]), int(meta["frames"]), meta["frame_stride"] / meta["fps"]
    )
    detector = FaceDetector(int(meta["min_face"])) if meta["faces"] == "mtcnn" else None
    windows = []
    for index, frames in enumerate(_window_frames(clip, sampling)):
        windows.append(_judge(net, meta, detector, sampling, index, frames))
        if progress is not None and (index + 1) % TELL_EVERY == 0:
            progress(f"predict: {windows[-1].end:.0f} s of the clip done")
    if detector is not None and not any(window.faces_found for window in windows):
        raise InputError(
            f"no face found in {clip} ({len(windows)} windows); expected a face of at least "
            f"{detector.min_face} pixels; remedy: a clip with a larger or more frontal face"
        )
    return Prediction(
        clip=clip.name,
        label=str(meta["label"]),
        class_names=tuple(str(name) for name in meta["classes"]),
        detects_faces=detector is not None,
        windows=tuple(windows),
    )


def _check_visual(network: Path, meta: dict[str, Any]) -> None:
    if meta["level"] is not None:
        raise InputError(
            f"{network} is the run's {meta['role']}, which needs EEG beside the video; expected a "
            f"network that sees video alone; remedy: use {network.parent / 'student'}"
        )
    needed = ("frames", "window", "fps", "frame_stride", "faces", "min_face", "margin")
    missing = [name for name in needed if name not in meta]
    if missing:
        raise InputError(
            f"{network / WEIGHTS} does not say how its videos were sampled "
            f"({', '.join(missing)}); remedy: train again with this version of pycdgkd"
        )


def _window_frames(clip: Path, sampling: Sampling) -> Iterator[Frames]:
    """Frames (k, H, W, 3) of each window in turn, k <= sampling.frames in the last one."""
    import numpy as np

    from .data.video import sample_frames

    stride = sampling.stride
    window = 0
    kept: list[Frames] = []
    wanted = sampling.numbers(window)
    for index, frame in enumerate(sample_frames(clip, stride=stride)):
        number = index * stride
        # Windows may share frames when the clip has few frames a second.
        while wanted[len(kept)] <= number:
            kept.append(frame)
            if len(kept) == len(wanted):
                yield np.stack(kept)
                window, kept = window + 1, []
                wanted = sampling.numbers(window)
    if kept and (window == 0 or 2 * len(kept) >= len(wanted)):
        yield np.stack(kept)


def _judge(
    net: Any, meta: dict[str, Any], detector: Any, sampling: Sampling, index: int, frames: Frames
) -> Window:
    """Probabilities of one window from the crops of its frames."""
    import torch

    from .data.faces import track_crops

    start = index * sampling.window
    whole = len(frames) == sampling.frames
    end = start + (sampling.window if whole else len(frames) * sampling.spacing)
    tracked = track_crops(frames, detector, size=meta["img_size"], margin=meta["margin"])
    if tracked is None:
        return Window(start, end, (), 0)
    crops, found = tracked
    video = torch.zeros((1, sampling.frames, *crops.shape[1:]), dtype=torch.uint8)
    video[0, : len(crops)] = torch.from_numpy(crops)
    mask = (torch.arange(sampling.frames) < len(crops))[None]
    with torch.inference_mode():
        chances = net(video, mask).logits[0].double().softmax(0).tolist()
    return Window(start, end, tuple(chances), int(found.sum()))


def write_table(prediction: Prediction, path: Path) -> None:
    """One row a window: start_s, end_s, probability_<class>..., predicted, faces_found.

    Without a face probabilities and prediction are empty; faces_found is empty for networks that
    were trained on centre crops and look for none.
    """
    names = prediction.class_names
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        chances = (f"probability_{name}" for name in names)
        writer.writerow(["start_s", "end_s", *chances, "predicted", "faces_found"])
        for window in prediction.windows:
            values = [f"{p:.6f}" for p in window.probabilities] or [""] * len(names)
            answer = "" if window.predicted is None else names[window.predicted]
            faces = window.faces_found if prediction.detects_faces else ""
            writer.writerow([f"{window.start:.3f}", f"{window.end:.3f}", *values, answer, faces])


def write_picture(prediction: Prediction, path: Path) -> None:
    """Timeline of the probability of the last class ("high"), with gaps where no face was found."""
    figure_class = require("matplotlib.figure", "train").Figure
    from matplotlib import rc_context

    blue, vermilion, ink = "#0072B2", "#D55E00", "#1b1f24"
    figure = figure_class(figsize=(9.0, 3.0), layout="constrained")
    # File and label names come from outside: a "$" in them starts no formula.
    with rc_context({"text.parse_math": False}):
        axes = figure.subplots()
        for window in prediction.windows:
            span = (window.start, window.end)
            if not window.probabilities:
                axes.axvspan(*span, facecolor="#eceff2", edgecolor="#c4cad1", hatch="///", lw=0)
                continue
            chance = window.probabilities[-1]
            colour = vermilion if chance >= 0.5 else blue
            axes.fill_between(span, 0.5, chance, color=colour, alpha=0.25, lw=0)
            axes.plot(span, [chance, chance], color=colour, linewidth=2.6, solid_capstyle="butt")
        axes.axhline(0.5, color="#8c959f", linewidth=0.9)
        axes.set_xlim(0, prediction.windows[-1].end)
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.5, 1])
        axes.set_xlabel("seconds from the start of the clip", color=ink)
        name = prediction.class_names[-1]
        axes.set_ylabel(f"probability of {name} {prediction.label}", color=ink)
        gaps = any(not window.probabilities for window in prediction.windows)
        title = f"{prediction.clip}" + ("   (hatched: no face found)" if gaps else "")
        axes.set_title(title, loc="left", fontsize=10, color=ink)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
