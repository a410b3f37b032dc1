"""A table of the paper, run again: as text, as CSV and as one HTML page."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from pycdgkd.files import write_text
from pycdgkd.report.table import SYNTHETIC_NOTE, aligned
from pycdgkd.report.templates import environment
from pycdgkd.training.config import config_differences, preset_config

from .catalogue import DOUBTS, METHODS, Table, shown_in
from .runs import Plan
from .summary import Row

Summary = Mapping[str, Sequence[Row]]  # rows by label
PRINTED = "printed in the paper"


def text_table(table: Table, label: str, rows: Sequence[Row]) -> str:
    """Accuracy, its interval, and the difference to the method of interest."""
    header = ("", "runs", "accuracy", "95 %", "balanced", "F1", "difference", "95 %", "p", PRINTED)
    lines: list[tuple[str, ...]] = [header]
    lines.append(("majority class", "", f"{100 * rows[0].majority:.1f}", *[""] * 7))
    for row in rows:
        accuracy = row.figures["accuracy"]
        lines.append(
            (
                row.method.title,
                str(row.runs),
                f"{100 * accuracy['value']:.1f}",
                f"{100 * accuracy['low']:.1f} - {100 * accuracy['high']:.1f}",
                f"{100 * row.figures['balanced_accuracy']['value']:.1f}",
                f"{100 * row.figures['f1']['value']:.1f}",
                *_difference(row),
                _printed(row),
            )
        )
    return "\n".join(["", f"{table.title}: {label}", "", *aligned(lines, left=1)])


def _difference(row: Row) -> tuple[str, str, str]:
    if row.difference is None or row.p_holm is None:
        return "-", "", ""
    value, low, high = (100 * row.difference[name] for name in ("value", "low", "high"))
    return f"{value:+.1f}", f"{low:+.1f} to {high:+.1f}", f"{row.p_holm:.3f}"


def _printed(row: Row) -> str:
    return ", ".join(f"{value:.2f} ({dataset})" for dataset, value in row.printed.items()) or "-"


def write_csv(path: Path, summary: Summary) -> Path:
    """One line a label and method, every figure."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        figures = ("accuracy", "balanced_accuracy", "f1")
        bounds = [f"{name}{end}" for name in figures for end in ("", "_low", "_high")]
        differ = ["difference", "difference_low", "difference_high", "p", "p_holm"]
        writer.writerow(
            ["label", "method", "runs", "majority", *bounds, *differ, "seconds", "parameters"]
        )
        for label, rows in summary.items():
            for row in rows:
                ends = ("value", "low", "high")
                numbers = [row.figures[name][end] for name in figures for end in ends]
                apart = [row.difference[end] for end in ends] if row.difference else [""] * 3
                tests = ["" if p is None else p for p in (row.p, row.p_holm)]
                known = (label, row.method.name, row.runs, row.majority)
                writer.writerow([*known, *numbers, *apart, *tests, row.seconds, row.parameters])
    return path


def write_page(path: Path, plan: Plan, table: Table, summary: Summary, synthetic: bool) -> Path:
    """The table with everything that a reader must know beside it."""
    pages = environment(Path(__file__).parent)
    pages.filters["percent"] = lambda value: f"{100 * value:.1f}"
    pages.filters["points"] = lambda value: f"{100 * value:+.1f}"
    text = pages.get_template("table.html.j2").render(
        table=table,
        summary=summary,
        plan=plan,
        interest=METHODS[table.interest].title,
        shown=shown_in(table, plan.methods),
        printed=PRINTED,
        show_printed=_printed,
        doubts=DOUBTS,
        differences=config_differences(plan.config, preset_config("paper")),
        synthetic_note=SYNTHETIC_NOTE if synthetic else "",
    )
    write_text(path, str(text))
    return path
