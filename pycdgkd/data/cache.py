"""The prepared cache: memory-mapped arrays, a table of samples and a manifest (read side)."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
JOURNAL = "journal.jsonl"
INT_COLUMNS = ("sample", "subject", "trial", "experiment_id", "segment")
FLOAT_COLUMNS = ("start_s", "valence", "arousal", "dominance", "liking")
COLUMNS = (*INT_COLUMNS, *FLOAT_COLUMNS, "faces_found")

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
        samples = read_samples(folder / "samples.csv")
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


def unfinished_state(folder: Path) -> str:
    """How far an unfinished cache has come, in words."""
    planned = len(json.loads((folder / PLAN).read_text(encoding="utf-8"))["trials"])
    journal = folder / JOURNAL
    done = len(journal.read_bytes().splitlines()) if journal.is_file() else 0
    return f"{done} of {planned} trials done"


def _load(path: Path, dtype: type[np.generic], ndim: int) -> npt.NDArray[Any]:
    try:
        # An empty array cannot be mapped; it is read instead.
        array: npt.NDArray[Any] = np.load(
            path, mmap_mode="r" if path.stat().st_size > 4096 else None
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read {path}: {error}; remedy: delete the cache and prepare it again"
        ) from error
    if array.dtype != dtype or array.ndim != ndim:
        raise InputError(
            f"{path} holds {array.dtype} with {array.ndim} axes; expected {np.dtype(dtype)} with "
            f"{ndim}; remedy: delete the cache and prepare it again"
        )
    return array


def read_samples(path: Path) -> Samples:
    """Read samples.csv into one array a column: int64, or float64 for times and ratings."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; remedy: prepare the cache again"
        ) from error
    columns: Samples = {}
    for name in COLUMNS:
        kind = np.float64 if name in FLOAT_COLUMNS else np.int64
        try:
            columns[name] = np.array([row[name] for row in rows]).astype(kind)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{path}: column '{name}' is missing or holds no numbers; expected columns "
                f"{','.join(COLUMNS)}; remedy: prepare the cache again"
            ) from error
    return columns


def write_samples(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write samples.csv; floats are written so that they read back exactly."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
