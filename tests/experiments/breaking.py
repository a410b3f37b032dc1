"""Trainings that are interrupted and go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Classifier


def check_resumes(bench: Bench, train: Callable[[Bench, Any], Classifier], folder: Path) -> None:
    """Interrupt after the second epoch, go on, and compare with an unbroken training."""

    def interrupt(line: str) -> None:
        if "epoch 2/" in line:
            raise KeyboardInterrupt

    broken = replace(bench, out=folder / "broken", progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(broken, bench.settings)
    resumed = train(replace(broken, progress=None), bench.settings)
    unbroken = train(replace(bench, out=folder / "unbroken"), bench.settings)
    assert resumed.epochs == unbroken.epochs > 2
    logits = [run.logits(bench.data, bench.split.val) for run in (resumed, unbroken)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
