"""A run as pictures: time against size, and ratios beside the goals (matplotlib).

Lines differ in marker and dashes as well as in colour, so that they can be told apart in grey.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pycdgkd.errors import require
from pycdgkd.files import write_atomically

from .goals import GOALS
from .records import OURS, CaseRecord, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours.
COLOURS = ("#D55E00", "#0072B2", "#007A5A", "#CC79A7", "#56B4E9", "#8a6d00", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[tuple[int, tuple[float, ...]], ...] = (
    (0, ()),
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1)),
    (0, (1, 3)),
    (0, (8, 3)),
)
STYLE = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "pycdgkd",
}


@dataclass(frozen=True)
class Panel:
    """One log-log plot: which cases, which size along the axis, which peers."""

    title: str
    cases: tuple[str, ...]  # patterns
    axis: str
    peers: tuple[str, ...]
    per_row: bool = False


PANELS = (
    Panel(
        "teacher_loss, D 512-1024, K 2, batch means",
        ("teacher_loss/N128-D512-K2", "teacher_loss/N*-D1024-K2"),
        "rows",
        ("T1", "T2", "T3", "T4", "T4 compile"),
    ),
    Panel(
        "prototype_loss, N 4096, D 512",
        ("prototype_loss/N4096-D512-K*",),
        "classes",
        ("literal", "cdist", "addmm", "lce", "lce auto", "ProxyNCA"),
    ),
    Panel(
        "distillation_loss, S 3, N 32-65536",
        (
            "distillation_loss/N65536-K[27]-S3",
            "distillation_loss/N4096-K[13]*-S3",
            "distillation_loss/N256-K32000-S3",
            "distillation_loss/N32-K262144-S3",
        ),
        "classes",
        ("D1", "D3", "D4", "D1 compile"),
        per_row=True,
    ),
)


def draw(run: Run, stem: Path) -> list[Path]:
    """Write ``STEM-scaling.svg`` and ``STEM-ratios.svg``; what holds no data is left out."""
    matplotlib = require("matplotlib", "bench")
    with matplotlib.rc_context(STYLE):
        figures = {"scaling": _scaling(run), "ratios": _goal_bars(run)}
        written = []
        for name, figure in figures.items():
            if figure is None:
                continue
            path = stem.with_name(f"{stem.name}-{name}.svg")
            write_atomically(path, _saver(figure))
            written.append(path)
    return written


def _saver(figure: Figure) -> Callable[[Path], object]:
    nothing = dict.fromkeys(("Date", "Creator"))
    return lambda path: figure.savefig(path, format="svg", metadata=nothing)


def _points(panel: Panel, cases: Sequence[CaseRecord], name: str) -> list[tuple[float, float]]:
    """(size, microseconds) of one contestant."""
    return sorted(
        (
            case.sizes[panel.axis],
            entry.seconds["both"].median * 1e6 / (case.sizes["rows"] if panel.per_row else 1),
        )
        for case in cases
        if (entry := case.entry(name)) is not None
    )


def _matching(panel: Panel, run: Run) -> list[CaseRecord]:
    return [
        case
        for case in run.cases
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in panel.cases)
    ]


def _scaling(run: Run) -> Figure | None:
    panels = [(panel, _matching(panel, run)) for panel in PANELS]
    panels = [(panel, cases) for panel, cases in panels if len(cases) > 1]
    if not panels:
        return None
    figure: Figure = require("matplotlib.figure", "bench").Figure(
        figsize=(4.2 * len(panels), 3.9), layout="constrained"
    )
    for axes, (panel, cases) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True
    ):
        _draw_panel(axes, panel, cases)
    return figure


def _draw_panel(axes: Axes, panel: Panel, cases: Sequence[CaseRecord]) -> None:
    for index, name in enumerate((OURS, *panel.peers)):
        points = _points(panel, cases, name)
        if points:
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle=DASHES[index % len(DASHES)],
                linewidth=2.4 if name == OURS else 1.3,
                markersize=6 if name == OURS else 4.5,
                label=name,
                zorder=3 if name == OURS else 2,
            )
    axes.set(xscale="log", yscale="log", title=panel.title)
    axes.set_xlabel({"rows": "N", "classes": "K"}[panel.axis])
    axes.set_ylabel("microseconds" + (" a row" if panel.per_row else "") + ", both ways")
    axes.legend()


def _goal_bars(run: Run) -> Figure | None:
    """Ratio to each peer that a goal names, with the goal as a mark."""
    bars = [
        (f"{case.name.replace('_loss', '')}: {goal.peer}", entry.ratio["both"], goal.target)
        for goal in GOALS
        if goal.measure == "ratio"
        for case in run.cases
        if fnmatch.fnmatchcase(case.name, goal.cases)
        and (entry := case.entry(goal.peer)) is not None
    ]
    if not bars:
        return None
    figure: Figure = require("matplotlib.figure", "bench").Figure(
        figsize=(7.6, 0.9 + 0.27 * len(bars)), layout="constrained"
    )
    axes = figure.subplots()
    for row, (_, ratio, target) in enumerate(bars):
        met = ratio.median >= target
        axes.barh(row, ratio.median, color="#0072B2" if met else "white", edgecolor="#0072B2",
                  hatch="" if met else "////", height=0.62)  # fmt: skip
        axes.plot([ratio.p10, ratio.p90], [row, row], color="#1b1f24", linewidth=1.2)
        axes.plot([target, target], [row - 0.42, row + 0.42], color="#D55E00", linewidth=2.5)
        axes.annotate(f" {ratio.median:.1f}x", (max(ratio.p90, target), row), va="center")
    axes.axvline(1, color="#59636e", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set(xscale="log", xlabel="peer's time over ours (thick mark: goal; hatched: not met)")
    return figure
