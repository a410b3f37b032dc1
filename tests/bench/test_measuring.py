"""What is measured of the machine and of memory has the right size."""

from __future__ import annotations

from pathlib import Path

import pytest

from pycdgkd.bench import machine, memory, probes
from pycdgkd.bench.cases import MIB, Case, select


def test_probes_are_plausible() -> None:
    found = probes.probe(copy_bytes=4 * MIB)
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.clone < 1e13
    assert 1e7 < found.exp < 1e12
    assert 1e-7 < found.autograd < 1e-1


def test_the_machine_and_the_software_are_described() -> None:
    found = machine.describe()
    assert found["cores"] >= 1
    assert {"processor", "architecture", "caches", "memory_gib", "huge_pages", "kernel"} < set(
        found
    )
    assert all(found.values())
    software = probes.software()
    assert software["instructions"] in ("scalar", "baseline", "avx2", "avx512", "neon")
    assert software["commit"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peaks")
def test_peak_memory_counts_the_gradient() -> None:
    (case,) = select("class_prototypes/N4096-D1024-K100")
    found = memory.peak_bytes(case)
    gradient = case.input_bytes
    assert set(found) == {"pycdgkd", "one-hot", "index_add"}
    assert all(gradient <= peak < 5 * gradient for peak in found.values())


def test_small_inputs_are_not_measured() -> None:
    assert not memory.worth_measuring(Case("teacher_loss", 128, 2, 512, 2))
    assert memory.worth_measuring(Case("teacher_loss", 16384, 2, 1024, 2))
    assert memory.worth_measuring(Case("prototype_loss", 16, 32768, 8))


def test_a_failing_measurement_is_told() -> None:
    with pytest.raises(RuntimeError, match="measuring the memory of teacher_loss/N3-D5-K2 failed"):
        memory.peak_bytes(Case("teacher_loss", 3, 2, 5, 2))
