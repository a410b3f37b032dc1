"""Face videos: sequential decoding with PyAV, frames counted as they come.

Metadata is not trusted: frame rates and frame counts of real files are wrong too often (a clip
whose header promised 98 frames held 95), and seeking picks wrong frames. So a video is decoded from
its first frame on, and frame n is the n-th that came out of the decoder.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError, require

Frames = npt.NDArray[np.uint8]

# Files that hold their frames themselves: a playlist would lead to other files.
CONTAINERS = "avi,mov,mp4,matroska,webm,mpeg,mpegvideo,mpegts,asf,flv,ogg,m4v,dv,mjpeg"
REORDERED = 16  # frames between which a decoder may have to reorder, by the standards


def read_frames(path: Path | str, wanted: npt.ArrayLike) -> tuple[Frames, npt.NDArray[np.int64]]:
    """Decode the wanted frames of a video.

    wanted: frame numbers, counted from 0 at the first decoded frame.
    Returns frames (k, H, W, 3) uint8 RGB and their numbers (k,), ascending; numbers past the end of
    the video are left out, so k may be smaller than asked (frames is (0, 0, 0, 3) for k = 0).
    Raises ``InputError`` for a file that is missing, empty, no video or damaged.
    """
    numbers = np.unique(np.asarray(wanted, dtype=np.int64))
    kept: list[Frames] = []
    if numbers.size:
        targets = set(numbers.tolist())
        for index, frame in enumerate(_decode(Path(path))):
            if index in targets:
                kept.append(frame.to_ndarray(format="rgb24"))
            if index >= numbers[-1]:
                break
    frames = np.stack(kept) if kept else np.zeros((0, 0, 0, 3), np.uint8)
    return frames, numbers[: len(kept)]


def read_frames_at(
    path: Path | str, wanted: npt.ArrayLike, tolerance: float
) -> tuple[Frames, npt.NDArray[np.bool_]]:
    """Decode the frame nearest to each of these times by the video's own time stamps.

    wanted: seconds (k,) after the first frame, ascending. tolerance: how far the nearest frame may
    be. A frame without a time stamp, which some files end with, follows the one before it.
    Returns frames (m, H, W, 3) uint8 RGB and got (k,), False where no frame is near; m counts the
    True. Raises ``InputError`` as ``read_frames`` does.
    """
    times = np.asarray(wanted, dtype=np.float64)
    got = np.zeros(times.size, np.bool_)
    kept: list[Frames] = []
    for place, (frame, distance) in enumerate(_nearest(Path(path), times.tolist())):
        got[place] = distance <= tolerance
        if got[place]:
            kept.append(frame.to_ndarray(format="rgb24"))
    return np.stack(kept) if kept else np.zeros((0, 0, 0, 3), np.uint8), got


def _nearest(path: Path, times: list[float]) -> Iterator[tuple[Any, float]]:
    """The frame nearest to each of the ascending times, and its distance in seconds."""
    waiting = deque(times)
    before: list[tuple[Any, float]] = []  # the last frame, if there is one yet
    origin: float | None = None
    for frame, stamp in _stamped(path) if waiting else ():
        origin = stamp if origin is None else origin
        now = (frame, stamp - origin)
        while waiting and now[1] >= waiting[0]:
            wanted = waiting.popleft()
            yield min(
                ((each, abs(time - wanted)) for each, time in (*before, now)), key=lambda at: at[1]
            )
        before = [now]
        if not waiting:
            return
    if before:
        frame, time = before[0]
        yield from ((frame, abs(time - wanted)) for wanted in waiting)


def _stamped(path: Path) -> Iterator[tuple[Any, float]]:
    """Frames in the order of display, with their time stamps in ascending order.

    AVI keeps no times of display: those of a stream with B-frames come out in the order in which
    the frames were stored, while the frames come in that of display. Sorted they are right again.
    """
    frames: deque[Any] = deque()
    stamps: list[float] = []  # a heap
    last, gap = 0.0, 0.0

    def next_stamp() -> float:
        nonlocal last, gap
        stamp = heapq.heappop(stamps) if stamps else last + gap
        last, gap = stamp, stamp - last or gap
        return stamp

    for frame in _decode(path):
        frames.append(frame)
        if frame.time is not None:
            heapq.heappush(stamps, frame.time)
        if len(frames) > REORDERED:
            yield frames.popleft(), next_stamp()
    while frames:
        yield frames.popleft(), next_stamp()


def sample_frames(
    path: Path | str, *, stride: int, max_frames: int | None = None
) -> Iterator[Frames]:
    """Every ``stride``-th frame (H, W, 3) uint8 RGB from the first on, at most ``max_frames``.

    Raises ``InputError`` for a file that is missing, empty, no video or damaged.
    """
    if stride < 1:
        raise InputError(f"frame stride must be at least 1; got {stride}")
    given = 0
    for index, frame in enumerate(_decode(Path(path))):
        if max_frames is not None and given >= max_frames:
            return
        if index % stride == 0:
            given += 1
            yield frame.to_ndarray(format="rgb24")


def video_fps(path: Path | str) -> float:
    """Frame rate that the file's metadata claims, in frames a second. Only a hint: see the module.

    Raises ``InputError`` when the file cannot be opened or claims none.
    """
    with _open(Path(path)) as container:
        stream = _stream(container, Path(path))
        rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise InputError(
            f"video {path} states no frame rate; expected one; remedy: give the rate as an option"
        )
    return float(rate)


def _open(path: Path) -> Any:
    av = require("av", "train")
    if not path.is_file():
        raise InputError(f"no video at {path}; expected a file; remedy: check the path")
    if path.stat().st_size == 0:
        raise InputError(f"video {path} is empty (0 bytes); remedy: copy it again from its source")
    try:
        return av.open(
            str(path),
            container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
            metadata_errors="replace",
        )
    except av.FFmpegError as error:
        raise InputError(
            f"cannot open video {path}: {error.strerror or error}; expected a video file (AVI, "
            "MP4, MOV, Matroska, MPEG, ASF or Ogg); remedy: copy it again from its source"
        ) from error


def _stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise InputError(
            f"{path} has no video stream; expected a face video; remedy: check the file"
        )
    return container.streams.video[0]


def _decode(path: Path) -> Iterator[Any]:
    """Decoded frames in display order; a decoding error becomes an ``InputError``."""
    av = require("av", "train")
    with _open(path) as container:
        stream = _stream(container, path)
        stream.thread_type = "AUTO"
        count = 0
        try:
            for frame in container.decode(stream):
                yield frame
                count += 1
        except av.FFmpegError as error:
            raise InputError(
                f"video {path} is damaged after frame {count}: {error.strerror or error}; "
                "remedy: copy it again from its source"
            ) from error
        if count == 0:
            raise InputError(
                f"video {path} holds no frame; expected at least one; "
                "remedy: copy it again from its source"
            )


def check_video(path: Path) -> None:
    """Open a video and look for its stream; ``InputError`` when it cannot be opened or has none."""
    with _open(path) as container:
        _stream(container, path)
