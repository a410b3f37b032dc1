"""What the compiler says each CUDA kernel takes: registers, shared memory, and what must not be.

    python tests/gpu/resources.py [--arch 80 90]

Compiles every csrc/cuda/*.cu with warnings as errors. Fails on a stack frame or a spilled register:
both are memory traffic that no kernel here needs. Needs nvcc, no GPU and no torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "--Werror=all-warnings",
    "--compiler-options=-Wall,-Wextra,-Werror",
    "--ptxas-options=-v",
]

_KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture; bytes but for the registers of a thread."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int

    @property
    def clean(self) -> bool:
        """Whether everything of a thread stays in registers."""
        return self.stack == 0 and self.spills == 0


def parse(report: str) -> list[Kernel]:
    """The kernels of a report of ``ptxas -v``; functions that are not inlined count as theirs."""
    kernels = []
    name = arch = None
    stack = spills = 0
    for line in report.splitlines():
        if match := _KERNEL.search(line):
            (name, arch), stack, spills = match.groups(), 0, 0
        elif match := _FRAME.search(line):
            stack += int(match[1])
            spills += int(match[2]) + int(match[3])
        elif (match := _USED.search(line)) and name is not None and arch is not None:
            shared = int(match[2] or 0)
            kernels.append(Kernel(name, arch, int(match[1]), shared, stack, spills))
            name = arch = None
    return kernels


def compile_report(nvcc: str, source: Path, archs: Iterable[str]) -> str:
    """What ptxas says of a source; raises ``SystemExit`` with the compiler's words if it fails."""
    targets = [f"--generate-code=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = [nvcc, *FLAGS, *targets, "-c", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def demangled(names: list[str]) -> list[str]:
    """Readable names, where c++filt is there."""
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    plain = [re.sub(r"pycdgkd::(cuda|baseline)::|\(anonymous namespace\)::", "", name)
             for name in text.splitlines()]  # fmt: skip
    return [re.sub(r"^void |\(.*", "", name) for name in plain]


def table(kernels: list[Kernel]) -> str:
    """One line a kernel."""
    lines = [f"{'arch':5} {'regs':>4} {'shared':>7} {'stack':>6} {'spills':>6}  kernel"]
    for kernel, name in zip(kernels, demangled([k.name for k in kernels]), strict=True):
        mark = "" if kernel.clean else "  <- must not be"
        lines.append(
            f"sm_{kernel.arch:3} {kernel.registers:4} {kernel.shared:7} {kernel.stack:6} "
            f"{kernel.spills:6}  {name}{mark}"
        )
    return "\n".join(lines)


def main() -> int:
    """Print the table; exit status 1 if a kernel spills or has a stack frame."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["80", "90"])
    archs = parser.parse_args().arch
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        print("no nvcc found: the resources of the CUDA kernels were NOT checked")
        return 0
    sources = sorted(SOURCES.glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(lambda source: compile_report(nvcc, source, archs), sources)
        kernels = [kernel for report in reports for kernel in parse(report)]
    print(table(kernels))
    bad = [kernel for kernel in kernels if not kernel.clean]
    print(f"{len(kernels)} kernels of {len(sources)} files, {len(bad)} with spills or stack frames")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
