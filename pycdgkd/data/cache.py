"""The prepared cache: memory-mapped arrays, a table of samples and a manifest (read side)."""

from __future__ import annotations

import csv
import hashlib
import json
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError

FORMAT = 2
MANIFEST = "manifest.json"
PLAN = "plan.json"
JOURNAL = "journal.jsonl"
PARTS = "parts"
SPECTRA = "spectra.npy"
FOUND = "face_found.npy"
INT_COLUMNS = ("sample", "subject", "trial", "experiment_id", "segment")


Samples: TypeAlias = dict[str, npt.NDArray[Any]]


def cache_hash(parameters: str, inputs: str) -> str:
    """SHA-256 (hex) over the hash of the parameters and the hash of the inputs."""
    return hashlib.sha256(f"{FORMAT}:{parameters}:{inputs}".encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """A finished cache; the arrays are read-only memory maps and stay on disk.

    video: (n, T, 3, H, W) uint8 face crops, RGB. frame_mask: (n, T) bool, False where the recording
    had no such frame (its crop is zero). eeg: (n, C, L) float32 in microvolts.
    samples: columns of samples.csv as arrays of length n.
    """

    path: Path
    manifest: dict[str, Any]
    video: npt.NDArray[np.uint8]
    frame_mask: npt.NDArray[np.bool_]
    eeg: npt.NDArray[np.float32]
    samples: Samples

    @classmethod
    def open(cls, path: Path | str) -> Cache:
        """Open a finished cache.

        Raises ``InputError`` when the folder holds no cache, an unfinished one, one of another
        format, or arrays that do not fit the manifest.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        samples = read_samples(folder / "samples.csv", tuple(manifest["labels"]))
        video = _load(folder / "video.npy", np.uint8, 5)
        mask = _load(folder / "frame_mask.npy", np.bool_, 2)
        eeg = _load(folder / "eeg.npy", np.float32, 3)
        count = int(manifest["samples"])
        sizes = {len(video), len(mask), len(eeg), len(samples["sample"])}
        if sizes != {count} or mask.shape != video.shape[:2]:
            raise InputError(
                f"cache {folder} is damaged: manifest promises {count} samples, files hold "
                f"video {video.shape}, mask {mask.shape}, eeg {eeg.shape}; "
                "remedy: delete the folder and prepare it again"
            )
        return cls(folder, manifest, video, mask, eeg, samples)

    @property
    def face_found(self) -> npt.NDArray[np.bool_]:
        """(n, T) bool: the frame's own face was found; False where it borrowed another's box."""
        array = _load(self.path / FOUND, np.bool_, 2)
        if array.shape != self.frame_mask.shape:
            raise InputError(
                f"{self.path / FOUND} has shape {array.shape}; expected {self.frame_mask.shape}; "
                "remedy: delete the cache and prepare it again"
            )
        return array

    @property
    def spectra(self) -> npt.NDArray[np.float64]:
        """EEG power (subjects, 2, 65) at 0 to 64 Hz before and after filtering, by subject."""
        array = _load(self.path / SPECTRA, np.float64, 3)
        if array.shape[1:] != (2, 65):
            raise InputError(
                f"{self.path / SPECTRA} has shape {array.shape}; expected (subjects, 2, 65); "
                "remedy: delete the cache and prepare it again"
            )
        return array

    def __len__(self) -> int:
        return len(self.eeg)

    @property
    def sfreq(self) -> float:
        """EEG sampling rate in hertz."""
        return float(self.manifest["parameters"]["sfreq"])

    @property
    def channels(self) -> tuple[str, ...]:
        """Electrode names in the order of the EEG's second axis."""
        return tuple(self.manifest["channels"])

    @property
    def labels(self) -> dict[str, list[str]]:
        """Label columns of ``samples``: names of the classes, none for a rating."""
        return dict(self.manifest["labels"])

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over the manifest's parameter and input hashes."""
        return str(self.manifest["hash"])

    @property
    def synthetic(self) -> bool:
        """True when the recordings were written by ``write_study``."""
        return bool(self.manifest["synthetic"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(
            f"no cache at {folder}: no such folder; "
            "remedy: pycdgkd prepare deap ROOT CACHE, or check the path"
        )
    if not (folder / MANIFEST).is_file():
        if (folder / PLAN).is_file():
            raise InputError(
                f"cache {folder} is unfinished ({unfinished_state(folder)}); "
                "remedy: run the same 'pycdgkd prepare' again, it resumes where it stopped"
            )
        raise InputError(
            f"{folder} is not a cache: it has no {MANIFEST}; "
            "remedy: give a folder made by 'pycdgkd prepare'"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
        if version == FORMAT:
            _check_manifest(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / MANIFEST} is damaged; expected JSON written by 'pycdgkd prepare'; "
            "remedy: delete the folder and prepare it again"
        ) from error
    if version != FORMAT:
        raise InputError(
            f"cache {folder} has format {version}; expected {FORMAT}; remedy: prepare it again"
        )
    return dict(manifest)


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ``KeyError``, ``TypeError`` or ``ValueError`` unless what readers use is there."""
    kinds: dict[str, type] = {
        "samples": int, "parameters": dict, "channels": list, "labels": dict, "hash": str,
        "synthetic": bool, "dataset": str, "skipped": list, "subjects": dict, "stimuli": dict,
        "face_miss_rate": float, "face_miss_rates": dict,
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(manifest[name], kind):
            raise TypeError(name)
    float(manifest["parameters"]["sfreq"])
    for names in (manifest["channels"], *manifest["labels"].values()):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("names")


def unfinished_state(folder: Path) -> str:
    """How far an unfinished cache has come, in words."""
    try:
        planned = json.loads((folder / PLAN).read_text(encoding="utf-8"))["trials"]
        done = 0
        for journal in (folder / JOURNAL, *folder.glob(f"{PARTS}/*/{JOURNAL}")):
            lines = journal.read_bytes().splitlines() if journal.is_file() else []
            entries = [json.loads(line) for line in lines]
            done += sum(1 for entry in entries if entry["trial"] is not None)
            lost = {entry["subject"] for entry in entries if entry["trial"] is None}
            done += sum(1 for subject, _ in planned if subject in lost)
    except (ValueError, KeyError, TypeError):
        return "its plan or journal is damaged"
    return f"{done} of {len(planned)} trials done"


def _load(path: Path, dtype: type[np.generic], ndim: int) -> npt.NDArray[Any]:
    try:
        # An empty array cannot be mapped; it is read instead.
        array: npt.NDArray[Any] = np.load(
            path, mmap_mode="r" if path.stat().st_size > 4096 else None
        )
    except (
        OSError,
        ValueError,
        OverflowError,
        SyntaxError,
        EOFError,
        MemoryError,
        tokenize.TokenError,
    ) as error:
        # NumPy reads a header as Python source, and tells of damage in as many ways.
        raise InputError(
            f"cannot read {path}: {error}; remedy: delete the cache and prepare it again"
        ) from error
    if array.dtype != dtype or array.ndim != ndim:
        raise InputError(
            f"{path} holds {array.dtype} with {array.ndim} axes; expected {np.dtype(dtype)} with "
            f"{ndim}; remedy: delete the cache and prepare it again"
        )
    return array


def sample_columns(labels: Iterable[str]) -> tuple[str, ...]:
    """Columns of samples.csv."""
    return (*INT_COLUMNS, "start_s", *labels, "faces_found")


def read_samples(path: Path, labels: Sequence[str]) -> Samples:
    """Read samples.csv into one array a column: int64, or float64 for times and labels."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; remedy: prepare the cache again"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {error}; remedy: prepare the cache again") from error
    names = sample_columns(labels)
    columns: Samples = {}
    for name in names:
        kind = np.float64 if name in ("start_s", *labels) else np.int64
        try:
            columns[name] = np.array([row[name] for row in rows]).astype(kind)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise InputError(
                f"{path}: column '{name}' is missing or holds no numbers; expected columns "
                f"{','.join(names)}; remedy: prepare the cache again"
            ) from error
    return columns


def write_samples(path: Path, rows: list[dict[str, Any]], labels: Sequence[str]) -> None:
    """Write samples.csv; floats are written so that they read back exactly."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sample_columns(labels), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
