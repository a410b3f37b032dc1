"""DEAP: its original BDF recordings or its preprocessed .dat files, with the face videos.

    ROOT/data_original/sNN.bdf   ROOT/data_preprocessed_python/sNN.dat
    ROOT/face_video/sNN/sNN_trialMM.avi
    ROOT/metadata_csv/participant_ratings.csv (or .xls, .xlsx, .ods)

Files are found by their names, at whatever depth the archives were unpacked.

The order trap: videos and BDF trials lie in presentation order (the column Trial), while .dat rows
are in the order of Experiment_id, the video that was shown. Ratings, videos and BDF trials are
therefore joined by (Participant_id, Trial), and .dat rows through the ratings' Experiment_id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pycdgkd.errors import InputError

from .config import PrepareConfig, split_names
from .deap_dat import open_dat
from .eeg import eeg_trial, open_bdf, referenced, trial_starts
from .study import ReadTrial, Skip, Study, Trial, find_files, number, rating
from .synthetic import MARKER
from .tables import read_table

RATINGS = ("valence", "arousal", "dominance", "liking")
KEYS = ("participant_id", "trial", "experiment_id")
SUBJECTS = tuple(range(1, 23))  # those whose face was filmed
TABLES = (".csv", ".xls", ".xlsx", ".ods")  # the first that is there is read

Index = Mapping[str, Sequence[Path]]
Key = tuple[int, int]


def scan(root: Path, config: PrepareConfig) -> Study:
    """Join the ratings with the files.

    Raises ``InputError`` when recordings, videos or ratings are missing altogether, or no trial is
    complete.
    """
    index: dict[str, list[Path]] = {}
    for path in find_files(root):
        index.setdefault(path.name.casefold(), []).append(path)
    _check_layout(root, index, config.source)
    table = _find_table(root, index)
    names = split_names(config.labels) if config.labels else RATINGS
    rows = read_ratings(table, names)
    trials: list[Trial] = []
    skipped: list[Skip] = []
    for subject in sorted({subject for subject, _ in rows}):
        mine = {trial: rows[who, trial] for who, trial in rows if who == subject}
        if not config.wants(subject, SUBJECTS):
            continue
        try:
            recording = _only(index, f"s{subject:02d}.{config.source}", "recording", root)
            if not any(name.startswith(f"s{subject:02d}_trial") for name in index):
                raise InputError(f"no videos s{subject:02d}_trialMM.avi")
        except InputError as error:
            skipped.append((subject, None, str(error)))
            continue
        for trial in sorted(mine):
            try:
                name = f"s{subject:02d}_trial{trial:02d}.avi"
                video = _only(index, name, "video", root)
                labels = {name: rating(name.capitalize(), mine[trial][name]) for name in names}
            except InputError as error:
                skipped.append((subject, trial, str(error)))
                continue
            shown = int(number(mine[trial]["experiment_id"]))
            trials.append(
                Trial(subject, trial, shown, labels, config.trial_seconds, video, recording)
            )
    if not trials:
        reasons = "; ".join(reason for _, _, reason in skipped[:2]) or "none is in the ratings"
        raise InputError(f"no subject in {root} has both recording and videos: {reasons}")
    return Study(
        dataset="deap",
        root=root,
        trials=trials,
        skipped=skipped,
        label_names=names,
        others=(table, *_boxes(root, config)),
        synthetic=(root / MARKER).is_file(),
        presented={who: sum(1 for s, _ in rows if s == who) for who, _ in rows},
    )


def open_eeg(study: Study, path: Path, trials: Sequence[Trial], config: PrepareConfig) -> ReadTrial:
    """Open a subject's recording. One trigger too few or too many is not guessed at."""
    presented = study.presented[trials[0].subject]
    if config.source == "dat":
        return open_dat(path, trials, config)
    recording = open_bdf(path, tuple(dict.fromkeys((*referenced(config),))))
    starts = trial_starts(recording)
    if len(starts) != presented:
        raise InputError(
            f"{path} holds {len(starts)} video starts (code 4); expected {presented}, the trials "
            "that were presented by the ratings; remedy: check the recording"
        )
    return lambda trial: eeg_trial(recording, int(starts[trial.trial - 1]), trial.seconds, config)


def _check_layout(root: Path, index: Index, source: str) -> None:
    wanted = {
        f"recording sNN.{source}": rf"s\d\d\.{source}",
        "face video sNN_trialMM.avi": r"s\d\d_trial\d\d\.avi",
    }
    for what, pattern in wanted.items():
        if not any(re.fullmatch(pattern, name) for name in index):
            other = {"bdf": "dat", "dat": "bdf"}[source]
            there = any(re.fullmatch(rf"s\d\d\.{other}", name) for name in index)
            hint = f", or --source {other}" if there and "recording" in what else ""
            raise InputError(
                f"{root} has no {what}; expected DEAP's folders (data_original or "
                "data_preprocessed_python, face_video, metadata_csv); remedy: give the folder that "
                f"holds them{hint}"
            )


def _find_table(root: Path, index: Index) -> Path:
    for suffix in TABLES:
        if f"participant_ratings{suffix}" in index:
            return _only(index, f"participant_ratings{suffix}", "table of ratings", root)
    raise InputError(
        f"{root} has no participant_ratings ({', '.join(TABLES)}); expected DEAP's ratings; "
        "remedy: unpack metadata_csv.zip or metadata_xls.zip there"
    )


def _only(index: Index, name: str, what: str, root: Path) -> Path:
    paths = index.get(name, ())
    if not paths:
        raise InputError(f"no {what} {name}")
    if len(paths) > 1:
        shown = " and ".join(str(path.relative_to(root)) for path in paths[:2])
        raise InputError(f"more than one {what} {name}: {shown}; remedy: remove all but one")
    return paths[0]


def _boxes(root: Path, config: PrepareConfig) -> tuple[Path, ...]:
    return (root / "boxes.csv",) if config.faces == "boxes" else ()


def read_ratings(path: Path, labels: Sequence[str] = RATINGS) -> dict[Key, dict[str, str]]:
    """Cells of participant_ratings by (participant, trial).

    Raises ``InputError`` when the table is damaged, lacks a column, or speaks of a trial twice, or
    when a participant saw a video twice.
    """
    _, rows = read_table(path, (*KEYS, *labels))
    table: dict[Key, dict[str, str]] = {}
    shown: set[Key] = set()
    for line, row in enumerate(rows, start=2):
        keys = [number(row[name]) for name in KEYS]
        if not all(1 <= key <= 999 and key == int(key) for key in keys):
            raise InputError(
                f"{path} line {line}: {', '.join(KEYS)} must be whole numbers from 1 on; got "
                f"{', '.join(repr(row[name]) for name in KEYS)}; remedy: mend the table"
            )
        subject, trial, video = (int(key) for key in keys)
        for key, known, what in (
            ((subject, trial), table, f"trial {trial}"),
            ((subject, video), shown, f"experiment {video}"),
        ):
            if key in known:
                raise InputError(
                    f"{path} line {line}: participant {subject} {what} is there twice; expected "
                    "one row a trial; remedy: mend the table"
                )
        table[subject, trial] = row
        shown.add((subject, video))
    return table
