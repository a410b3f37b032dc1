"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it and move it into place.

    A killed process leaves the old file or the new one, never half of one.
    """
    temporary = unfinished(path)
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def unfinished(path: Path) -> Path:
    """Where ``write_atomically`` keeps what is not yet ``path``."""
    return path.with_name(f".{path.name}.part")
