"""How every page of the package is filled in: strictly, and with all text from outside escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pycdgkd.errors import require


def environment(*folders: Path) -> Any:
    """A jinja2 environment that looks for templates in these folders, then in this one."""
    jinja2 = require("jinja2", "train")
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
