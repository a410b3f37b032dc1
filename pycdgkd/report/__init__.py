"""A finished run as one self-contained HTML page, and its table as text."""

from __future__ import annotations

from pathlib import Path

from pycdgkd.files import write_text

__all__ = ["write_report"]

NAME = "report.html"


def write_report(run: Path, path: Path | None = None) -> Path:
    """Write the report of a finished run to ``path`` (default ``run``/report.html); returns it.

    Raises ``InputError`` for a run without readable results and for missing extras (matplotlib,
    jinja2). Missing logs or predictions leave a note in the page.
    """
    from .page import render

    text = render(run)
    target = run / NAME if path is None else path
    write_text(target, text)
    return target
