"""What a user sees of a run and what is kept of it (standard library; plots where possible)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from pycdgkd.errors import InputError
from pycdgkd.files import write_text

from . import plots, records, table
from .machine import available_cores
from .records import OURS, CaseRecord, Run


def check_options(threads: Sequence[int], seconds: float | None, out: Path | None) -> None:
    """Raise ``InputError`` for what cannot be measured here."""
    cores = available_cores()
    for count in threads:
        if not 1 <= count <= cores:
            raise InputError(
                f"--threads: expected numbers from 1 to {cores} (this machine's cores), got "
                f"{count}; remedy: leave it out"
            )
    if len(set(threads)) < len(threads):
        raise InputError(
            f"--threads: expected different numbers, got {' '.join(map(str, threads))}; "
            "remedy: name each once"
        )
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(
            f"--out: expected a folder, got the file {out}; remedy: choose another name"
        )
    if seconds is not None and not 0 < seconds < math.inf:
        raise InputError(
            f"--seconds: expected a number above 0, got {seconds:g}; remedy: leave it out"
        )


def show_case(total: int) -> Callable[[CaseRecord], None]:
    """A line for each finished case."""
    done = 0

    def show(case: CaseRecord) -> None:
        nonlocal done
        done += 1
        ours = case.entry(OURS)
        assert ours is not None
        peers = ", ".join(
            f"{entry.name} {entry.ratio['both'].median:.2f}x"
            for entry in case.entries
            if entry.layer == "peer" and entry.seconds and entry.speedup is None
        )
        words = table.seconds_words(ours.seconds["both"].median)
        print(f"[{done}/{total}] {case.name}: {words}; {peers}", flush=True)

    return show


def machine_name(run: Run) -> str:
    """The machine's name as a file name, e.g. "intel-xeon-processor-2-cores"."""
    words = f"{run.machine['processor']} {run.machine['cores']} cores".lower()
    return "-".join("".join(c if c.isalnum() else " " for c in words).split())


def write_run(run: Run, folder: Path) -> list[Path]:
    """JSON and Markdown, and plots where matplotlib is installed; returns what was written."""
    stem = folder / machine_name(run)
    record, words = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.md")
    records.save(run, record)
    stored = records.load(record)  # the table of what is kept, to the last digit
    write_text(words, f"## {stem.name}\n\n{table.report(stored, markdown=True)}")
    if importlib.util.find_spec("matplotlib") is None:
        print('no plots: matplotlib is not installed; remedy: pip install "pycdgkd[bench]"')
        return [record, words]
    return [record, words, *plots.draw(stored, stem)]
