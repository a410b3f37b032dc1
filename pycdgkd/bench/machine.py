"""What this machine is and what it can do at most: copy bandwidth, exponentials, call overhead."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pycdgkd

from .cases import MIB
from .layers import active_instructions, exp_kernel
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


def _first_line(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith(key))
    return next(found, "unknown")


def _caches() -> str:
    """Sizes of the first core's caches, e.g. "L1d 48K, L2 2048K"."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (folder / name).read_text(encoding="utf-8").strip()
                for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found) or "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Processor, cores, caches, memory, kernel."""
    memory = _first_line("/proc/meminfo", "MemTotal").split(" ")[0]
    return {
        "processor": _first_line("/proc/cpuinfo", "model name").replace("(R)", ""),
        "architecture": platform.machine(),
        "cores": _cores(),
        "caches": _caches(),
        "memory_gib": round(int(memory) / MIB, 1) if memory.isdigit() else None,
        "kernel": f"{platform.system()} {platform.release()}",
    }


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


def commit() -> str:
    """Commit of the checkout that the package, or else the working folder, belongs to."""
    package = Path(pycdgkd.__file__).parent
    for folder in (package.parent, Path.cwd()):
        if not (folder / "pycdgkd" / "_C.pyi").is_file() or not (folder / ".git").exists():
            continue
        found = _git(folder, "rev-parse", "--short=12", "HEAD")
        if found:
            changed = _git(folder, "status", "--porcelain", "--", "csrc", "pycdgkd")
            return found + ("+changes" if changed else "")
    return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
