"""The page of a controlled study, written from controlled.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pycdgkd.errors import require
from pycdgkd.files import write_text
from pycdgkd.report.templates import environment

from .figures import claim_figure
from .recordings.study import NOISE
from .verdicts import LEVEL, MARGIN, tally

NAME = "controlled.html"


def write_page(out: Path, results: Mapping[str, Any]) -> Path:
    """Write ``out``/controlled.html from the content of controlled.json; returns its path."""
    pages = environment(Path(__file__).parent)
    pages.filters.update(
        points=lambda share: f"{100 * share:+.1f}",
        share=lambda value: f"{value:.3f}",
        probability=lambda p: f"{p:.3f}" if p >= 0.001 else "< 0.001",
    )
    recorded = results.get("recordings")
    text = pages.get_template("page.html.j2").render(
        results=results,
        recorded=recorded,
        parts=[
            _part("features", "", results),
            *([_part("recordings", "R", recorded)] if recorded else []),
        ],
        recorded_noise=NOISE,
        level=LEVEL,
        margin=MARGIN,
    )
    path = out / NAME
    write_text(path, str(text))
    return path


def _part(name: str, mark: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says of the claims on one kind of study. mark: before the claims' numbers."""
    drawing: Callable[[str], Any] = require("markupsafe", "train").Markup
    return {
        "name": name,
        "mark": mark,
        "results": results,
        "figures": {claim["key"]: drawing(claim_figure(claim)) for claim in results["claims"]},
        "tallies": [(claim, _tallies(claim)) for claim in results["claims"]],
        "least_p": 2.0 ** (1 - len(results["seeds"])),
    }


def _tallies(claim: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """For each comparison of a claim its conditions by verdict."""
    return [
        (
            comparison["title"],
            tally({name: e["verdict"] for name, e in comparison["by_condition"].items()}),
        )
        for comparison in claim["comparisons"]
    ]
