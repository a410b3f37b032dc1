"""Everything a run's page shows, gathered from its files and poured into the template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycdgkd.errors import require

from . import figures
from .logs import LogError, Table, read_table, source_shares
from .results import NetworkResult, Results, load_results
from .table import SYNTHETIC_NOTE
from .templates import environment

_CURVES = ("epoch", "cross_entropy", "val_loss", "val_accuracy")
_RATES = ("step", "rate_video", "rate_eeg", "lambda_video", "lambda_eeg")


@dataclass(frozen=True)
class NetworkPart:
    """One network's part of the page; ``note`` says what could not be shown."""

    network: NetworkResult
    curves: Any
    note: str
    confusion: list[list[tuple[int, float]]]  # count and its share of the true class
    shares: dict[str, float]


def render(run: Path) -> str:
    """The page of a finished run as HTML text; every text from outside is escaped."""
    results = load_results(run)
    pages = environment()
    pages.filters.update(
        points=lambda share: f"{100 * share:+.1f}",
        percent=lambda share: f"{share:.0%}",
        duration=_duration,
        thousands=lambda count: f"{count:,}",
    )
    drawing: Callable[[str], Any] = require("markupsafe", "train").Markup
    notes: list[str] = []
    parts = [_network_part(run, network, drawing) for network in results.networks]
    text = pages.get_template("template.html.j2").render(
        results=results,
        run_name="/".join(run.resolve().parts[-2:]),
        overview=drawing(figures.accuracy_overview(results)),
        rebalancing=_rebalancing(run, results, drawing, notes),
        parts=parts,
        notes=[*notes, *(part.note for part in parts if part.note)],
        synthetic_note=SYNTHETIC_NOTE,
    )
    return str(text)


def _network_part(run: Path, network: NetworkResult, drawing: Callable[[str], Any]) -> NetworkPart:
    curves, note, shares = None, "", {}
    try:
        log = _read(run, network.name, "log.csv", _CURVES)
        curves = drawing(figures.learning_curves(log, network.best_epoch))
        if network.sources:
            shares = source_shares(_read(run, network.name, "steps.csv", ("step",)))
    except LogError as problem:
        note = str(problem)
    confusion = [[(n, n / max(1, sum(row))) for n in row] for row in network.confusion]
    return NetworkPart(network, curves, note, confusion, shares)


def _read(run: Path, network: str, name: str, needed: tuple[str, ...]) -> Table:
    """A log of one network; its name comes from a file, so it must not lead out of the run."""
    if Path(network).name != network or network == "..":
        raise LogError(f"'{network}' is no folder name, so its logs are not read")
    return read_table(run / network, name, needed)


def _rebalancing(
    run: Path, results: Results, drawing: Callable[[str], Any], notes: list[str]
) -> Any:
    if results.find("teacher") is None:
        return None
    try:
        return drawing(figures.rebalancing(_read(run, "teacher", "steps.csv", _RATES)))
    except LogError as problem:
        notes.append(str(problem))
        return None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
