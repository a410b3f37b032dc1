"""Which files of DEAP are there, and which trial they belong to."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pycdgkd.errors import InputError

RATINGS = ("Valence", "Arousal", "Dominance", "Liking")
KEYS = ("Participant_id", "Trial", "Experiment_id")
Skip = tuple[int, int | None, str]


@dataclass(frozen=True)
class Rated:
    """One rated trial with its video. presented: how many trials its subject was shown."""

    subject: int
    trial: int
    experiment_id: int
    valence: float
    arousal: float
    dominance: float
    liking: float
    presented: int
    video: Path


@dataclass(frozen=True)
class Files:
    """The usable trials (by subject, then presentation order) and what had to be left out."""

    ratings: Path
    trials: list[Rated]
    skipped: list[Skip]


def recording_path(root: Path, subject: int) -> Path:
    """Where a subject's BDF lies."""
    return root / "data_original" / f"s{subject:02d}.bdf"


def video_path(root: Path, subject: int, trial: int) -> Path:
    """Where the face video of a trial (in presentation order) lies."""
    return root / "face_video" / f"s{subject:02d}" / f"s{subject:02d}_trial{trial:02d}.avi"


def scan(root: Path) -> Files:
    """Join the ratings with the files.

    Raises ``InputError`` when a folder or the ratings table is missing, or no trial is complete.
    """
    for folder in ("data_original", "face_video", "metadata_csv"):
        if not (root / folder).is_dir():
            raise InputError(
                f"{root} has no folder {folder}; expected DEAP's original recordings "
                "(data_original, face_video, metadata_csv); remedy: give the folder that holds them"
            )
    path = root / "metadata_csv" / "participant_ratings.csv"
    trials: list[Rated] = []
    skipped: list[Skip] = []
    table = read_ratings(path)
    for subject in sorted({row[0] for row in table}):
        mine = {trial: (shown, cells) for who, trial, shown, cells in table if who == subject}
        reason = _absent(root, subject)
        if reason:
            skipped.append((subject, None, reason))
            continue
        for trial in sorted(mine):
            try:
                trials.append(_rated(root, subject, trial, *mine[trial], max(mine)))
            except InputError as error:
                skipped.append((subject, trial, str(error)))
    if not trials:
        reasons = "; ".join(reason for _, _, reason in skipped[:2])
        raise InputError(f"no subject in {root} has both recording and videos: {reasons}")
    return Files(path, trials, skipped)


def _absent(root: Path, subject: int) -> str:
    """Why nothing of a subject can be used, or an empty string."""
    recording = recording_path(root, subject)
    if not recording.is_file():
        return f"no recording {recording.relative_to(root)}"
    folder = root / "face_video" / f"s{subject:02d}"
    if not folder.is_dir():
        return f"no videos {folder.relative_to(root)}"
    return ""


def _rated(
    root: Path, subject: int, trial: int, shown: int, cells: dict[str, str], presented: int
) -> Rated:
    video = video_path(root, subject, trial)
    if not video.is_file():
        raise InputError(f"no video {video.relative_to(root)}")
    values = []
    for name in RATINGS:
        value = _number(cells[name])
        if not 1 <= value <= 9:
            raise InputError(f"{name} is {cells[name]!r} in the ratings; expected 1 to 9")
        values.append(value)
    valence, arousal, dominance, liking = values
    return Rated(subject, trial, shown, valence, arousal, dominance, liking, presented, video)


def _number(text: str) -> float:
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        return math.nan


def read_ratings(path: Path) -> list[tuple[int, int, int, dict[str, str]]]:
    """Rows (participant, trial, experiment, cells) of participant_ratings.csv.

    Commas, semicolons and tabs are understood as separators. Raises ``InputError`` when the file is
    missing, lacks a column, or speaks of a trial twice.
    """
    if not path.is_file():
        raise InputError(
            f"no ratings at {path}; expected DEAP's participant_ratings as CSV; remedy: copy it "
            "there, or save the .xls or .ods file as CSV under this name"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is no UTF-8 text; expected a CSV table; remedy: save it as CSV (UTF-8)"
        ) from error
    header = lines[0] if lines else ""
    separator = max(",;\t", key=header.count)
    reader = csv.DictReader(lines, delimiter=separator)
    names = {name.strip().casefold(): name for name in reader.fieldnames or ()}
    missing = [name for name in (*KEYS, *RATINGS) if name.casefold() not in names]
    if missing:
        raise InputError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; expected "
            f"{', '.join((*KEYS, *RATINGS))}; remedy: use DEAP's participant_ratings"
        )
    return _unique(path, reader, {name: names[name.casefold()] for name in (*KEYS, *RATINGS)})


def _unique(
    path: Path, rows: Iterable[dict[str, str]], column: dict[str, str]
) -> list[tuple[int, int, int, dict[str, str]]]:
    table: list[tuple[int, int, int, dict[str, str]]] = []
    seen: set[tuple[int, int]] = set()
    for line, row in enumerate(rows, start=2):
        cells = {name: row[column[name]] or "" for name in column}
        keys = [_number(cells[name]) for name in KEYS]
        if not all(key >= 1 and key == int(key) for key in keys):
            raise InputError(
                f"{path} line {line}: {', '.join(KEYS)} must be whole numbers from 1 on; got "
                f"{', '.join(repr(cells[name]) for name in KEYS)}; remedy: mend the table"
            )
        subject, trial, shown = (int(key) for key in keys)
        if (subject, trial) in seen:
            raise InputError(
                f"{path} line {line}: participant {subject} trial {trial} is there twice; expected "
                "one row a trial; remedy: mend the table"
            )
        seen.add((subject, trial))
        table.append((subject, trial, shown, cells))
    return table
