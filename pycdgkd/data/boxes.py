"""Face boxes that were found elsewhere: ROOT/boxes.csv in place of the detector.

Columns: video (path from ROOT), x1, y1, x2, y2 (pixels), and optionally second (of the video). A
frame takes the box of the nearest second; without that column one box serves the whole video.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError

from .study import inside, number
from .tables import read_table

NAME = "boxes.csv"
NEAR = 1.0  # seconds within which a box counts as the frame's own


@dataclass(frozen=True)
class Boxes:
    """Boxes (n, 4) of one video as x1, y1, x2, y2, and the seconds (n,) they belong to."""

    seconds: npt.NDArray[np.float64]
    boxes: npt.NDArray[np.float32]

    def at(
        self, seconds: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Box of each time (k, 4), and (k,) whether it was given for that time."""
        if np.isnan(self.seconds).any():
            return np.tile(self.boxes[:1], (len(seconds), 1)), np.ones(len(seconds), np.bool_)
        distance = np.abs(self.seconds[None] - seconds[:, None])
        nearest = distance.argmin(axis=1)
        return self.boxes[nearest], distance.min(axis=1) <= NEAR


def read_boxes(root: Path) -> dict[Path, Boxes]:
    """Boxes by video. Raises ``InputError`` for a missing or damaged table."""
    path = root / NAME
    names, rows = read_table(path, ("video", "x1", "y1", "x2", "y2"))
    collected: dict[Path, list[tuple[float, list[float]]]] = {}
    for line, row in enumerate(rows, start=2):
        box = [number(row[name]) for name in ("x1", "y1", "x2", "y2")]
        second = number(row["second"]) if "second" in names else np.nan
        # `not <` also catches NaN.
        if not (box[0] < box[2] and box[1] < box[3] and np.isfinite(box).all()) or (
            "second" in names and not np.isfinite(second)
        ):
            raise InputError(
                f"{path} line {line}: expected x1 < x2, y1 < y2 and a second, all numbers; got "
                f"{', '.join(row.values())}; remedy: mend the line"
            )
        video = inside(root, row["video"], f"{path} line {line}").resolve()
        collected.setdefault(video, []).append((second, box))
    return {
        video: Boxes(
            np.array([second for second, _ in entries]),
            np.array([box for _, box in entries], np.float32),
        )
        for video, entries in collected.items()
    }
