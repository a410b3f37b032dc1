"""What a cache is going to hold, and whether a folder's cache is that one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycdgkd.errors import InputError

from .cache import FORMAT, MANIFEST, PLAN
from .config import PrepareConfig, config_to_dict


@dataclass(frozen=True)
class Plan:
    """What a cache is going to hold. Two plans that are equal give equal caches.

    labels: class names of each label column, none for a rating. inputs: fingerprint of each input
    file by its path below the root. trials: (subject, trial) of every trial that is to be tried, in
    order. skipped: (subject, trial or None, reason) known beforehand. subjects, stimuli: names of
    their numbers, where they have any.
    """

    config: PrepareConfig
    dataset: str
    synthetic: bool
    channels: tuple[str, ...]
    labels: dict[str, list[str]]
    inputs: dict[str, str]
    trials: tuple[tuple[int, int], ...]
    skipped: tuple[tuple[int, int | None, str], ...]
    subjects: dict[int, str] = field(default_factory=dict)
    stimuli: dict[int, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for plan.json and the manifest."""
        return {
            "format": FORMAT,
            "dataset": self.dataset,
            "synthetic": self.synthetic,
            "parameters": config_to_dict(self.config),
            "inputs": self.inputs,
            "channels": list(self.channels),
            "labels": self.labels,
            "subjects": {str(key): name for key, name in self.subjects.items()},
            "stimuli": {str(key): name for key, name in self.stimuli.items()},
            "trials": [list(trial) for trial in self.trials],
            "skipped": [list(entry) for entry in self.skipped],
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


def fingerprints(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """Fingerprint of each file by its path below ``root``, sorted by path."""
    return {str(path.relative_to(root).as_posix()): fingerprint(path) for path in sorted(files)}


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
    return all(path.name.startswith(f".{PLAN}") for path in folder.iterdir())


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
