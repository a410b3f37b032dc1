"""The results of a run as a plain text table (standard library only)."""

from __future__ import annotations

from collections.abc import Sequence

from .results import Interval, NetworkResult, Results

SYNTHETIC_NOTE = "synthetic data: shows that the machinery works, says nothing about DEAP"

_HEADER = ("", "sees", "accuracy", "95 % by trial", "balanced", "F1", "epochs", "seconds")


def results_table(results: Results) -> str:
    """Test figures of every network, the majority class beside them, and what was counted."""
    majority = results.class_names[results.majority_class]
    rows = [
        _HEADER,
        (f"always '{majority}'", "-", *_accuracy(results.majority), "-", "-", "-", "-"),
        *(_row(network) for network in results.networks),
    ]
    lines = aligned(rows, left=2)
    test = results.counts["test"]
    classes = zip(results.class_names, test.classes, strict=True)
    shares = ", ".join(f"{count} {name}" for name, count in classes)
    title = f"{results.question}: {test.samples} test samples of {test.trials} trials ({shares})"
    return "\n".join(["", title, "", *lines, "", *_gain_line(results)])


def _gain_line(results: Results) -> list[str]:
    gain = results.gain
    if gain is None:
        return []
    low, high = f"{100 * gain.low:+.1f}", f"{100 * gain.high:+.1f}"
    return [f"student minus control: {100 * gain.value:+.1f} points (95 %: {low} to {high})"]


def _row(network: NetworkResult) -> tuple[str, ...]:
    return (
        network.title,
        network.sees,
        *_accuracy(network.accuracy),
        f"{network.balanced_accuracy.value:.3f}",
        f"{network.f1.value:.3f}",
        str(network.epochs),
        f"{network.seconds:.0f}",
    )


def _accuracy(figure: Interval) -> tuple[str, str]:
    return f"{figure.value:.3f}", f"{figure.low:.3f} - {figure.high:.3f}"


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lines of a table: the first ``left`` columns flush left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, range(len(widths)), strict=True)
        words = [text.ljust(width) if i < left else text.rjust(width) for text, width, i in cells]
        lines.append("  ".join(words).rstrip())
    return lines
