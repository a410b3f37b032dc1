"""A study of one's own: ROOT/trials.csv names each trial's video, EEG and labels.

Columns: subject, trial, video, eeg (paths from ROOT); optional video_start, eeg_start, seconds
(where the stimulus starts in either file, and how long it lasts; by default at 0, to the end of the
EEG) and stimulus. Every other column is a label: of numbers a rating, of words a class. The EEG may
be of any format that mne reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pycdgkd.errors import InputError

from .config import PrepareConfig, split_names
from .eeg import eeg_trial, open_any, referenced
from .study import ReadTrial, Skip, Study, Trial, inside, number
from .tables import Row, read_table

TABLE = "trials.csv"
KEYS = ("subject", "trial", "video", "eeg")
TIMES = ("video_start", "eeg_start", "seconds")


@dataclass(frozen=True)
class _Numbering:
    """Numbers of subjects and stimuli: their own where all are whole numbers, else by name."""

    names: dict[str, int]

    @classmethod
    def of(cls, values: Sequence[str]) -> _Numbering:
        unique = sorted(set(values))
        if all(value.isdecimal() and 0 < int(value) < 1000 for value in unique):
            return cls({value: int(value) for value in unique})
        return cls({value: number for number, value in enumerate(unique, start=1)})

    def shown(self) -> dict[int, str]:
        """Names by number, where they say more than the number does."""
        return {n: name for name, n in self.names.items() if name != str(n)}


def scan(root: Path, config: PrepareConfig) -> Study:
    """Read the table and check that every file lies inside the root.

    Raises ``InputError`` when the table is damaged or no trial of it is complete.
    """
    table = root / TABLE
    names, rows = read_table(table, KEYS)
    labels = _label_names(table, names, config)
    classes = {
        name: sorted({row[name] for row in rows if row[name]})
        for name in labels
        if any(row[name] and math.isnan(number(row[name])) for row in rows)
    }
    subjects = _Numbering.of([row["subject"] for row in rows])
    stimuli = _Numbering.of([row.get("stimulus", "") for row in rows])
    trials: dict[tuple[int, int], Trial] = {}
    skipped: list[Skip] = []
    for line, row in enumerate(rows, start=2):
        subject = subjects.names[row["subject"]]
        if not config.wants(subject, None):
            continue
        key = (subject, _trial_number(row["trial"], f"{table} line {line}"))
        try:
            if key in trials:
                raise InputError(f"{table} line {line}: the trial is there twice; remedy: mend it")
            trials[key] = _trial(
                root, row, key, f"{table} line {line}", labels, classes, config,
                stimuli.names[row.get("stimulus", "")],
            )  # fmt: skip
        except InputError as error:
            skipped.append((*key, str(error)))
    if not trials:
        reasons = "; ".join(reason for _, _, reason in skipped[:2]) or "it names no trial"
        raise InputError(f"no usable trial in {table}: {reasons}")
    boxes = (root / "boxes.csv",) if config.faces == "boxes" else ()
    return Study(
        dataset="folder",
        root=root,
        trials=[trials[key] for key in sorted(trials)],
        skipped=sorted(skipped, key=lambda entry: (entry[0], entry[1] or 0)),
        label_names=labels,
        classes=classes,
        others=(table, *boxes),
        subjects=subjects.shown(),
        stimuli=stimuli.shown() if "stimulus" in names else {},
    )


def _label_names(table: Path, names: Sequence[str], config: PrepareConfig) -> tuple[str, ...]:
    free = [name for name in names if name not in (*KEYS, *TIMES, "stimulus")]
    reserved = {"sample", "experiment_id", "segment", "start_s", "faces_found"} & set(free)
    if reserved:
        raise InputError(
            f"{table} calls a label {sorted(reserved)[0]!r}, a name that the cache uses itself; "
            "remedy: rename the column"
        )
    wanted = [name.casefold() for name in split_names(config.labels)] if config.labels else free
    missing = [name for name in wanted if name not in free]
    if missing or not wanted:
        raise InputError(
            f"{table} has no label column{' ' + missing[0] if missing else ''}; expected "
            f"{', '.join(free) or 'a column of ratings or classes'}; remedy: add it"
        )
    return tuple(wanted)


def _trial_number(text: str, where: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 99999:
        raise InputError(f"{where}: trial is {text!r}; expected a whole number from 1 on")
    return int(text)


def _trial(
    root: Path,
    row: Row,
    key: tuple[int, int],
    where: str,
    labels: Sequence[str],
    classes: dict[str, list[str]],
    config: PrepareConfig,
    stimulus: int,
) -> Trial:
    video, eeg = inside(root, row["video"], where), inside(root, row["eeg"], where)
    for path in (video, eeg):
        if not path.is_file():
            raise InputError(f"{where}: no file {path.relative_to(root)}")
    times = {name: _seconds(row.get(name, ""), name, where) for name in TIMES}
    return Trial(
        *key,
        experiment_id=stimulus,
        labels={name: _label(row[name], name, where, classes.get(name)) for name in labels},
        # Without a length the recording's end is the trial's; it is known once that is opened.
        seconds=config.trial_seconds or times["seconds"] or _length(eeg, times, config),
        video=video,
        eeg=eeg,
        video_start=times["video_start"],
        eeg_start=times["eeg_start"],
    )


def _seconds(text: str, name: str, where: str) -> float:
    value = number(text) if text else 0.0
    if not (math.isfinite(value) and 0 <= value <= 86400):
        raise InputError(f"{where}: {name} is {text!r}; expected seconds from 0 on")
    return value


def _length(path: Path, times: dict[str, float], config: PrepareConfig) -> float:
    recording = open_any(path, referenced(config))
    return recording.length / recording.sfreq - times["eeg_start"]


def _label(text: str, name: str, where: str, classes: list[str] | None) -> float:
    if classes is not None and text in classes:
        return float(classes.index(text))
    value = number(text)
    if classes is not None or not math.isfinite(value):
        raise InputError(f"{where}: {name} is {text!r}; expected a label")
    return value


def open_eeg(study: Study, path: Path, trials: Sequence[Trial], config: PrepareConfig) -> ReadTrial:
    """Open the recording of some trials of a subject."""
    del study, trials
    recording = open_any(path, referenced(config))

    def start(trial: Trial) -> int:
        return round((trial.eeg_start or 0.0) * recording.sfreq)

    return lambda trial: eeg_trial(recording, start(trial), trial.seconds, config)
