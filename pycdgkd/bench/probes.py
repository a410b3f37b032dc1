"""What this machine can do at most: copy bandwidth, exponentials, call overhead."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import pycdgkd

from .cases import MIB
from .layers import active_instructions, exp_kernel
from .machine import commit
from .records import Probes
from .timing import quantile

COPY_BYTES = 256 * MIB  # of one tensor; a copy moves twice that
FEW, MANY = 1024, 5120  # values of exp on arrays that fit the L1 cache: only the difference counts


def _median_seconds(call: Callable[[], Any], repeats: int, steps: int = 1) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            call()
        seconds.append((time.perf_counter() - start) / steps)
    return quantile(seconds, 0.5)


def _autograd_floor() -> float:
    x, y = torch.zeros(128, 2, requires_grad=True), torch.ones(128, 2)
    loss = torch.nn.functional.mse_loss
    return _median_seconds(lambda: torch.autograd.grad(loss(x, y), x), 9, 100)


def probe(*, copy_bytes: int = COPY_BYTES) -> Probes:
    """Measure the limits now, on one thread: about a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.zeros(copy_bytes // 4)
        copy = _median_seconds(partial(torch.zeros_like(x).copy_, x), 5)
        clone = _median_seconds(x.clone, 3)
        exp = exp_kernel()
        few, many = (np.linspace(-8, 0, size, dtype=np.float32) for size in (FEW, MANY))
        seconds = _median_seconds(lambda: exp(many), 9, 200) - _median_seconds(
            lambda: exp(few), 9, 200
        )
        rate = (MANY - FEW) / max(seconds, 1e-9)
        return Probes(2 * copy_bytes / copy, 2 * copy_bytes / clone, rate, _autograd_floor())
    finally:
        torch.set_num_threads(threads)


def software() -> dict[str, Any]:
    """Versions, commit and instruction set."""
    return {
        "pycdgkd": pycdgkd.__version__,
        "commit": commit(),
        "instructions": active_instructions(),
        "torch": str(torch.__version__),
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
