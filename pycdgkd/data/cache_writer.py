"""Writing a cache trial by trial, so that it survives being killed at any moment.

While it is unfinished the folder holds plan.json (parameters, inputs, trials) and a folder parts/
with one part a subject, so that processes and machines can share the work: video.npy.part and
eeg.npy.part (appended to), and journal.jsonl: one line a trial, written only after the trial's
arrays have reached the disk. Resuming cuts both arrays back to what the journal vouches for and
goes on, so the finished bytes are those of an uninterrupted run. At the end the parts are joined
in order, each deleted once it has been taken over; the manifest is written last, in one step.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pycdgkd
from pycdgkd.errors import InputError
from pycdgkd.files import write_text

from .cache import (
    FOUND,
    JOURNAL,
    MANIFEST,
    PARTS,
    PLAN,
    SPECTRA,
    cache_hash,
    write_samples,
)
from .cache_plan import Plan, input_hash
from .config import parameter_hash

HEADER = 128  # bytes kept free for the .npy header, which is known only at the end
COPY = 1 << 24  # bytes moved at a time when parts are joined


@dataclass(frozen=True)
class TrialData:
    """Samples of one trial.

    rows: one dict a sample with samples.csv's columns, without its number. video: (k, T, 3, H, W)
    uint8. mask, found: (k, T) bool, frames that are there, and that have a face of their own. eeg:
    (k, C, L) float32. spectra: (2, BINS), before and after filtering. frames, missed: frames looked
    at, and without a face of their own. note: what of this trial was left out or masked and why, ""
    for nothing.
    """

    rows: list[dict[str, Any]]
    video: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    found: npt.NDArray[np.bool_]
    eeg: npt.NDArray[np.float32]
    spectra: npt.NDArray[np.float64]
    frames: int
    missed: int
    note: str = ""


@dataclass
class CacheWriter:
    """An unfinished cache, or one subject's part of it. ``open_writer``, ``open_part`` make one."""

    folder: Path
    plan: Plan
    journal: list[dict[str, Any]] = field(default_factory=list)

    def done(self, subject: int, trial: int) -> bool:
        """Whether the journal already speaks of this trial (or of its whole subject)."""
        return speaks_of(self.journal, subject, trial)

    @property
    def count(self) -> int:
        """Samples written so far."""
        return _samples(self.journal)

    def add(self, subject: int, trial: int, data: TrialData) -> None:
        """Append one trial: arrays first, then its line in the journal.

        Raises ``InputError`` when the disk is full; what was there before is still good.
        """
        with _told_when_full(self.folder):
            for name, array in (("video", data.video), ("eeg", data.eeg)):
                with _part(self.folder, name).open("ab") as file:
                    file.write(np.ascontiguousarray(array).tobytes())
                    _flush(file)
        entry = {
            "subject": subject,
            "trial": trial,
            "rows": data.rows,
            "mask": data.mask.astype(int).tolist(),
            "found": data.found.astype(int).tolist(),
            "spectra": [[None if x != x else x for x in row] for row in data.spectra.tolist()],
            "frames": data.frames,
            "missed": data.missed,
            "note": data.note,
        }
        self._record([entry])

    def skip(self, subject: int, trial: int | None, reason: str) -> None:
        """Record that a trial, or with None what is left of a subject, cannot be used."""
        self._record([{"subject": subject, "trial": trial, "skipped": reason}])

    def take(self, part: CacheWriter) -> None:
        """Append what ``part`` holds and this does not, then delete the part."""
        fresh, begin = [], 0
        for entry in part.journal:
            size = _samples([entry])
            known = entry["trial"] is not None and self.done(entry["subject"], entry["trial"])
            if not known and entry not in self.journal:
                self._copy(part, begin, size)
                fresh.append(entry)
            begin += size
        self._record(fresh)
        shutil.rmtree(part.folder)

    def _copy(self, part: CacheWriter, begin: int, size: int) -> None:
        with _told_when_full(self.folder):
            for name, (_, _, row_bytes) in _layout(self.plan).items():
                with _part(part.folder, name).open("rb") as source:
                    source.seek(HEADER + begin * row_bytes)
                    with _part(self.folder, name).open("ab") as file:
                        for at in range(0, size * row_bytes, COPY):
                            file.write(source.read(min(COPY, size * row_bytes - at)))
                        _flush(file)

    def _record(self, entries: list[dict[str, Any]]) -> None:
        with _told_when_full(self.folder), (self.folder / JOURNAL).open("ab") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
            _flush(file)
        self.journal.extend(entries)

    def finish(self) -> dict[str, Any]:
        """Turn the parts into the finished cache; returns the manifest."""
        rows = [row for entry in self.journal for row in entry.get("rows", ())]
        numbered = [{"sample": i, **row} for i, row in enumerate(rows)]
        with _told_when_full(self.folder):
            write_samples(self.folder / "samples.csv", numbered, tuple(self.plan.labels))
            np.save(self.folder / "frame_mask.npy", self._flags("mask"))
            np.save(self.folder / FOUND, self._flags("found"))
            np.save(self.folder / SPECTRA, _spectra(self.journal))
            for name, (dtype, shape, _) in _layout(self.plan).items():
                part = _part(self.folder, name)
                with part.open("r+b") as file:
                    file.write(_npy_header(dtype, (len(rows), *shape)))
                    _flush(file)
                os.replace(part, self.folder / f"{name}.npy")
            manifest = self._manifest(rows)
            write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for name in (PLAN, JOURNAL):
            (self.folder / name).unlink()
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        return manifest

    def _flags(self, name: str) -> npt.NDArray[np.bool_]:
        """(n, T) of what the journal says of every frame."""
        lines = [line for entry in self.journal for line in entry.get(name, ())]
        return np.array(lines, np.bool_).reshape(-1, self.plan.config.frames_per_window)

    def _manifest(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        plan = self.plan.to_dict()
        skipped = list(plan.pop("skipped"))
        for entry in self.journal:
            reason = entry.get("skipped") or entry.get("note")
            if reason:
                skipped.append([entry["subject"], entry["trial"], reason])
        parameters, inputs = parameter_hash(self.plan.config), input_hash(self.plan.inputs)
        return {
            **plan,
            "pycdgkd": pycdgkd.__version__,
            "parameter_hash": parameters,
            "input_hash": inputs,
            "hash": cache_hash(parameters, inputs),
            "samples": len(rows),
            "used_trials": len({(row["subject"], row["trial"]) for row in rows}),
            "skipped": sorted(skipped, key=lambda entry: (entry[0], entry[1] or 0)),
            "face_miss_rate": _miss_rate(self.journal),
            "face_miss_rates": {
                str(subject): _miss_rate([e for e in self.journal if e["subject"] == subject])
                for subject in sorted({row["subject"] for row in rows})
            },
        }


def speaks_of(journal: Iterable[dict[str, Any]], subject: int, trial: int) -> bool:
    """Whether a journal has an entry for this trial, or for its whole subject."""
    return any(e["subject"] == subject and e["trial"] in (trial, None) for e in journal)


def _samples(journal: Iterable[dict[str, Any]]) -> int:
    return sum(len(entry.get("rows", ())) for entry in journal)


def _miss_rate(journal: list[dict[str, Any]]) -> float:
    frames = sum(entry.get("frames", 0) for entry in journal)
    return sum(entry.get("missed", 0) for entry in journal) / frames if frames else 0.0


def _spectra(journal: list[dict[str, Any]]) -> npt.NDArray[np.float64]:
    """(subjects, 2, BINS) means over each subject's trials, subjects ascending."""
    means = []
    for subject in sorted({e["subject"] for e in journal if e.get("rows")}):
        mine = [e["spectra"] for e in journal if e["subject"] == subject and e.get("rows")]
        means.append(np.mean(np.array(mine, dtype=np.float64), axis=0))
    return np.array(means)


@contextmanager
def _told_when_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; every trial finished before is "
            "kept; remedy: free some space and run the same command again"
        ) from error


def start_cache(folder: Path, plan: Plan) -> None:
    """Make the folder and its plan, unless it is there; others may be doing the same."""
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN).is_file():
        draft = folder / f".{PLAN}.{os.getpid()}"
        with _told_when_full(folder):
            draft.write_text(json.dumps(plan.to_dict()) + "\n", encoding="utf-8")
            os.replace(draft, folder / PLAN)


@contextmanager
def open_writer(folder: Path, plan: Plan) -> Iterator[CacheWriter]:
    """The cache itself, cut back to what its journal vouches for; no other process may have it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JOURNAL).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{folder} is being written by another process; expected to be alone; "
                "remedy: wait for it, or stop it"
            ) from error
        writer = CacheWriter(folder, plan, read_journal(folder))
        with _told_when_full(folder):
            _cut_back(writer)
        yield writer


def part_folder(cache: Path, subject: int) -> Path:
    """Where a subject's part lies."""
    return cache / PARTS / f"{subject:03d}"


def _cut_back(writer: CacheWriter) -> None:
    folder = writer.folder
    os.truncate(folder / JOURNAL, _whole(folder / JOURNAL))
    for name, (_, _, row_bytes) in _layout(writer.plan).items():
        part, size = _part(folder, name), HEADER + writer.count * row_bytes
        finished = folder / f"{name}.npy"
        if not part.exists() and finished.exists():
            os.replace(finished, part)  # it was stopped while finishing
        if writer.count == 0:
            part.write_bytes(bytes(HEADER))
        if not part.exists() or part.stat().st_size < size:
            raise InputError(
                f"cache {folder} is damaged: {part.name} is shorter than its journal says; "
                "remedy: delete the folder and prepare it again"
            )
        os.truncate(part, size)


def _whole(path: Path) -> int:
    """Bytes of whole lines: a torn last one was being written when its process was killed."""
    return path.read_bytes().rfind(b"\n") + 1


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of the journal of a cache or part; empty when there is none."""
    path = folder / JOURNAL
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_bytes()[: _whole(path)].splitlines()]
    except ValueError as error:
        raise InputError(
            f"{path} is damaged: {error}; remedy: delete the folder and prepare it again"
        ) from error


def _layout(plan: Plan) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """dtype, shape of one sample, and its bytes, by array."""
    config = plan.config
    video = (config.frames_per_window, 3, config.img_size, config.img_size)
    eeg = (len(plan.channels), config.n_times)
    return {
        "video": ("|u1", video, int(np.prod(video))),
        "eeg": ("<f4", eeg, 4 * int(np.prod(eeg))),
    }


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Header of NumPy's .npy format 1.0, padded to ``HEADER`` bytes."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    magic = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little")
    return magic + text.ljust(HEADER - 11).encode() + b"\n"


def _part(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy.part"


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
