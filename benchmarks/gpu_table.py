"""The table of one GPU's record (gpu.py) for README.md."""

from __future__ import annotations

from typing import Any

OURS = "pycdgkd"


def is_gpu_record(record: dict[str, Any]) -> bool:
    """Whether gpu.py wrote it."""
    return "gpu" in record.get("versions", {})


def report(record: dict[str, Any]) -> str:
    """Markdown: a row a case, then every goal with its verdict."""
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    met, judged = verdicts(record)
    lines = [
        f"{versions}{_commit(record)}; a large copy moves {record['copy'] / 1e12:.2f} TB/s.",
        "",
        "Medians of interleaved rounds, microseconds: a step as it is called (eager), replayed as "
        "a CUDA graph, the time of its kernels, and the floor: the least bytes over the bandwidth "
        "of that copy. Peers: their eager time over ours.",
        "",
        "| case | eager | graph | kernels (launches) | floor | peers |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(name, result) for name, result in record["cases"].items()),
        "",
        f"Goals: {met} of {judged} met that could be measured.",
        "",
        *(line for name, result in record["cases"].items() for line in _goals(name, result)),
    ]
    lines += [f"- not measured: {failure}" for failure in record["failed"]]
    return "\n".join(lines) + "\n"


def verdicts(record: dict[str, Any]) -> tuple[int, int]:
    """Goals met, and those that were measured."""
    lines = [line for result in record["cases"].values() for line in result["goals"]]
    judged = [line for line in lines if "not measured" not in line]
    return sum(line.endswith("met") for line in judged), len(judged)


def _row(name: str, result: dict[str, Any]) -> str:
    own, graph, kernels = result["eager"][OURS], result["graph"].get(OURS), result["kernels"]
    peers = [f"{peer} {e['ratio']:.1f}x" for peer, e in result["eager"].items() if peer != OURS]
    replayed = "-" if graph is None else _us(graph["seconds"])
    return (
        f"| `{name}`{_commit(result)} | {_us(own['seconds'])} | {replayed} "
        f"| {_us(kernels['seconds'])} ({kernels['launches']:g}) | {_us(result['floor'])} "
        f"| {', '.join(peers)} |"
    )


def _goals(name: str, result: dict[str, Any]) -> list[str]:
    goals = "; ".join(line.strip() for line in result["goals"])
    return [f"- `{name}`: {goals}"] if goals else []


def _commit(measured: dict[str, Any]) -> str:
    """Of a record, or of a case that was measured at another commit, where it was noted."""
    return f" at {measured['measured_at']}" if "measured_at" in measured else ""


def _us(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"
