"""What the compiled modules say about themselves."""

from __future__ import annotations

import pytest
import torch

from pycdgkd import ops

INFO = ops.build_info()


def test_build_info() -> None:
    assert INFO["abi_target"] == "2.10"
    levels = INFO["isa_levels"].split(",")
    assert levels[0] == "baseline"
    assert INFO["isa_active"] in levels
    assert INFO["compiler"]
    assert bool(INFO["cuda_archs"]) == INFO["cuda"]


def test_devices_with_kernels() -> None:
    assert ops.has_kernels("cpu")
    assert ops.CUDA_ERROR is None
    assert ops.has_kernels("cuda") == (INFO["cuda"] and torch.version.cuda is not None)
    assert not ops.has_kernels("meta")


@pytest.mark.skipif(not INFO["cuda"], reason="this build has no CUDA library (no nvcc was found)")
def test_the_cuda_library_loads_with_or_without_a_device() -> None:
    from pycdgkd import _cuda

    assert _cuda.runtime_version() >= 12000
    for device in _cuda.devices():
        assert device["memory_bytes"] > 0
