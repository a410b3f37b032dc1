"""What a run's bits depend on besides its data: seeds, threads, device, deterministic kernels."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.utils.deterministic

from pycdgkd.errors import InputError
from pycdgkd.ops import has_kernels

from .config import TrainConfig

_deterministic: Any = (
    torch.utils.deterministic
)  # its switch is a property that torch leaves untyped

Progress: TypeAlias = Callable[[str], None] | None


def derive_seed(seed: int, *names: str) -> int:
    """A seed of its own for each purpose, so that no network depends on what ran before it."""
    text = ":".join([str(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def resolve_device(name: str) -> torch.device:
    """The device of a configuration; "auto" is the GPU where torch has one."""
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if available else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"device '{name}' is not there: torch sees {count} CUDA devices; "
                "remedy: device auto, or a torch build with CUDA"
            )
    return device


def loss_device(device: torch.device) -> torch.device:
    """Where the losses of networks on ``device`` are computed: the CPU where only it has kernels.

    Logits and features of a batch are small beside the networks that made them.
    """
    return device if has_kernels(device.type) else torch.device("cpu")


@contextlib.contextmanager
def reproducible(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Deterministic kernels and the configured thread count; all global state is put back after.

    On the CPU an operation without a deterministic form is an error; on a GPU it is a warning.
    """
    threads = torch.get_num_threads()
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = _deterministic.fill_uninitialized_memory
    cuda = device.type == "cuda"
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        torch.use_deterministic_algorithms(True, warn_only=cuda)
        # Writing NaN into every new tensor first is a debugging aid that costs a tenth of the time.
        _deterministic.fill_uninitialized_memory = False
        with torch.random.fork_rng(devices=[device] if cuda else []):
            yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warning)
        _deterministic.fill_uninitialized_memory = was_filling
        torch.set_num_threads(threads)


def describe(device: torch.device) -> dict[str, str]:
    """What must be equal for a resumed run to give the same bits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "torch": str(torch.__version__),  # a subclass of str that torch.load refuses
        "device": name,
        "threads": str(torch.get_num_threads()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def duration(seconds: float) -> str:
    """Seconds in words: "8 s", "2 min 05 s", "3 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
