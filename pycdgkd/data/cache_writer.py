"""Writing a cache trial by trial, so that it survives being killed at any moment.

While it is unfinished the folder holds plan.json (parameters, inputs, trials), video.npy.part and
eeg.npy.part (appended to), and journal.jsonl: one line a trial, written only after the trial's
arrays have reached the disk. Resuming cuts both arrays back to what the journal vouches for and
goes on, so the finished bytes are those of an uninterrupted run. The manifest is written last, in
one step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pycdgkd
from pycdgkd.errors import InputError
from pycdgkd.files import unfinished, write_text

from .cache import FORMAT, JOURNAL, MANIFEST, PLAN, cache_hash, write_samples
from .config import PrepareConfig, config_to_dict, parameter_hash

HEADER = 128  # bytes kept free for the .npy header, which is known only at the end


@dataclass(frozen=True)
class Plan:
    """What a cache is going to hold. Two plans that are equal give equal caches.

    inputs: fingerprint of each input file by its path below the root.
    trials: (subject, trial) of every trial that is to be tried, in order.
    skipped: (subject, trial or None, reason) known beforehand.
    """

    config: PrepareConfig
    dataset: str
    synthetic: bool
    channels: tuple[str, ...]
    inputs: dict[str, str]
    trials: tuple[tuple[int, int], ...]
    skipped: tuple[tuple[int, int | None, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for plan.json and the manifest."""
        return {
            "format": FORMAT,
            "dataset": self.dataset,
            "synthetic": self.synthetic,
            "parameters": config_to_dict(self.config),
            "inputs": self.inputs,
            "channels": list(self.channels),
            "trials": [list(trial) for trial in self.trials],
            "skipped": [list(entry) for entry in self.skipped],
        }


@dataclass(frozen=True)
class TrialData:
    """Samples of one trial.

    rows: one dict a sample with samples.csv's columns, without its number. video: (k, T, 3, H, W)
    uint8. mask: (k, T) bool. eeg: (k, C, L) float32. frames, missed: frames looked at, and without
    a face of their own. note: what of this trial was left out or masked and why, "" for nothing.
    """

    rows: list[dict[str, Any]]
    video: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    eeg: npt.NDArray[np.float32]
    frames: int
    missed: int
    note: str = ""


@dataclass
class CacheWriter:
    """An unfinished cache on disk. Use ``open_writer`` to get one."""

    folder: Path
    plan: Plan
    journal: list[dict[str, Any]] = field(default_factory=list)

    def done(self, subject: int, trial: int) -> bool:
        """Whether the journal already speaks of this trial (or of its whole subject)."""
        return any(
            entry["subject"] == subject and entry["trial"] in (trial, None)
            for entry in self.journal
        )

    @property
    def count(self) -> int:
        """Samples written so far."""
        return sum(len(entry.get("rows", ())) for entry in self.journal)

    def add(self, subject: int, trial: int, data: TrialData) -> None:
        """Append one trial: arrays first, then its line in the journal."""
        for name, array in (("video", data.video), ("eeg", data.eeg)):
            with _part(self.folder, name).open("ab") as file:
                file.write(np.ascontiguousarray(array).tobytes())
                _flush(file)
        entry = {
            "subject": subject,
            "trial": trial,
            "rows": data.rows,
            "mask": data.mask.astype(int).tolist(),
            "frames": data.frames,
            "missed": data.missed,
            "note": data.note,
        }
        self._record(entry)

    def skip(self, subject: int, trial: int | None, reason: str) -> None:
        """Record that a trial, or with None what is left of a subject, cannot be used."""
        self._record({"subject": subject, "trial": trial, "skipped": reason})

    def _record(self, entry: dict[str, Any]) -> None:
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            _flush(file)
        self.journal.append(entry)

    def finish(self) -> dict[str, Any]:
        """Turn the parts into the finished cache; returns the manifest."""
        rows = [row for entry in self.journal for row in entry.get("rows", ())]
        mask = [line for entry in self.journal for line in entry.get("mask", ())]
        width = self.plan.config.frames_per_window
        write_samples(
            self.folder / "samples.csv", [{"sample": i, **row} for i, row in enumerate(rows)]
        )
        np.save(self.folder / "frame_mask.npy", np.array(mask, np.bool_).reshape(-1, width))
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
        return manifest

    def _manifest(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        plan = self.plan.to_dict()
        skipped = list(plan.pop("skipped"))
        for entry in self.journal:
            reason = entry.get("skipped") or entry.get("note")
            if reason:
                skipped.append([entry["subject"], entry["trial"], reason])
        frames = sum(entry.get("frames", 0) for entry in self.journal)
        missed = sum(entry.get("missed", 0) for entry in self.journal)
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
            "face_miss_rate": missed / frames if frames else 0.0,
        }


def input_hash(inputs: dict[str, str]) -> str:
    """SHA-256 (hex) over the names and fingerprints of all input files."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """Size of a file and SHA-256 over its first, middle and last 64 KiB.

    Enough to notice another file in its place, without reading tens of gigabytes before starting.
    """
    size, block = path.stat().st_size, 1 << 16
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in sorted({0, max(0, size // 2 - block // 2), max(0, size - block)}):
            file.seek(start)
            digest.update(file.read(block))
    return f"{size}:{digest.hexdigest()[:32]}"


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What a folder's cache was made from, finished or not; None for a new or empty folder.

    Raises ``InputError`` when the folder holds something else.
    """
    for name in (MANIFEST, PLAN):
        if (folder / name).is_file():
            try:
                return dict(json.loads((folder / name).read_text(encoding="utf-8")))
            except ValueError as error:
                raise InputError(
                    f"{folder / name} is damaged; remedy: delete the folder and prepare it again"
                ) from error
    if folder.exists() and not (folder.is_dir() and _is_empty(folder)):
        raise InputError(
            f"{folder} is no cache and not empty; expected a new folder or a cache; "
            "remedy: give another path"
        )
    return None


def _is_empty(folder: Path) -> bool:
    """True also when all there is is a plan that was being written when its process was killed."""
    return all(path == unfinished(folder / PLAN) for path in folder.iterdir())


def check_same(folder: Path, found: dict[str, Any], plan: Plan) -> None:
    """Refuse to go on with a cache that was made with other parameters or from other files."""
    remedy = "remedy: give another cache folder, or delete this one"
    if found.get("format") != FORMAT:
        raise InputError(
            f"cache {folder} has format {found.get('format')}; expected {FORMAT}; {remedy}"
        )
    mine = plan.to_dict()
    theirs = found["parameters"]
    names = [*mine["parameters"], *(n for n in theirs if n not in mine["parameters"])]
    differ = [
        f"{name} is {theirs.get(name)!r} there, {mine['parameters'].get(name)!r} asked for"
        for name in names
        if theirs.get(name) != mine["parameters"].get(name)
    ]
    if differ:
        raise InputError(
            f"cache {folder} was made with other parameters: {'; '.join(differ)}; {remedy}"
        )
    changed = sorted(
        name
        for name in {*found["inputs"], *plan.inputs}
        if found["inputs"].get(name) != plan.inputs.get(name)
    )
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InputError(
            f"cache {folder} was made from other files: {', '.join(changed[:3])}{more} changed, "
            f"came or went since; {remedy}"
        )


def open_writer(folder: Path, plan: Plan) -> CacheWriter:
    """Start a cache in a new folder, or resume the unfinished one that has the same plan."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN).is_file():
        write_text(folder / PLAN, json.dumps(plan.to_dict()) + "\n")
    writer = CacheWriter(folder, plan, _read_journal(folder / JOURNAL))
    for name, (_, _, row_bytes) in _layout(plan).items():
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
    return writer


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the journal; a torn last line (killed while writing) is cut off the file."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


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


def fingerprints(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """Fingerprint of each file by its path below ``root``, sorted by path."""
    return {str(path.relative_to(root).as_posix()): fingerprint(path) for path in sorted(files)}
