"""Forward and backward of the public losses beside eager torch; every result is checked first.

Times of one run on one machine mean nothing by themselves: read the ratio of the two rows of a
group. ``make bench`` runs it; plain pytest runs each case once as a check.
"""

from __future__ import annotations

from collections.abc import Callable

import eager
import pytest
import torch
from cases import (
    DISTILLATION,
    TEACHER,
    DistillationCase,
    TeacherCase,
    distillation_inputs,
    teacher_inputs,
)
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import pycdgkd


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _step(loss: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(loss(), leaves)


def _time(benchmark: BenchmarkFixture, step: Callable[[], object], expected: object) -> None:
    torch.testing.assert_close(step(), expected, rtol=2e-3, atol=1e-6)
    benchmark(step)


@pytest.mark.parametrize("who", ["eager", "pycdgkd"])
@pytest.mark.parametrize("case", TEACHER, ids=lambda case: case.name)
def test_teacher_loss(benchmark: BenchmarkFixture, case: TeacherCase, who: str) -> None:
    benchmark.group = f"teacher_loss {case}"
    logits, features, labels = teacher_inputs(case)
    steps = {
        "eager": _step(lambda: eager.teacher_loss(logits, features, labels), [logits, *features]),
        "pycdgkd": _step(
            lambda: pycdgkd.teacher_loss(logits, features, labels).loss, [logits, *features]
        ),
    }
    _time(benchmark, steps[who], steps["eager"]())


@pytest.mark.parametrize("who", ["eager", "pycdgkd"])
@pytest.mark.parametrize("case", DISTILLATION, ids=lambda case: case.name)
def test_distillation_loss(benchmark: BenchmarkFixture, case: DistillationCase, who: str) -> None:
    benchmark.group = f"distillation_loss {case}"
    logits, sources, labels = distillation_inputs(case)
    steps = {
        "eager": _step(lambda: eager.distillation_loss(logits, sources, labels), [logits]),
        "pycdgkd": _step(lambda: pycdgkd.distillation_loss(logits, sources, labels).loss, [logits]),
    }
    _time(benchmark, steps[who], steps["eager"]())
