"""Every differentiable loss in one table, for the tests that ask the same of all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import make_features, make_labels, make_logits, make_prototypes
from torch import Tensor

import pycdgkd

N, K, WIDTHS = 33, 4, (9, 5)
FEW, MANY = 40, 70  # classes: prototype losses go another way above 40 (32 on a device)
Inputs = list[Tensor]


def inputs(dtype: torch.dtype = torch.float32, K: int = K) -> Inputs:
    """logits, two features, two prototypes, labels, two sources."""
    torch.manual_seed(3)
    labels = make_labels(N, K)
    labels[::5] = -100
    prototypes = [make_prototypes(K, D, dtype=dtype) for D in WIDTHS]
    features = [make_features(c, labels) for c in prototypes]
    logits, *sources = (make_logits(N, K, dtype=dtype) for _ in range(3))
    return [logits, *features, *prototypes, labels, *sources]


# Each loss as a function of `inputs()` and the positions that it is differentiable in.
LOSSES: dict[str, tuple[Callable[[Inputs], Tensor], tuple[int, ...]]] = {
    "class_prototypes": (
        lambda x: pycdgkd.class_prototypes(x[1], x[5], len(x[3])).prototypes.square().sum(),
        (1,),
    ),
    "prototype_loss": (lambda x: pycdgkd.prototype_loss(x[1], x[3], x[5]).loss, (1, 3)),
    "prototype_loss_rows": (
        lambda x: pycdgkd.prototype_loss(x[1], x[3], x[5], reduction="none").loss.sum(),
        (1, 3),
    ),
    "teacher_loss": (
        lambda x: pycdgkd.teacher_loss(x[0], x[1:3], x[5], x[3:5]).loss,
        (0, 1, 2),
    ),
    "teacher_loss_with_prototypes": (
        lambda x: pycdgkd.teacher_loss(x[0], x[1:3], x[5], x[3:5], detach_prototypes=False).loss,
        (0, 1, 2, 3, 4),
    ),
    "teacher_loss_batch_means": (
        lambda x: pycdgkd.teacher_loss(x[0], x[1:3], x[5], detach_prototypes=False).loss,
        (0, 1, 2),
    ),
    "multi_source_kl": (lambda x: pycdgkd.multi_source_kl(x[0], x[6:]), (0,)),
    "multi_source_kl_rows": (
        lambda x: pycdgkd.multi_source_kl(x[0], x[6:], reduction="none").sum(),
        (0,),
    ),
    "distillation_loss": (lambda x: pycdgkd.distillation_loss(x[0], x[6:], x[5]).loss, (0,)),
}
# Every loss for few and for many classes: (name, K).
CASES = [pytest.param(name, size, id=f"{name}-{size}") for name in LOSSES for size in (K, MANY)]


def with_grad(x: Inputs, positions: tuple[int, ...]) -> Inputs:
    return [t.detach().requires_grad_(i in positions) for i, t in enumerate(x)]


def run(name: str, x: Inputs) -> list[Tensor]:
    """[loss, gradients...]"""
    loss, positions = LOSSES[name]
    leaves = with_grad(x, positions)
    value = loss(leaves)
    return [value.detach(), *torch.autograd.grad(value, [leaves[i] for i in positions])]
