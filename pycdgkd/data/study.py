"""What every dataset tells the preparation: its trials, its labels and what had to be left out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError

Signal: TypeAlias = npt.NDArray[np.float32]
Skip: TypeAlias = tuple[int, int | None, str]

HIDDEN = ("thumbs.db", "desktop.ini", "__macosx")


@dataclass(frozen=True)
class Trial:
    """One usable trial.

    subject, trial: the key; trial counts the presentations of a subject. experiment_id: number of
    the stimulus. labels: value by column, a class as its number. seconds: length of the stimulus.
    video_start: second of the video at which the stimulus starts. eeg: recording, in which the
    stimulus starts at ``eeg_start`` (None: the recording itself says where).
    """

    subject: int
    trial: int
    experiment_id: int
    labels: dict[str, float]
    seconds: float
    video: Path
    eeg: Path
    video_start: float = 0.0
    eeg_start: float | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Subject and trial."""
        return self.subject, self.trial


@dataclass(frozen=True)
class Study:
    """A dataset as found on disk. Nothing of its recordings has been read but their names.

    trials: by subject, then trial. skipped: (subject, trial or None for all of the subject,
    reason). classes: names of the classes of every label that is no rating. others: input files
    besides the recordings. subjects, stimuli: names of their numbers, where they have any.
    presented: trials that each subject was shown, where that is known.
    """

    dataset: str
    root: Path
    trials: list[Trial]
    skipped: list[Skip]
    label_names: tuple[str, ...]
    classes: dict[str, list[str]] = field(default_factory=dict)
    others: tuple[Path, ...] = ()
    subjects: dict[int, str] = field(default_factory=dict)
    stimuli: dict[int, str] = field(default_factory=dict)
    presented: dict[int, int] = field(default_factory=dict)
    synthetic: bool = False


@dataclass(frozen=True)
class EegTrial:
    """EEG of one trial.

    windows: (w, C, L) float32 microvolts. spectra: (2, 65) of the whole trial before and after
    filtering, see ``spectra.spectrum``. note: what was assumed, "" for nothing.
    """

    windows: Signal
    spectra: npt.NDArray[np.float64]
    note: str = ""


# One opened recording.
ReadTrial: TypeAlias = Callable[[Trial], EegTrial]


def find_files(root: Path) -> Iterator[Path]:
    """Every file below ``root``, in order; what operating systems hide or leave behind is not one.

    Raises ``InputError`` when a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"cannot read the folder {error.filename}: {error.strerror}; "
            "remedy: mend its permissions"
        )

    for place, names, files in os.walk(root, onerror=refuse, followlinks=True):
        folder = Path(place)
        names[:] = sorted(name for name in names if not _hidden(name))
        if len(folder.relative_to(root).parts) >= 6:
            names.clear()  # deep enough for every layout; ends a loop of links
        yield from (folder / name for name in sorted(files) if not _hidden(name))


def _hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name.casefold() in HIDDEN


def inside(root: Path, text: str, where: str) -> Path:
    """The file that a table names, which must lie below ``root``; ``InputError`` otherwise."""
    path = root / text.replace("\\", "/")
    if not text or not path.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"{where} names the file {text!r}, which does not lie in {root}; expected a path "
            "inside it; remedy: copy the file there and give its path from there"
        )
    return path


def number(text: object) -> float:
    """The number that a cell holds (decimal comma or point), NaN for none."""
    try:
        return float(str(text).strip().replace(",", "."))
    except ValueError:
        return math.nan


def rating(name: str, cell: object) -> float:
    """A rating from 1 to 9, or ``InputError``."""
    value = number(cell)
    if not 1 <= value <= 9:
        raise InputError(f"{name} is {str(cell)!r} in the ratings; expected 1 to 9")
    return value
