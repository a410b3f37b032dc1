"""What this machine is, and which commit is measured (standard library only)."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pycdgkd

from .cases import MIB


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


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _huge_pages() -> str:
    """When fresh memory comes in huge pages; torch asks for them where its variable is set."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    asked = " (torch asks)" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else ""
    return text.partition("[")[2].partition("]")[0] + asked


def describe() -> dict[str, Any]:
    """Processor, cores, caches, memory, huge pages, kernel."""
    memory = _first_line("/proc/meminfo", "MemTotal").split(" ")[0]
    return {
        "processor": _first_line("/proc/cpuinfo", "model name").replace("(R)", ""),
        "architecture": platform.machine(),
        "cores": available_cores(),
        "caches": _caches(),
        "memory_gib": round(int(memory) / MIB, 1) if memory.isdigit() else None,
        "huge_pages": _huge_pages(),
        "kernel": f"{platform.system()} {platform.release()}",
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
