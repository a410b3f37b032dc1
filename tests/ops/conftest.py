from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pycdgkd.ops  # noqa: F401  tests call torch.ops.pycdgkd, which this registers

# The CUDA kernels, run on the CPU in place of the CPU's own (csrc/cuda/emulator.h).
EMULATED = os.environ.get("PYCDGKD_TEST_EMULATED") == "1"
if EMULATED:
    import pycdgkd._cuda_emulated  # noqa: F401  replaces the CPU ops of this process
    from pycdgkd.ops.registration import UNSEEN_DEVICES

    UNSEEN_DEVICES.add("cpu")

# pytest's importlib mode puts no test folder on the path; `cases` and the workers live here.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """One thread: small tensors gain nothing from more, and test_determinism proves them equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
