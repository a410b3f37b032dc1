"""Tables as they come: CSV in any usual separator and encoding, xls, xlsx and ods."""

from __future__ import annotations

import codecs
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pycdgkd.errors import InputError, require

SHEETS = (".xls", ".xlsx", ".ods")
MAX_BYTES = 64 << 20
READER = Path(__file__).with_name("sheet.py")
SECONDS = 8
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

Row = dict[str, str]


def read_table(path: Path, columns: Sequence[str] = ()) -> tuple[list[str], list[Row]]:
    """Header (lower case, blanks stripped) and rows of a table; empty lines are left out.

    columns: names that must be there, in any case. Raises ``InputError`` when the file is missing,
    too large for a table, damaged, lacks a column or has one twice.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(
                f"{path} is no table: it has {size} bytes; expected at most {MAX_BYTES}"
            )
        cells = _sheet(path) if path.suffix.casefold() in SHEETS else _csv(path.read_bytes(), path)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; expected a table; "
            "remedy: check the path"
        ) from error
    lines = [line for line in cells if any(cell.strip() for cell in line)]
    header = [name.strip().casefold() for name in lines[0]] if lines else []
    missing = [name for name in columns if name.casefold() not in header]
    if missing:
        raise InputError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; expected "
            f"{', '.join(columns)}; remedy: mend the table's first line"
        )
    named = [name for name in header if name]
    if len(set(named)) != len(named):
        twice = sorted({name for name in named if named.count(name) > 1})
        raise InputError(f"{path} has the column {twice[0]} twice; remedy: rename one of them")
    rows = [
        {name: line[i].strip() if i < len(line) else "" for i, name in enumerate(header) if name}
        for line in lines[1:]
    ]
    return named, rows


def _csv(content: bytes, path: Path) -> list[list[str]]:
    text = _decode(content)
    if "\0" in text:
        raise InputError(f"{path} is no text; expected a CSV table; remedy: save it as CSV")
    header = text.splitlines()[0] if text.strip() else ""
    separator = max(",;\t", key=header.count)
    try:
        return list(csv.reader(text.splitlines(), delimiter=separator))
    except csv.Error as error:
        raise InputError(f"{path} is no CSV table: {error}; remedy: save it again") from error


def _decode(content: bytes) -> str:
    """Text with a byte order mark, else UTF-8, else what Western European spreadsheets write."""
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _sheet(path: Path) -> list[list[str]]:
    require("python_calamine", "train")
    try:
        # -I: nothing of the current folder is imported.
        run = subprocess.run(
            [sys.executable, "-I", str(READER), str(path)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
        if run.returncode < 0:
            raise ValueError(f"its reader died of signal {-run.returncode}")
        if run.returncode > 0:
            raise ValueError(run.stderr.strip().rpartition("\n")[2])
        cells: list[list[str]] = json.loads(run.stdout)
    except (ValueError, subprocess.TimeoutExpired) as error:
        slow = isinstance(error, subprocess.TimeoutExpired)
        reason = f"it took longer than {SECONDS} s" if slow else error
        raise InputError(
            f"cannot read {path}: {reason}; expected a spreadsheet; remedy: save it as CSV"
        ) from error
    return cells
