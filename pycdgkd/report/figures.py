"""The report's charts as inline SVG with real text (matplotlib, without its global state)."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from pycdgkd.errors import require

from .logs import Table, binned
from .results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by people with any kind of colour vision; lines differ in
# their dashes as well.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#007A5A"
INK, MUTED, RULE = "#1b1f24", "#59636e", "#d5dae0"

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # only measures; the page's own fonts draw the text
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "pycdgkd",
    "path.simplify_threshold": 0.5,
}


def new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """An empty figure of this size in inches, and its axes row by row."""
    figure_class = require("matplotlib.figure", "train").Figure
    figure = figure_class(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _svg(figure: Figure) -> str:
    """The drawing alone: no XML prologue, no metadata, no fixed size (the page scales it)."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height|xmlns(:xlink)?)="[^"]*"', "", head)
    return f'{head} aria-hidden="true">{body}'


def drawn(draw: Any, *arguments: Any) -> str:
    """The figure that ``draw(*arguments)`` makes, in the pages' style, as inline SVG."""
    matplotlib = require("matplotlib", "train")
    with matplotlib.rc_context(_STYLE):
        return _svg(draw(*arguments))


def accuracy_overview(results: Results) -> str:
    """Test accuracy of every network with its interval, beside the majority class."""
    return drawn(_accuracy_overview, results)


def _accuracy_overview(results: Results) -> Figure:
    networks = results.networks
    figure, (axes,) = new_figure(7.6, 0.75 + 0.34 * len(networks), 1, 1)
    axes.axvline(results.majority.value, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.annotate(
        f"always '{results.class_names[results.majority_class]}'",
        (results.majority.value, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        color=MUTED,
        fontsize=8.0,
    )
    for row, network in enumerate(networks):
        test = network.accuracy
        colour = VERMILION if network.name == "student" else BLUE
        axes.plot([test.low, test.high], [row, row], color=colour, linewidth=2.2, alpha=0.55)
        axes.plot([test.value], [row], marker="o", markersize=7, color=colour)
        axes.annotate(
            f"{test.value:.3f}",
            (max(test.high, test.value), row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(networks)), [network.title for network in networks])
    axes.tick_params(axis="y", labelsize=9.0, labelcolor=INK)
    axes.set_ylim(len(networks) - 0.5, -0.6)
    lowest = min([results.majority.value, *(network.accuracy.low for network in networks)])
    axes.set_xticks([tick / 10 for tick in range(11)])
    axes.set_xlim(min(0.45, max(0.0, lowest - 0.05)), 1.06)
    axes.set_xlabel("test accuracy")
    axes.grid(visible=False, axis="y")
    return figure


def learning_curves(log: Table, best_epoch: int) -> str:
    """Losses of train and validation set, and validation accuracy, over one network's epochs.

    Both losses are plain cross-entropy, hence comparable; KL is the distillation term of training.
    The accuracy has the same scale for every network.
    """
    return drawn(_learning_curves, log, best_epoch)


def _learning_curves(log: Table, best_epoch: int) -> Figure:
    figure, (left, right) = new_figure(5.6, 2.05, 1, 2)
    locator = require("matplotlib.ticker", "train").MaxNLocator
    epochs = log["epoch"]
    marker = "o" if len(epochs) == 1 else None
    left.plot(epochs, log["cross_entropy"], color=BLUE, label="training", marker=marker)
    left.plot(epochs, log["val_loss"], color=VERMILION, label="validation", ls="--", marker=marker)
    if "kl" in log and np.isfinite(log["kl"]).any():
        left.plot(epochs, log["kl"], color=GREEN, label="KL", ls=":", marker=marker)
    left.set_title("cross-entropy" if len(left.lines) == 2 else "cross-entropy and KL")
    left.set_ylim(bottom=0)
    left.legend(loc="best", handlelength=2.4)
    right.plot(epochs, log["val_accuracy"], color=VERMILION, linestyle="--", marker=marker)
    chosen = epochs == best_epoch
    right.plot(epochs[chosen], log["val_accuracy"][chosen], "o", color=VERMILION, markersize=6.5)
    for x, y in zip(epochs[chosen], log["val_accuracy"][chosen], strict=True):
        right.annotate(
            f"kept: {y:.3f}",
            (x, y),
            xytext=(0, 7),
            textcoords="offset points",
            ha=_anchor(float(x), float(epochs.max())),
            fontsize=8.0,
        )
    right.set_title("validation accuracy")
    right.set_yticks([tick / 10 for tick in range(0, 11, 2)])
    right.set_ylim(min(0.4, float(np.nanmin(log["val_accuracy"])) - 0.05), 1.12)
    for axes in (left, right):
        axes.set_xlim(0.4, float(epochs.max()) + 0.6)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(locator(nbins=6, integer=True))
    return figure


def _anchor(x: float, end: float) -> str:
    """Where text grows from, so that it stays inside axes that end at ``end``."""
    if x < 0.3 * end:
        return "left"
    return "right" if x > 0.8 * end else "center"


def rebalancing(steps: Table) -> str:
    """Convergence rates and modality weights of the teacher over its training steps."""
    return drawn(_rebalancing, steps)


def _rebalancing(steps: Table) -> Figure:
    figure, (left, right) = new_figure(9.4, 2.7, 1, 2)
    for axes, quantity, title in (
        (left, "rate", "convergence rate r (mean probability of the true class)"),
        (right, "lambda", "modality weight \u03bb (weight of the prototype loss)"),
    ):
        for modality, name, colour, dashes in (
            ("video", "video", BLUE, "-"),
            ("eeg", "EEG", VERMILION, "--"),
        ):
            series = binned(steps["step"], steps[f"{quantity}_{modality}"])
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.15, lw=0)
            axes.plot(series.x, series.mean, color=colour, linestyle=dashes, label=name)
        axes.set_title(title)
        axes.set_xlabel("training step")
        axes.set_ylim(-0.03, 1.03)
        axes.legend(loc="best", ncols=2, handlelength=2.4)
    return figure
