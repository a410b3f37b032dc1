"""What recordings cost, from file to training step: ``python benchmarks/recordings.py FOLDER``.

Writes a subject of DEAP's full length into FOLDER (40 trials of 60 s, 48 channels at 512 Hz; face
videos of 720 x 576 pixels, 50 frames a second, H.264) and prepares some of its trials on one core:
seconds of a trial by stage, and the peak memory. Then a cache of the paper's shapes is read in
random batches, and a batch's frames are turned into normalised floats beside a training step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from profile_step import Step

from pycdgkd.data import Cache, PrepareConfig, prepare
from pycdgkd.data.config import StudyConfig
from pycdgkd.data.synthetic import draw_scenes, plan_study
from pycdgkd.data.synthetic_eeg import plan_timeline, write_recording
from pycdgkd.data.synthetic_faces import draw_face, draw_identity

STUDY = StudyConfig(subjects=1, trials=40, trial_seconds=60, fixation=5, width=720, height=576)
FILMED = 6
SAMPLES, ROUNDS = 1500, 9
FRAMES, SIDE, CHANNELS, TIMES = 5, 224, 28, 512


def write_subject(root: Path) -> None:
    """One recording of full length, one face video under ``FILMED`` names, and the ratings."""
    trials = plan_study(STUDY)[0]
    rng = np.random.default_rng(0)
    (root / "data_original").mkdir(parents=True)
    evidence = [[t.eeg_valence for t in trials], [t.eeg_arousal for t in trials]]
    path = root / "data_original" / "s01.bdf"
    write_recording(path, STUDY, plan_timeline(STUDY, rng), *evidence, rng)
    lines = ["Participant_id,Trial,Experiment_id,Valence,Arousal,Dominance,Liking"]
    lines += [f"1,{t.trial},{t.experiment_id},{','.join(map(str, t.ratings))}" for t in trials]
    (root / "participant_ratings.csv").write_text("\n".join(lines) + "\n")
    first = root / "s01_trial01.avi"
    _write_video(first, rng)
    for trial in range(2, FILMED + 1):
        os.link(first, root / f"s01_trial{trial:02d}.avi")


def _write_video(path: Path, rng: np.random.Generator) -> None:
    person, trial = draw_identity(rng), plan_study(STUDY)[0][0]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=STUDY.fps, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = STUDY.width, STUDY.height, "yuv420p"
        shape = (STUDY.height, STUDY.width)
        for scene in draw_scenes(STUDY, trial, rng):
            still = draw_face(*shape[::-1], person, scene, np.zeros(shape, np.float32))
            for _ in range(STUDY.hold):  # a camera's noise differs from frame to frame
                grain = rng.integers(-4, 5, (*shape, 1), np.int16)
                pixels = np.clip(still + grain, 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())


def prepare_on_one_core(root: Path, cache: Path) -> None:
    """Prepare in this process and print what it took as JSON."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    began = time.perf_counter()
    report = prepare(root, cache, PrepareConfig())
    told = {
        "trials": report.trials,
        "samples": report.samples,
        "faces": 1 - report.face_miss_rate,
        "stages": report.seconds,
        "seconds": time.perf_counter() - began,
        "peak_mib": _peak_mib(),
    }
    print(json.dumps(told))


def _peak_mib() -> float:
    """Peak resident memory; getrusage would also count the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def show_preparation(root: Path, cache: Path) -> None:
    """Prepare in a process of its own and show each stage's share."""
    command = [sys.executable, __file__, "--prepare", str(root), str(cache)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(run.stdout)
    spent, trials = sum(told["stages"].values()), told["trials"]
    size = (root / "data_original" / "s01.bdf").stat().st_size >> 20
    print(
        f"prepare: {trials} trials of 60 s from a BDF of {size} MiB on one core: "
        f"{told['seconds'] / trials:.2f} s a trial, start included; faces in {told['faces']:.1%} "
        f"of the frames; peak memory {told['peak_mib']:.0f} MiB"
    )
    for stage, seconds in told["stages"].items():
        print(f"  {stage:7} {seconds / trials:5.2f} s a trial {seconds / spent:6.1%}")


def fill_cache(folder: Path) -> Cache:
    """A cache of the paper's shapes, of noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "video": ((FRAMES, 3, SIDE, SIDE), np.uint8),
        "eeg": ((CHANNELS, TIMES), np.float32),
    }
    arrays = {}
    for name, (shape, dtype) in shapes.items():
        path = folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, "w+", dtype, (SAMPLES, *shape))
        one = rng.integers(0, 255, shape).astype(dtype)
        for i in range(SAMPLES):
            array[i] = np.roll(one, i)
        arrays[name] = np.load(path, mmap_mode="r")
    mask = np.ones((SAMPLES, FRAMES), np.bool_)
    return Cache(folder, {}, arrays["video"], mask, arrays["eeg"], {})


def median_seconds(call: Callable[[], Any]) -> float:
    """Median over the rounds, after one to warm up."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def show_loader(cache: Cache, batch: int = 128) -> None:
    """Samples a second from a warm cache in random order, as training reads them."""
    from pycdgkd.training.recordings import Recordings

    data = Recordings(cache, np.zeros(SAMPLES, np.int64), ("a", "b"), torch.device("cpu"))
    order = np.random.default_rng(0).permutation(SAMPLES)

    def epoch() -> None:
        for _ in data.batches(order, batch):
            pass

    seconds = median_seconds(epoch)
    print(f"loader: {SAMPLES / seconds:.0f} samples/s from a warm cache, batches of {batch}")


def show_normalising(preset: str, batch: int) -> None:
    """uint8 frames to normalised floats, beside the whole step that they are for."""
    step = Step(preset, batch)
    branch = step.net.visual
    frames = step.video.flatten(0, 1)

    def normalise() -> None:
        with torch.no_grad():
            branch.normalise(frames)

    part, whole = median_seconds(normalise), median_seconds(step.parts)
    print(f"normalising: {part / whole:.1%} of a {preset} step of {batch} samples")


def main() -> None:
    """Everything, or with --prepare the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cache", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare_on_one_core(options.folder, options.cache)
        return
    root = options.folder / "subject"
    if not root.exists():
        write_subject(root)
    show_preparation(root, options.folder / f"cache{time.time_ns()}")
    show_loader(fill_cache(options.folder / "noise"))
    show_normalising("nano", 32)
    show_normalising("paper", 4)


if __name__ == "__main__":
    main()
