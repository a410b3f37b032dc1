"""Peak memory of one call beyond its inputs, as the operating system counts it.

Torch's allocation events miss what matrix products and C++ allocate for themselves, so the
kernel's high-water mark of resident memory is read (Linux). Each contestant runs in a fork of its
own of a fresh process that holds the inputs, once unmeasured, so that the pages of the libraries
that it calls are there, and once measured; the C library returns every large block at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .cases import MIB, Case, select

LEAST_BYTES = 8 * MIB  # smaller inputs drown in the pages of the libraries
MANY_CLASSES = 1000
SECONDS = 300.0
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def worth_measuring(case: Case) -> bool:
    """Large inputs or many classes; neighbours differ in layout alone."""
    large = case.input_bytes >= LEAST_BYTES or case.classes >= MANY_CLASSES
    return large and case.neighbour is None


def peak_bytes(case: Case) -> dict[str, int]:
    """Bytes by contestant; empty where the operating system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pycdgkd.bench.memory", case.name],
        env={**os.environ, **_MALLOC, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {case.name} failed:\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(key))
    return int(line.split()[1]) * 1024


def _main(name: str) -> None:
    import torch

    from .inputs import make_inputs
    from .lineup import lineup

    torch.set_num_threads(1)
    (case,) = (case for case in select(name) if case.name == name)
    found = {}
    for one in lineup(make_inputs(case), compiled=False):
        if one.layer not in ("public", "peer"):
            continue
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            one.result()
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak
            before = _status("VmRSS")
            one.result()
            os.write(writer, str(max(0, _status("VmHWM") - before)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        if status or not answer:
            raise RuntimeError(f"{one.name} failed with status {status}")
        found[one.name] = int(answer)
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1])
