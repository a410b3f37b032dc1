from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pycdgkd.bench.records import CaseRecord, Entry, Probes, Run, Spread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spread(value: float) -> Spread:
    return Spread(value, 0.9 * value, 1.2 * value)


def entry(name: str, layer: str, seconds: float, ours: float, **more: object) -> Entry:
    phases = {"forward": 0.25, "backward": 0.75, "both": 1.0}
    return Entry(
        name,
        layer,
        1,
        1e-6,
        {phase: spread(share * seconds) for phase, share in phases.items()},
        {phase: spread(seconds / ours) for phase in phases},
        **more,  # type: ignore[arg-type]
    )


def prototype_record(name: str, ours: float, *entries: Entry, **more: object) -> CaseRecord:
    sizes = {"rows": 16384, "width": 1024, "classes": 2, "modalities": 1}
    return CaseRecord(
        name,
        "prototype_loss",
        {**sizes, "sources": 0, "inactive": 0},
        "bytes",
        128 * 2**20,
        0,
        40,
        Probes(20e9, 10e9, 2e9, 30e-6),
        [entry("pycdgkd", "public", ours, ours, peak_bytes=65 * 2**20), *entries],
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture
def record() -> Run:
    """A made-up run: one goal met, others missed, a peer that is faster, one that is wrong."""
    ours = 0.01
    large = prototype_record(
        "prototype_loss/N16384-D1024-K2",
        ours,
        entry("kernel", "kernel", 0.006, ours),
        entry("addmm", "peer", 0.09, ours, peak_bytes=200 * 2**20),
        entry("lce", "peer", 0.005, ours),
        Entry("cdist", "peer", 1, 0.125, {}, {}),
        Entry("ProxyNCA", "peer", 1, None, {}, {}, failure="ImportError: x"),
        entry("pycdgkd x2", "public", 0.00625, ours, speedup=spread(1.6)),
        entry("addmm x2", "peer", 0.05, ours, speedup=spread(1.9)),
    )
    strided = prototype_record(
        "prototype_loss/N16384-D1024-K2-strided",
        0.02,
        entry("neighbour", "neighbour", 0.01, 0.02),
        neighbour="prototype_loss/N16384-D1024-K2",
        neighbour_bytes=128 * 2**20,
    )
    machine = {
        "processor": "Some CPU @ 3 GHz",
        "architecture": "x86_64",
        "cores": 2,
        "caches": "L1d 48K, L2 2048K",
        "memory_gib": 24.0,
        "huge_pages": "madvise",
        "kernel": "Linux 6",
    }
    software = {
        "pycdgkd": "0.1.0",
        "commit": "abc",
        "instructions": "avx512",
        "torch": "2.14",
        "torch_instructions": "AVX512",
        "python": "3.11",
        "numpy": "2",
    }
    settings = {
        "threads": [1, 2],
        "seconds_a_case": 5.0,
        "compiled": True,
        "packages": {"torchdistill": True, "pytorch_metric_learning": False},
    }
    return Run(machine, software, settings, "2026-01-02T03:04:05+00:00", [large, strided])
