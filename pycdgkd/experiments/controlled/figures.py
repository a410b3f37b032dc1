"""One figure for each claim, as inline SVG in the style of the other pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pycdgkd.errors import require
from pycdgkd.report.figures import BLUE, GREEN, INK, MUTED, VERMILION, drawn, new_figure

from .claims import DIRECTIONS, KD_WEIGHTS, TEMPERATURES, loss_arm
from .verdicts import HIGHER, LOWER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entry = Mapping[str, Any]
_COLUMNS = 3  # panels beside one another


def claim_figure(claim: Entry) -> str:
    """The figure that suits a claim of controlled.json."""
    kinds = {"rebalancing": _branches, "settings": _grid}
    return drawn(kinds.get(claim["key"], _forest), claim)


def _panels(claim: Entry, width: float, row_height: float) -> tuple[Figure, list[Axes]]:
    """One panel for each condition; those left over in the last row are taken away."""
    count = len(claim["conditions"])
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure, axes = new_figure(width, rows * row_height, rows, columns)
    for spare in axes[count:]:
        spare.remove()
    for panel, name in zip(axes, claim["conditions"], strict=False):
        panel.set_title(name)
    return figure, axes[:count]


def _name_rows(axes: Sequence[Axes], names: Sequence[str]) -> None:
    for index, panel in enumerate(axes):
        panel.set_yticks(range(len(names)), names if index % _COLUMNS == 0 else [""] * len(names))
        panel.tick_params(axis="y", labelsize=8.5, labelcolor=INK)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.grid(visible=False, axis="y")


def _branches(claim: Entry) -> Figure:
    """Accuracy of fusion and of the probes on both branches, with standard errors."""
    arms = list(claim["arms"][claim["conditions"][0]])
    figure, axes = _panels(claim, 9.6, 0.9 + 0.3 * len(arms))
    looks = (
        ("weaker", "probe on the weaker branch", VERMILION, "o"),
        ("stronger", "probe on the stronger branch", BLUE, "s"),
        ("accuracy", "fusion", GREEN, "D"),
    )
    for panel, condition in zip(axes, claim["conditions"], strict=True):
        for metric, label, colour, marker in looks:
            found = [
                (row, claim["arms"][condition][arm].get(metric)) for row, arm in enumerate(arms)
            ]
            points = [(row, value["mean"], value["error"]) for row, value in found if value]
            rows, means, errors = zip(*points, strict=True)
            panel.errorbar(
                *(means, rows), xerr=errors, color=colour, fmt=marker, ms=5, lw=1.4, label=label
            )
        panel.set_xlabel("test accuracy on true labels")
    _name_rows(axes, arms)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _forest(claim: Entry) -> Figure:
    """Differences to the reference with their intervals; colours say what is sure."""
    rows = claim["beside_reference"]
    figure, axes = _panels(claim, 9.6, 0.85 + 0.27 * len(rows))
    for panel, condition in zip(axes, claim["conditions"], strict=True):
        panel.axvline(0, color=MUTED, linewidth=1.0)
        for row, entry in enumerate(rows):
            found = entry["by_condition"][condition]
            colour = {HIGHER: BLUE, LOWER: VERMILION}.get(found["verdict"], MUTED)
            low, mean, high = (100 * found[name] for name in ("low", "mean", "high"))
            panel.plot([low, high], [row, row], color=colour, linewidth=2.2, alpha=0.6)
            panel.plot([mean], [row], "o", color=colour, markersize=5.5)
        panel.set_xlabel(f"points above {claim['reference']}")
    _name_rows(axes, [entry["title"] for entry in rows])
    _share_scale(axes)
    return figure


def _share_scale(axes: Sequence[Axes]) -> None:
    """The same symmetric scale in all panels, so that effects can be compared by eye."""
    reach = max(max(abs(end) for end in panel.get_xlim()) for panel in axes)
    for panel in axes:
        panel.set_xlim(-reach, reach)


def _grid(claim: Entry) -> Figure:
    """Differences to no distillation under every setting of the loss; a star where sure."""
    figure, axes = _panels(claim, 9.6, 3.1)
    entries = {entry["title"]: entry["by_condition"] for entry in claim["beside_reference"]}
    lines = [(direction, t) for direction in DIRECTIONS for t in TEMPERATURES]
    cells = {
        condition: [[entries[loss_arm(*line, w)][condition] for w in KD_WEIGHTS] for line in lines]
        for condition in claim["conditions"]
    }
    shown = {
        name: np.array([[c["mean"] for c in row] for row in rows]) for name, rows in cells.items()
    }
    reach = max(1e-9, *(float(np.abs(means).max()) for means in shown.values()))
    colours = require("matplotlib.colors", "train").LinearSegmentedColormap.from_list(
        "difference", [VERMILION, "#ffffff", BLUE]
    )
    for panel, condition in zip(axes, claim["conditions"], strict=True):
        means = shown[condition]
        panel.pcolormesh(means, cmap=colours, vmin=-1.3 * reach, vmax=1.3 * reach, edgecolors="w")
        for (row, column), mean in np.ndenumerate(means):
            sure = cells[condition][row][column]["verdict"] in (HIGHER, LOWER)
            text = f"{100 * mean:+.1f}{'*' if sure else ''}"
            panel.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8.0)
        panel.set_xticks(np.arange(len(KD_WEIGHTS)) + 0.5, [f"{w:g}" for w in KD_WEIGHTS])
        panel.set_xlabel("weight of the KL term")
        panel.grid(visible=False)
    names = [f"{direction}, T {t:g}" for direction, t in lines]
    for index, panel in enumerate(axes):
        panel.set_yticks(np.arange(len(lines)) + 0.5, names if index == 0 else [""] * len(lines))
        panel.invert_yaxis()
    return figure
