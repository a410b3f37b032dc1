"""CSV logs that an interrupted and resumed run continues exactly."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pycdgkd.errors import InputError


class CsvLog:
    """A CSV file whose length is known after every append.

    The checkpoint stores ``size``; opened with it, rows written after that checkpoint are cut off,
    so the epochs that a resumed run repeats do not stand in the log twice.
    """

    def __init__(self, path: Path, columns: Sequence[str], size: int | None = None) -> None:
        self.path = path
        self.columns = tuple(columns)
        if size is None:
            self.size = 0
            path.write_bytes(b"")
            self._write([self.columns])
            return
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise InputError(
                f"{path} has {found} bytes; its checkpoint expects at least {size}; remedy: "
                "restore the file, or delete this network's folder to train it again"
            )
        os.truncate(path, size)
        self.size = size

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Add rows (floats are written so that they read back exactly) and flush them to disk."""
        self._write([[row.get(name, "") for name in self.columns] for row in rows])

    def _write(self, rows: Iterable[Sequence[object]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        content = text.getvalue().encode()
        with self.path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.size += len(content)
