from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pycdgkd.ops

# The CUDA kernels, run on the CPU in place of the CPU's own (csrc/cuda/emulator.h).
EMULATED = os.environ.get("PYCDGKD_TEST_EMULATED") == "1"
if EMULATED:
    import pycdgkd._cuda_emulated  # noqa: F401  replaces the CPU ops of this process

    from pycdgkd.ops.registration import UNSEEN_DEVICES

    UNSEEN_DEVICES.add("cpu")

# Where the op tests make their tensors; "cuda" is for tests/gpu/check.py.
DEVICE = os.environ.get("PYCDGKD_TEST_DEVICE", "cpu")
if DEVICE != "cpu":  # here, and not in a fixture: test modules make tensors while they are imported
    torch.set_default_device(DEVICE)

# Tests of what only the host's ops have: part of the test's id, and why it says nothing of others.
HOST_ONLY = {
    "labels[": "the message needs the host to read labels; test_device_ops.py has the device's",
    "unused_labels": "the message needs the host to read labels",
    "leave_the_bank_as_it_was": "the message needs the host to read labels",
    "test_kernels.py": "the CPU kernels on NumPy arrays",
    "test_temporal_conv.py": "an op of the CPU alone",
    "same_bits_for_every_thread_count": "threads of the CPU",
    "instruction_sets": "instruction sets of the CPU",
    "test_copied_only_where": "the host hands out saved gradients, having looked at grad_loss",
    "test_no_gradient_is_made": "other ops leave statistics beside it",
    "test_the_arguments_below_are_right": "the list is of what the CPU ops leave",
    "test_prototype_loss_backward[": "the list is of what the CPU ops leave",
    "test_teacher_loss_backward_of_many_classes": "the message needs the host to read labels",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for part, reason in HOST_ONLY.items():
            if (EMULATED or DEVICE != "cpu") and part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


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
