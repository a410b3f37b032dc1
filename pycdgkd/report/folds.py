"""The summary of a cross-validated run: as a text table and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycdgkd.files import write_text

from .table import SYNTHETIC_NOTE, aligned
from .templates import environment


def folds_table(summary: dict[str, Any]) -> str:
    """Accuracy of every network by fold, and over the test trials of all folds."""
    roles = list(summary["networks"])
    header = ("fold", "trials", "majority", *(role.replace("_", " ") for role in roles))
    rows = [
        (
            str(entry["fold"]),
            str(entry["counts"]["test"]["trials"]),
            f"{entry['majority']:.3f}",
            *(f"{entry['accuracy'][role]:.3f}" for role in roles),
        )
        for entry in summary["folds"]
    ]
    mean = _means(summary, roles)
    pooled = [("", "accuracy", "95 % by trial", "balanced", "F1")]
    for role, test in summary["networks"].items():
        accuracy = test["accuracy"]
        pooled.append(
            (
                role.replace("_", " "),
                f"{accuracy['value']:.3f}",
                f"{accuracy['low']:.3f} - {accuracy['high']:.3f}",
                f"{test['balanced_accuracy']['value']:.3f}",
                f"{test['f1']['value']:.3f}",
            )
        )
    gain = summary["comparison"]["student_minus_control"]
    tested = next(iter(summary["networks"].values()))
    lines = [
        "",
        f"{summary['label']}, split by {summary['split']}: {len(summary['folds'])} folds",
        "",
        *aligned([header, *rows, ("mean", "", *mean)], left=1),
        "",
        f"all {tested['trials']} test trials ({tested['samples']} samples) together:",
        "",
        *aligned(pooled, left=1),
        "",
        f"student minus control: {100 * gain['value']:+.1f} points "
        f"(95 %: {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})",
    ]
    if summary["unfinished"]:
        lines.append(f"warning  not finished, left out: {', '.join(summary['unfinished'])}")
    if summary["synthetic"]:
        lines.append(SYNTHETIC_NOTE)
    return "\n".join(lines)


def _means(summary: dict[str, Any], roles: Sequence[str]) -> list[str]:
    folds = summary["folds"]
    columns = [[entry["majority"] for entry in folds]]
    columns += [[entry["accuracy"][role] for entry in folds] for role in roles]
    return [f"{sum(column) / len(column):.3f}" for column in columns]


def write_folds_report(out: Path, summary: dict[str, Any]) -> Path:
    """Write the page of a cross-validated run to ``out``/report.html; returns its path."""
    pages = environment()
    roles = list(summary["networks"])
    text = pages.get_template("folds.html.j2").render(
        summary=summary,
        roles=roles,
        means=_means(summary, roles),
        run_name="/".join(out.resolve().parts[-2:]),
        synthetic_note=SYNTHETIC_NOTE,
    )
    path = out / "report.html"
    write_text(path, str(text))
    return path
