"""Feeds damaged files to every reader: each must end with our error or a result.

    python tests/fuzz/fuzz.py [inputs] [seed] [reader]

Workers read one file after another; a crash, another exception, more than 10 s for a file, or more
than 1 GB is a finding, named by reader and number. Exit status 1 then.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

SECONDS = 10
MEMORY = 1 << 30  # resident, beyond what a worker holds between two files
RESERVED = 16 << 30  # address space, so that no file takes the machine down
WORKERS = os.cpu_count() or 1
STARTED = 120  # seconds for a worker to import and make its seeds


def plan(inputs: int, seed: int, only: str | None) -> list[tuple[str, int]]:
    """(reader, seed of the damage) of every input, readers in proportion to their shares."""
    from readers import READERS

    chosen = {name: r.share for name, r in READERS.items() if only in (None, name)}
    names = [name for name, share in chosen.items() for _ in range(share)]
    return [(names[k % len(names)], seed * 10_000_000 + k) for k in range(inputs)]


def damaged(name: str, number: int, seeds: dict[str, list[Path]]) -> tuple[bytes, str]:
    """The content and suffix of one input."""
    from mutate import mutate

    rng = random.Random(number)
    path = rng.choice(seeds[name])
    return mutate(path.read_bytes(), rng), path.suffix


def work(folder: Path, jobs: Path) -> None:
    """Worker: reads the inputs listed in ``jobs`` and prints one line about each."""
    import resource
    import warnings

    import torch
    from readers import READERS

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    listed = [tuple(job) for job in json.loads(jobs.read_text())]
    seeds = {}
    for name in sorted({name for name, _ in listed}):
        (folder / name).mkdir()
        seeds[name] = READERS[name].seeds(folder / name)
        for path in seeds[name]:
            READERS[name].read(_copy(path.read_bytes(), folder / "whole", path.suffix))
    resource.setrlimit(resource.RLIMIT_AS, (RESERVED, resource.RLIM_INFINITY))
    for name, number in listed:
        content, suffix = damaged(name, number, seeds)
        path = _copy(content, folder / "damaged", suffix)
        print(json.dumps(["begin", name, number]), flush=True)
        print(json.dumps(["end", name, number, _outcome(READERS[name].read, path)]), flush=True)


def _copy(content: bytes, folder: Path, suffix: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"input{suffix}"
    path.write_bytes(content)
    return path


def _outcome(read: Callable[[Path], object], path: Path) -> str:
    """How reading a file ends: "read", "refused", or what is wrong with that."""
    from pycdgkd.errors import InputError

    Path("/proc/self/clear_refs").write_text("5")  # the peak below starts anew
    before = _kilobytes("VmRSS")
    try:
        read(path)
        outcome = "read"
    except InputError:
        outcome = "refused"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"[:300]
    taken = (_kilobytes("VmHWM") - before) << 10
    return f"took {taken >> 20} MB" if taken > MEMORY else outcome


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def run(folder: Path, jobs: list[tuple[str, int]], slot: int) -> list[tuple[str, int, str]]:
    """One worker over its inputs, started again after each crash; (reader, number, outcome)."""
    outcomes: list[tuple[str, int, str]] = []
    while len(outcomes) < len(jobs):
        listed = folder / f"jobs{slot}.json"
        listed.write_text(json.dumps(jobs[len(outcomes) :]))
        mine = folder / f"slot{slot}"
        shutil.rmtree(mine, ignore_errors=True)
        mine.mkdir()
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(mine), str(listed)],
            stdout=subprocess.PIPE,
            text=True,
        )
        outcomes += _watch(process, jobs[len(outcomes) :])
    return outcomes


def _watch(
    process: subprocess.Popen[str], jobs: list[tuple[str, int]]
) -> list[tuple[str, int, str]]:
    """What a worker says until it ends, dies or takes too long."""
    import selectors

    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    os.set_blocking(process.stdout.fileno(), False)
    outcomes: list[tuple[str, int, str]] = []
    rest, limit, begun = "", STARTED, False
    deadline = time.monotonic() + limit
    while True:
        if not selector.select(timeout=max(0.0, deadline - time.monotonic())):
            process.kill()
            process.wait()
            return [*outcomes, (*jobs[len(outcomes)], f"took more than {limit} s")]
        text = process.stdout.read()
        if text == "":
            status = process.wait()
            if status == 0 and len(outcomes) == len(jobs):
                return outcomes
            if not begun:
                raise RuntimeError(f"a worker did not start: status {status}; see its log above")
            return [*outcomes, (*jobs[len(outcomes)], f"died with status {status}")]
        *lines, rest = (rest + (text or "")).split("\n")
        for line in lines:
            kind, *told = json.loads(line)
            begun = True
            if kind == "end":
                outcomes.append((told[0], told[1], told[2]))
        limit = SECONDS if begun else STARTED
        deadline = time.monotonic() + limit


def main(inputs: int, seed: int, only: str | None) -> int:
    """Run all workers and tell what came out."""
    from concurrent.futures import ThreadPoolExecutor

    began = time.monotonic()
    jobs = plan(inputs, seed, only)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with ThreadPoolExecutor(WORKERS) as pool:
            parts = [jobs[slot::WORKERS] for slot in range(WORKERS)]
            found = pool.map(run, [folder] * WORKERS, parts, range(WORKERS))
            outcomes = [outcome for part in found for outcome in part]
    counts: dict[str, Counter[str]] = {}
    findings = []
    for name, number, outcome in outcomes:
        kind = outcome if outcome in ("read", "refused") else "findings"
        counts.setdefault(name, Counter())[kind] += 1
        if kind == "findings":
            findings.append((name, number, outcome))
    for name, count in sorted(counts.items()):
        print(
            f"{name:18}", *(f"{count[kind]:6} {kind}" for kind in ("read", "refused", "findings"))
        )
    for name, number, outcome in findings[:40]:
        print(f"finding  {name} {number}: {outcome}")
    print(
        f"{len(outcomes)} inputs, {len(findings)} findings, {time.monotonic() - began:.0f} s "
        f"(again: python tests/fuzz/fuzz.py {inputs} {seed})"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        given = [*sys.argv[1:], *["20000", "1"][len(sys.argv) - 1 :]]
        sys.exit(main(int(given[0]), int(given[1]), given[2] if len(given) > 2 else None))
