"""The reader of the compiler's report, on reports with and without what must not be."""

from __future__ import annotations

import pytest
from resources import Kernel, parse, table

CLEAN = """
ptxas info    : 0 bytes gmem, 1 bytes cmem[4]
ptxas info    : Compiling entry function '_Z3fooPf' for 'sm_90'
ptxas info    : Function properties for _Z3fooPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 74 registers, used 1 barriers, 33672 bytes smem
"""
SPILLED = CLEAN.replace("0 bytes spill stores, 0", "24 bytes spill stores, 16")
FRAMED = CLEAN.replace("0 bytes stack frame", "40 bytes stack frame")


def test_a_clean_kernel() -> None:
    assert parse(CLEAN) == [Kernel("_Z3fooPf", "90", 74, 33672, 0, 0)]
    assert parse(CLEAN)[0].clean


@pytest.mark.parametrize(("report", "stack", "spills"), [(SPILLED, 0, 40), (FRAMED, 40, 0)])
def test_what_must_not_be(report: str, stack: int, spills: int) -> None:
    (kernel,) = parse(report)
    assert (kernel.stack, kernel.spills, kernel.clean) == (stack, spills, False)
    assert "must not be" in table([kernel])


def test_a_function_beside_a_kernel_counts() -> None:
    called = """ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    report = CLEAN.replace("ptxas info    : Used", f"{called}ptxas info    : Used")
    assert not parse(report)[0].clean


def test_several_kernels_and_architectures() -> None:
    report = CLEAN + SPILLED.replace("sm_90", "sm_80").replace("foo", "bar")
    assert [(k.name, k.arch, k.clean) for k in parse(report)] == [
        ("_Z3fooPf", "90", True),
        ("_Z3barPf", "80", False),
    ]


def test_nothing_to_read_is_no_kernel() -> None:
    assert parse("nvcc warning: nothing here") == []
