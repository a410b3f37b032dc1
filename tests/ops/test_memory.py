"""What a prototype loss of many classes takes of memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import pycdgkd.ops

# The peak is reached once: a small problem of the same kind first pays for what is paid but once.
SCRIPT = """
import resource, sys
import torch
import pycdgkd

def run(N, K, D, reduction):
    features = torch.randn(N, D, requires_grad=True)
    prototypes = torch.randn(K, D, requires_grad=True)
    labels = torch.arange(N) % K
    loss = pycdgkd.prototype_loss(features, prototypes, labels, reduction=reduction).loss
    loss.sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
run(64, 4096, 8, sys.argv[1])
before = peak()
run(4096, 4096, 8, sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(bool(pycdgkd.ops.build_info()["sanitize"]), reason="sanitizers take memory")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_many_classes_hold_no_array_of_rows_by_classes(reduction: str) -> None:
    """(N, K) would be 64 MiB, forward or backward; a block of 128 rows by 4 is 8 MiB."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, reduction],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 24 * 1024  # KiB
