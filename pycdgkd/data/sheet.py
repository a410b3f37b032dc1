"""Prints the first sheet of a spreadsheet as JSON, a list of rows of text.

A program, not a module: native readers of spreadsheets loop, ask for all memory there is, or abort
on damaged files, so ``tables`` runs this in a process of its own, within limits.
"""

from __future__ import annotations

import json
import resource
import sys

MEMORY = 1 << 30
CELLS = 1_000_000


def _cell(value: object) -> str:
    # Spreadsheets hold every number as a float; keys must read as whole ones.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def main(path: str) -> None:
    """Read and print."""
    import python_calamine

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rows = python_calamine.load_workbook(path).get_sheet_by_index(0).to_python()
    if sum(map(len, rows)) > CELLS:
        raise ValueError(f"it has more than {CELLS} cells")
    json.dump([[_cell(value) for value in row] for row in rows], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
