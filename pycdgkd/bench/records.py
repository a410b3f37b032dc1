"""Results as they are stored: one JSON file a machine (standard library only)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycdgkd.errors import InputError
from pycdgkd.files import write_text

OURS = "pycdgkd"  # the public function among the contestants
SCHEMA = 1
DIGITS = 4  # significant digits that are stored


@dataclass(frozen=True)
class Spread:
    """Median with the tenth and ninetieth percentile over the rounds."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Probes:
    """Measured limits of the machine, one thread."""

    copy: float  # bytes a second (read and written) of out.copy_(x) into a tensor in use
    clone: float  # the same of x.clone() into fresh memory
    exp: float  # float32 exponentials a second of our kernel on an L1-resident array
    autograd: float  # seconds of F.mse_loss on 128 x 2, forward and backward

    def stricter(self, other: Probes) -> Probes:
        """The better of two measurements of each limit."""
        return Probes(
            max(self.copy, other.copy),
            max(self.clone, other.clone),
            max(self.exp, other.exp),
            min(self.autograd, other.autograd),
        )


@dataclass(frozen=True)
class Entry:
    """One contestant of a case."""

    name: str
    layer: str  # "public", "op", "kernel", "peer", "bound" or "neighbour"
    threads: int
    error: float | None  # largest, relative; None for what computes no loss, or no finite one
    seconds: dict[str, Spread]  # by phase; empty if the result was wrong and so not timed
    ratio: dict[str, Spread]  # its time over that of our public function, within rounds
    peak_bytes: int | None = None  # beyond the inputs
    failure: str | None = None  # why it could not be called
    speedup: Spread | None = None  # with more threads: over the same contestant without them


@dataclass(frozen=True)
class CaseRecord:
    """One case: its sizes, the least work it needs, the limits at that time, who took part."""

    name: str
    op: str
    sizes: dict[str, int]  # rows, width, classes, modalities, sources, inactive
    bound: str
    bytes: int
    exps: int
    rounds: int
    probes: Probes
    entries: list[Entry]
    neighbour: str | None = None
    neighbour_bytes: int | None = None

    def entry(self, name: str) -> Entry | None:
        """The contestant of that name, if it took part and its result was right."""
        return next((e for e in self.entries if e.name == name and e.seconds), None)


@dataclass(frozen=True)
class Run:
    """Everything that one run measured."""

    machine: dict[str, Any]
    software: dict[str, Any]
    settings: dict[str, Any]
    time: str
    cases: list[CaseRecord]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def save(run: Run, path: Path) -> None:
    """Write the run as JSON, one line a case."""
    values = _rounded({"schema": SCHEMA, **dataclasses.asdict(run)})
    cases = ",\n".join(json.dumps(case) for case in values.pop("cases"))
    write_text(path, f'{json.dumps(values)[:-1]}, "cases": [\n{cases}\n]}}\n')


def load(path: Path) -> Run:
    """Read a stored run; ``InputError`` names what is wrong with the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']}")
        return Run(
            values["machine"],
            values["software"],
            values["settings"],
            values["time"],
            [_case(case) for case in values["cases"]],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a benchmark record of schema {SCHEMA} ({error!r}); "
            "remedy: write it again with pycdgkd bench --out"
        ) from error


def _spreads(values: Mapping[str, Mapping[str, float]]) -> dict[str, Spread]:
    return {phase: Spread(**spread) for phase, spread in values.items()}


def _entry(values: dict[str, Any]) -> Entry:
    speedup = values["speedup"]
    parsed = {
        "seconds": _spreads(values["seconds"]),
        "ratio": _spreads(values["ratio"]),
        "speedup": None if speedup is None else Spread(**speedup),
    }
    return Entry(**{**values, **parsed})


def _case(values: dict[str, Any]) -> CaseRecord:
    entries = [_entry(entry) for entry in values["entries"]]
    return CaseRecord(**{**values, "probes": Probes(**values["probes"]), "entries": entries})
