"""Where the time and memory of one training step go: ``python benchmarks/profile_step.py nano``.

The teacher's step on random data: both encoders, ``teacher_loss`` with given prototypes, backward,
Adam. Prints the share of each part, of each kind of operation, and the peak memory of the step.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import pycdgkd
from pycdgkd.models.networks import build_multimodal
from pycdgkd.models.presets import get_preset
from pycdgkd.training.config import preset_config

FRAMES, CHANNELS, TIMES = 5, 28, 512


class Step:
    """One training step, in parts that can be timed apart."""

    def __init__(self, preset: str, batch: int) -> None:
        torch.manual_seed(0)
        sizes = get_preset(preset)
        self.net = build_multimodal(preset, n_chans=CHANNELS, n_times=TIMES)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)
        self.video = torch.randint(256, (batch, FRAMES, 3, sizes.img_size, sizes.img_size))
        self.video = self.video.to(torch.uint8)
        self.eeg = torch.randn(batch, CHANNELS, TIMES)
        self.labels = torch.arange(batch) % 2
        self.prototypes = [torch.randn(2, sizes.feature_dim) for _ in range(2)]

    def parts(self) -> dict[str, float]:
        """Seconds of each part."""
        seconds: dict[str, float] = {}

        def timed(name: str, call: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = call()
            seconds[name] = time.perf_counter() - start
            return result

        def loss(logits: Tensor, features: list[Tensor]) -> Tensor:
            return pycdgkd.teacher_loss(logits, features, self.labels, self.prototypes).loss

        video = timed("video forward", lambda: self.net.visual(self.video))
        eeg = timed("EEG forward", lambda: self.net.eeg(self.eeg))
        leaves = [z.detach().requires_grad_() for z in (video, eeg)]
        logits = timed("classifier", lambda: self.net.head(torch.cat(leaves, dim=1)))
        value = timed("teacher_loss", lambda: loss(logits, leaves))
        timed("loss backward", value.backward)
        timed("video backward", lambda: video.backward(leaves[0].grad))
        timed("EEG backward", lambda: eeg.backward(leaves[1].grad))
        timed("optimizer", self.optimizer.step)
        self.optimizer.zero_grad()
        return seconds


def operations(step: Step, rows: int = 12) -> str:
    """Time by kind of operation, children apart."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step.parts()
    return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows))


def main() -> None:
    """Print the profile of one preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", choices=["nano", "paper"])
    parser.add_argument("--batch", type=int, help="samples (default: the preset's, at most 32)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch = options.batch or min(preset_config(options.preset).optim.batch_size, 32)
    step = Step(options.preset, batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds = [step.parts() for _ in range(options.steps + 1)][1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    total = sum(medians.values())
    print(
        f"{options.preset}, batch {batch}, {options.threads} threads: {total * 1e3:.0f} ms a step"
    )
    for name, seconds in medians.items():
        print(f"{name:16s} {seconds * 1e3:9.2f} ms {seconds / total:6.1%}")
    print(f"memory beyond the network: {peak / 1024:.0f} MiB")
    print(operations(step))


if __name__ == "__main__":
    main()
