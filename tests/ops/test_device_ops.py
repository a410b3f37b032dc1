"""What only the ops of a device have to show: labels that the host never sees, limits of a launch.

Run with the CUDA kernels emulated on the CPU: ``make emulate``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch

import pycdgkd
from pycdgkd import reference
from pycdgkd.ops.registration import stays_on_device

pytestmark = pytest.mark.skipif(
    not stays_on_device(torch.empty(0)), reason="needs the CUDA kernels emulated: make emulate"
)


def batch(N: int = 6, K: int = 3, D: int = 5) -> tuple[torch.Tensor, ...]:
    prototypes = cases.make_prototypes(K, D)
    labels = cases.make_labels(N, K)
    return cases.make_features(prototypes, labels), prototypes, labels, cases.make_logits(N, K)


# z features, c prototypes, y labels, s logits
CALLS: dict[str, Callable[..., Any]] = {
    "class_prototypes": lambda z, _c, y, _s: pycdgkd.class_prototypes(z, y, 3),
    "prototype_loss": lambda z, c, y, _: pycdgkd.prototype_loss(z, c, y),
    "convergence_rates": lambda z, c, y, _: pycdgkd.convergence_rates([z], [c], y),
    "teacher_loss": lambda z, c, y, s: pycdgkd.teacher_loss(s, [z], y, [c]),
    "teacher_loss of batch means": lambda z, _, y, s: pycdgkd.teacher_loss(s, [z], y),
    "distillation_loss": lambda _z, _c, y, s: pycdgkd.distillation_loss(s, [s], y),
}


@pytest.mark.skipif(
    torch.get_default_device().type == "cuda",
    reason="nothing runs on the device afterwards; tests/gpu/test_on_gpu.py has it",
)
@pytest.mark.parametrize("label", [-1, 3, 1 << 40])
@pytest.mark.parametrize("name", CALLS)
def test_a_label_out_of_range_ends_the_kernel(name: str, label: int) -> None:
    z, c, y, s = batch()
    y[4] = label
    with pytest.raises(RuntimeError, match="trapped"):
        CALLS[name](z, c, y, s)
    y[4] = 0
    CALLS[name](z, c, y, s)  # and the next one is not harmed


@pytest.mark.parametrize("K", [3, 40])
@pytest.mark.parametrize("M", [8, 9, 17])
def test_more_modalities_than_one_launch_takes(M: int, K: int) -> None:
    _, _, y, s = batch(K=K)
    prototypes = [cases.make_prototypes(K, 3 + m) for m in range(M)]
    features = [cases.leaf(cases.make_features(c, y)) for c in prototypes]
    exact = [cases.double_leaf(z) for z in features]
    for given in (prototypes, None):
        result = pycdgkd.teacher_loss(s, features, y, given)
        expected = reference.teacher_loss(
            s.double(), exact, y, None if given is None else [c.double() for c in given]
        )
        for ours, theirs in zip(result, expected, strict=True):
            cases.assert_value(ours, theirs.detach(), torch.float32)
        grads = torch.autograd.grad(result.loss, features)
        for ours, theirs in zip(grads, torch.autograd.grad(expected[0], exact), strict=True):
            cases.assert_grad(ours, theirs, torch.float32)


def test_most_sources() -> None:
    sources = [cases.make_logits(4, 3) for _ in range(65)]
    got = pycdgkd.multi_source_kl(sources[0], sources[1:])
    expected = reference.multi_source_kl(sources[0].double(), [t.double() for t in sources[1:]])
    cases.assert_value(got, expected, torch.float32)
    with pytest.raises(RuntimeError, match="sources: expected at most 64 on CUDA, got 65"):
        pycdgkd.multi_source_kl(sources[0], sources)


@pytest.mark.parametrize("K", [2, 40])
def test_more_rows_than_each_block_counts(K: int) -> None:
    N = 8193
    labels = cases.make_labels(N, K)
    labels[::3] = -100
    logits, source = cases.leaf(cases.make_logits(N, K)), cases.make_logits(N, K)
    exact = cases.double_leaf(logits)
    got = pycdgkd.distillation_loss(logits, [source], labels)
    expected = reference.distillation_loss(exact, [source.double()], labels)
    for ours, theirs in zip(got, expected, strict=True):
        cases.assert_value(ours, theirs.detach(), torch.float32)
    (grad,) = torch.autograd.grad(got.loss, logits)
    cases.assert_grad(grad, torch.autograd.grad(expected[0], exact)[0], torch.float32)
