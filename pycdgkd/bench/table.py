"""A run as tables, in plain text or Markdown (standard library only).

Losing figures are printed like winning ones: a ratio below 1 means that the other is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .cases import KL_OPS, MIB, OPS
from .goals import Goal, judged
from .records import OURS, CaseRecord, Entry, Run, Spread

GIGA = 1e9
NOTHING = "-"


# Who is who.
WHO = {
    "T1": "literal: class means in a loop, (z - c)^2, softmax, log, Python branch for lambda",
    "T2": "cdist squared and cross-entropy, Python branch for lambda",
    "T3": "as T4, but differentiates through the class means: more work, another gradient",
    "T4": "expert: F.linear a modality, one fused cross-entropy for all, lambda as a tensor",
    "literal": "(z - c)^2, softmax, log",
    "cdist": "cdist squared and cross-entropy",
    "addmm": "torch.addmm(alpha=2) and cross-entropy; the form with F.linear is lce",
    "lce": "torch.nn.functional.linear_cross_entropy, options=None",
    "lce auto": "the same with LinearCrossEntropyOptions(): chunked, sizes chosen by torch",
    "ProxyNCA": "pytorch-metric-learning's ProxyNCALoss, squared distance, fixed proxies",
    "gemm": "the two matrix products alone, results preallocated: a bound, not a loss",
    "one-hot": "class means by a matrix product",
    "index_add": "class means by scattered additions",
    "D1": "kl_div for each active source, log_target=True, and cross-entropy",
    "D2": "as D1, but the student's softmax is formed again for each source",
    "D3": "sources as one tensor (stacking is not timed), weights as a tensor",
    "D4": "by the mean of the sources' logits: the fewest passes that we know in eager torch",
    "torchdistill": "torchdistill's KDLoss for each source; its cross-entropy is computed S times",
    "T4 compile": "T4 under torch.compile(fullgraph=True, dynamic=False), compiled before timing",
    "D1 compile": "D1 likewise",
    "D3 compile": "D3 likewise",
    "neighbour": "our function on the aligned neighbour, or on as many sources as are active",
}


@dataclass(frozen=True)
class Table:
    """A titled table of words."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    words: int = 1  # how many columns are words and not figures


def tables(run: Run) -> list[Table]:
    """Goals, each op against its peers, our layers, peak memory, and who the peers are."""
    compared = [
        _op_table(op, cases) for op in OPS if (cases := [c for c in run.cases if c.op == op])
    ]
    who = [(name, WHO[name]) for name in _names(run.cases, lambda e: e.name in WHO)]
    every = [
        _goal_table(run),
        *compared,
        _layer_table(run),
        _memory_table(run),
        Table("Who takes part", ("name", "what it is"), who, words=2),
    ]
    return [table for table in every if table.rows]


def heading(run: Run) -> list[str]:
    """What was measured, where and with what."""
    machine, software, settings = run.machine, run.software, run.settings
    packages = [name for name, there in settings["packages"].items() if there]
    lines = [
        f"{machine['processor']} ({machine['architecture']}), {machine['cores']} cores, "
        f"caches {machine['caches']}, {machine['memory_gib']} GiB, huge pages: "
        f"{machine['huge_pages']}, {machine['kernel']}",
        f"pycdgkd {software['pycdgkd']} at {software['commit']}, {software['instructions']} "
        f"kernels; torch {software['torch']} ({software['torch_instructions']}), numpy "
        f"{software['numpy']}, python {software['python']}",
        f"{run.time}; {settings['threads'][0]} thread unless a row says x2; about "
        f"{settings['seconds_a_case']:g} s a case; torch.compile "
        f"{'where listed' if settings['compiled'] else 'left out'}; other packages: "
        f"{', '.join(packages) or 'none'}",
    ]
    if run.cases:
        lines.append(_limits(run.cases))
    return lines


def _limits(cases: Sequence[CaseRecord]) -> str:
    best = cases[0].probes
    for case in cases[1:]:
        best = best.stricter(case.probes)
    return (
        f"limits (one thread, best of the run): copy into a tensor in use {best.copy / GIGA:.1f} "
        f"GB/s, into fresh memory {best.clone / GIGA:.1f} GB/s, exp {best.exp / GIGA:.2f} G/s, "
        f"smallest step through autograd {seconds_words(best.autograd)}"
    )


# ---- figures as words ----------------------------------------------------------------------------


def seconds_words(value: float) -> str:
    """Seconds with a fitting unit and three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def _spread(seconds: Spread) -> str:
    median, low, high = (seconds_words(s) for s in (seconds.median, seconds.p10, seconds.p90))
    return f"{median} ({low} - {high})"


def _ratio(entry: Entry | None, phase: str = "both") -> str:
    if entry is None:
        return NOTHING
    if entry.failure is not None:
        return "failed"
    if not entry.seconds:
        return f"wrong ({entry.error:.0e})" if entry.error is not None else "wrong (nan)"
    return f"{entry.ratio[phase].median:.2f}x" if phase in entry.ratio else NOTHING


def _found(case: CaseRecord, name: str) -> Entry | None:
    return next((entry for entry in case.entries if entry.name == name), None)


def limit_words(case: CaseRecord) -> str:
    """What bounds the case, and how near to that bound our public function is."""
    ours, probes = case.entry(OURS), case.probes
    if ours is None:
        return NOTHING
    seconds = ours.seconds["both"].median
    if case.bound == "overhead":
        return f"dispatch: {seconds / probes.autograd:.1f}x the smallest autograd step"
    if case.bound == "flops":
        gemm = case.entry("gemm")
        return NOTHING if gemm is None else f"matrix products: {gemm.ratio['both'].median:.0%}"
    if case.bound == "exps":
        return f"exps: {case.exps / seconds / probes.exp:.0%}"
    rate = case.bytes / seconds
    return f"bytes: {rate / probes.copy:.0%} of copy, {rate / probes.clone:.0%} of clone"


def _rates(case: CaseRecord) -> tuple[str, ...]:
    ours = case.entry(OURS)
    assert ours is not None
    seconds = ours.seconds["both"].median
    rate = case.bytes / seconds
    found = [f"{rate / GIGA:.2f}", f"{rate / case.probes.copy:.0%}"]
    if case.op in KL_OPS:
        exps = case.exps / seconds
        found += [f"{exps / GIGA:.3f}", f"{exps / case.probes.exp:.0%}"]
    return tuple(found)


# ---- the tables ----------------------------------------------------------------------------------


def _goal_table(run: Run) -> Table:
    rows = [
        (case.name, goal.words, *_verdict(goal, value), limit_words(case))
        for goal, case, value in judged(run)
    ]
    met, missed = (sum(row[4] == word for row in rows) for word in ("met", "NOT MET"))
    rest = len(rows) - met - missed
    title = f"Goals: {met} of {met + missed} met" + (f", {rest} not measured" if rest else "")
    header = ("case", "goal", "median", "p10 - p90", "", "what bounds the case: how near we are")
    return Table(title, header, rows)


def _verdict(goal: Goal, value: Spread | None) -> tuple[str, str, str]:
    if value is None:
        return NOTHING, NOTHING, "not measured"
    between = f"{value.p10:.2f} - {value.p90:.2f}" if value.p10 != value.p90 else NOTHING
    return f"{value.median:.2f}", between, "met" if goal.met(value.median) else "NOT MET"


def _names(cases: Iterable[CaseRecord], wanted: Callable[[Entry], bool]) -> list[str]:
    return list(dict.fromkeys(e.name for case in cases for e in case.entries if wanted(e)))


def _op_table(op: str, cases: Sequence[CaseRecord]) -> Table:
    shown = ("peer", "bound", "neighbour")
    peers = _names(cases, lambda e: e.layer in shown and e.speedup is None)
    rates = ("GB/s", "of copy") + (("Gexp/s", "of exp") if op in KL_OPS else ())
    header = ("case", "pycdgkd (p10 - p90)", *peers, *rates, "error")
    rows = []
    for case in cases:
        ours = case.entry(OURS)
        assert ours is not None
        rows.append(
            (
                case.name.partition("/")[2],
                _spread(ours.seconds["both"]),
                *(_ratio(_found(case, name)) for name in peers),
                *_rates(case),
                f"{ours.error:.0e}",
            )
        )
    note = (
        "Forward and backward together (the record also has them apart). A peer's column is its "
        "time over ours, median of the rounds; "
        "GB/s on the least bytes of the case; error: largest of ours, relative, against float64."
    )
    return Table(op, header, rows, note)


def _layer_table(run: Run) -> Table:
    header = (
        "case",
        *(f"{layer} {way}" for layer in ("kernel", "op", "public") for way in ("fwd", "bwd")),
        "two threads",
        "peer's two threads",
        "rounds",
    )
    rows = []
    for case in run.cases:
        found = []
        for name in ("kernel", "op", OURS):
            entry = case.entry(name)
            seconds = {} if entry is None else entry.seconds
            for phase in ("forward", "backward"):
                found.append(seconds_words(seconds[phase].median) if phase in seconds else NOTHING)
        rows.append((case.name, *found, *_scaling(case), str(case.rounds)))
    note = (
        "Medians. kernel: on NumPy arrays, one thread (for teacher_loss the prototype kernels "
        "alone); op: through the dispatcher; public: with autograd. Two threads: speed-up over one."
    )
    return Table("Layers and threads", header, rows, note)


def _scaling(case: CaseRecord) -> tuple[str, str]:
    """Speed-up by a second thread: ours, and the rival's."""
    mine, theirs = NOTHING, NOTHING
    for entry in case.entries:
        name = entry.name.removesuffix(" x2")
        if entry.speedup is None or name == entry.name:
            continue
        if name == OURS:
            mine = f"{entry.speedup.median:.2f}x"
        else:
            theirs = f"{entry.speedup.median:.2f}x ({name})"
    return mine, theirs


def _memory_table(run: Run) -> Table:
    cases = [case for case in run.cases if any(e.peak_bytes is not None for e in case.entries)]
    names = _names(cases, lambda e: e.peak_bytes is not None)
    rows = []
    for case in cases:
        peaks = {entry.name: entry.peak_bytes for entry in case.entries}
        words = (peaks.get(name) for name in names)
        rows.append(
            (case.name, *(NOTHING if peak is None else f"{peak / MIB:.0f}" for peak in words))
        )
    note = "MiB that one forward and backward adds to the inputs, gradients included."
    return Table("Peak memory", ("case", *names), rows, note)


# ---- on paper ------------------------------------------------------------------------------------


def as_text(table: Table) -> str:
    """Columns aligned with spaces."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    lines = [
        "  ".join(
            text.ljust(width) if i < table.words else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([table.title, *([table.note] if table.note else []), "", *lines, ""])


def as_markdown(table: Table) -> str:
    """A Markdown table below a heading."""
    lines = [
        f"### {table.title}",
        "",
        *([table.note, ""] if table.note else []),
        *(f"| {' | '.join(row)} |" for row in [table.header]),
        "| --- " * table.words + "| ---: " * (len(table.header) - table.words) + "|",
        *(f"| {' | '.join(row)} |" for row in table.rows),
    ]
    return "\n".join([*lines, ""])


def report(run: Run, *, markdown: bool = False) -> str:
    """Heading and all tables."""
    head = heading(run)
    if markdown:
        lines = [f"- {line}" for line in head]
        return "\n".join([*lines, "", *(as_markdown(table) for table in tables(run))])
    return "\n".join([*head, "", *(as_text(table) for table in tables(run))])
