"""One case a message: op, argument, what was expected, what came."""

# ruff: noqa: E501  a table, one case a line

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pycdgkd

N, D, K = 5, 4, 3
Z, C, S = torch.randn(N, D), torch.randn(K, D), torch.randn(N, K)
Y = torch.tensor([0, 1, 2, 1, 0])


def prototype_loss(z: Tensor = Z, c: Tensor = C, y: Tensor = Y, **options: Any) -> Any:
    return pycdgkd.prototype_loss(z, c, y, **options)


def teacher_loss(s: Any = S, z: Any = (Z,), y: Any = Y, c: Any = (C,), **options: Any) -> Any:
    return pycdgkd.teacher_loss(s, z, y, c, **options)


def multi_source_kl(s: Tensor = S, t: Any = (S,), **options: Any) -> Any:
    return pycdgkd.multi_source_kl(s, t, **options)


def distillation_loss(s: Tensor = S, t: Any = (S,), y: Tensor = Y, **options: Any) -> Any:
    return pycdgkd.distillation_loss(s, t, y, **options)


TENSORS: list[tuple[Callable[[], Any], str]] = [
    # ranks and shapes
    (lambda: prototype_loss(z=Z[0]), "prototype_loss: features: expected shape (N, D), got float32 of shape (4)"),
    (lambda: prototype_loss(c=C[0]), "prototype_loss: prototypes: expected shape (K, 4), got float32 of shape (4)"),
    (lambda: prototype_loss(c=C[:, :3]), "prototype_loss: prototypes: expected shape (K, 4), got float32 of shape (3, 3)"),
    (lambda: pycdgkd.class_prototypes(Z[0], Y, K), "class_prototypes: features[0]: expected shape (N, D), got float32 of shape (4)"),
    (lambda: pycdgkd.convergence_rates([Z, Z[0]], [C, C], Y), "convergence_rates: features[1]: expected shape (5, D), got float32 of shape (4)"),
    (lambda: pycdgkd.convergence_rates([Z, Z], [C, C[:2]], Y), "convergence_rates: prototypes[1]: expected shape (3, 4), got float32 of shape (2, 4)"),
    (lambda: teacher_loss(z=(Z[:3],)), "teacher_loss: features[0]: expected shape (5, D), got float32 of shape (3, 4)"),
    (lambda: teacher_loss(s=S[:, :2]), "teacher_loss: prototypes[0]: expected shape (2, 4), got float32 of shape (3, 4)"),
    (lambda: teacher_loss(z=(Z, Z)), "teacher_loss: prototypes: expected as many tensors as features (2), got 1"),
    (lambda: teacher_loss(c=()), "teacher_loss: prototypes: expected as many tensors as features (1), got 0"),
    (lambda: teacher_loss(z=(), c=()), "teacher_loss: features: expected at least one modality, got none"),
    (lambda: teacher_loss(z=(), c=None), "teacher_loss: features: expected at least one modality, got none"),
    (lambda: teacher_loss(z=(), c=None, detach_prototypes=False), "class_prototypes: features: expected at least one tensor, got none"),
    (lambda: pycdgkd.convergence_rates([], [], Y), "convergence_rates: features: expected at least one modality, got none"),
    (lambda: multi_source_kl(s=S[0], t=(S[0],)), "multi_source_kl: logits: expected shape (N, K), got float32 of shape (3)"),
    (lambda: multi_source_kl(t=(S, S[:, :2])), "multi_source_kl: sources[1]: expected shape (5, 3), got float32 of shape (5, 2)"),
    (lambda: distillation_loss(t=(S[:4],)), "distillation_loss: sources[0]: expected shape (5, 3), got float32 of shape (4, 3)"),
    (lambda: multi_source_kl(source_weights=torch.ones(2)), "multi_source_kl: source_weights: expected shape (1,), one weight a source, got float32 of shape (2)"),
    (lambda: pycdgkd.modality_weights(torch.ones(2, 2)), "modality_weights: convergence_rates: expected shape (M,) with M >= 1, got float32 of shape (2, 2)"),
    (lambda: pycdgkd.modality_weights(torch.ones(0)), "modality_weights: convergence_rates: expected shape (M,) with M >= 1, got float32 of shape (0)"),
    # types
    (lambda: prototype_loss(z=Z.long()), "prototype_loss: features: expected float32, float64, bfloat16 or float16, got int64 of shape (5, 4)"),
    (lambda: prototype_loss(z=Z.to(torch.complex64)), "prototype_loss: features: expected float32, float64, bfloat16 or float16, got ComplexFloat of shape (5, 4)"),
    (lambda: pycdgkd.class_prototypes(Z.int(), Y, K), "class_prototypes: features[0]: expected float32, float64, bfloat16 or float16, got int32 of shape (5, 4)"),
    (lambda: pycdgkd.modality_weights(torch.ones(2).long()), "modality_weights: convergence_rates: expected float32, float64, bfloat16 or float16, got int64 of shape (2)"),
    (lambda: multi_source_kl(source_weights=torch.ones(1).int()), "multi_source_kl: source_weights: expected float32, float64, bfloat16 or float16, got int32 of shape (1)"),
    (lambda: prototype_loss(c=C.double()), "prototype_loss: prototypes: expected no float64 beside arguments of lower precision, got float64 of shape (3, 4)"),
    (lambda: prototype_loss(z=Z.double()), "prototype_loss: prototypes: expected float64 like the other floating-point arguments, got float32 of shape (3, 4)"),
    (lambda: teacher_loss(z=(Z.double(),)), "teacher_loss: features[0]: expected no float64 beside arguments of lower precision, got float64 of shape (5, 4)"),
    (lambda: distillation_loss(t=(S.bfloat16(), S.double())), "distillation_loss: sources[1]: expected no float64 beside arguments of lower precision, got float64 of shape (5, 3)"),
    # labels
    (lambda: prototype_loss(y=Y.float()), "prototype_loss: labels: expected int64, int32 or uint8, got float32 of shape (5)"),
    (lambda: prototype_loss(y=Y[:3]), "prototype_loss: labels: expected shape (5,), got int64 of shape (3)"),
    (lambda: teacher_loss(y=Y[:, None]), "teacher_loss: labels: expected shape (5,), got int64 of shape (5, 1)"),
    (lambda: prototype_loss(y=torch.tensor([0, 1, 2, 3, 0])), "prototype_loss: labels[3]: expected a class from 0 to 2 or ignore_index (-100), got 3"),
    (lambda: prototype_loss(y=torch.tensor([0, -1, 2, 3, 0]), ignore_index=3), "prototype_loss: labels[1]: expected a class from 0 to 2 or ignore_index (3), got -1"),
    (lambda: pycdgkd.class_prototypes(Z, Y + 2**40, K), f"class_prototypes: labels[0]: expected a class from 0 to 2 or ignore_index (-100), got {2**40}"),
    (lambda: pycdgkd.convergence_rates([Z], [C], Y.int() - 1), "convergence_rates: labels[0]: expected a class from 0 to 2 or ignore_index (-100), got -1"),
    (lambda: teacher_loss(y=torch.full((5,), 255, dtype=torch.uint8)), "teacher_loss: labels[0]: expected a class from 0 to 2 or ignore_index (-100), got 255"),
    (lambda: distillation_loss(y=torch.tensor([0, 0, 0, 0, 7])), "distillation_loss: labels[4]: expected a class from 0 to 2 or ignore_index (-100), got 7"),
    # classes
    (lambda: pycdgkd.class_prototypes(Z, Y, 0), "class_prototypes: number of classes: expected at least 1 and below 2^30, got 0"),
    (lambda: pycdgkd.class_prototypes(Z, Y, -1), "class_prototypes: number of classes: expected at least 1 and below 2^30, got -1"),
    (lambda: prototype_loss(class_counts=torch.ones(2)), "prototype_loss: class_counts: expected int64 of shape (3,), got int64 of shape (2)"),
    (lambda: teacher_loss(class_counts=torch.ones(3, 1)), "teacher_loss: class_counts: expected int64 of shape (3,), got int64 of shape (3, 1)"),
    (lambda: torch.ops.pycdgkd.prototype_loss(Z, C, Y, torch.ones(3), 1.0, 1, -100, True, True), "prototype_loss: class_counts: expected int64 of shape (3,), got float32 of shape (3)"),
]  # fmt: skip

FINITE = "expected a finite number above 0"
OPTIONS: list[tuple[Callable[[], Any], str]] = [
    *[
        (lambda f=f, v=v: f(scale=v), f"{f.__name__}: scale: {FINITE}, got {v}")
        for f in (prototype_loss, teacher_loss)
        for v in (0.0, -1.0, math.nan, math.inf)
    ],
    (lambda: pycdgkd.convergence_rates([Z], [C], Y, scale=-1), f"convergence_rates: scale: {FINITE}, got -1"),
    *[
        (lambda f=f, v=v: f(temperature=v), f"{f.__name__}: temperature: {FINITE}, got {v}")
        for f in (multi_source_kl, distillation_loss)
        for v in (0.0, -2.0, math.nan, math.inf)
    ],
    (lambda: teacher_loss(proto_weight=1.1), "teacher_loss: proto_weight: expected a number from 0 to 1, got 1.1"),
    (lambda: distillation_loss(kd_weight=-0.1), "distillation_loss: kd_weight: expected a number from 0 to 1, got -0.1"),
    (lambda: distillation_loss(kd_weight=math.nan), "distillation_loss: kd_weight: expected a number from 0 to 1, got nan"),
    (lambda: distillation_loss(temperature_power=math.nan), "distillation_loss: temperature_power: expected a finite number, got nan"),
    (lambda: prototype_loss(reduction="batchmean"), 'prototype_loss: reduction: expected one of "none", "mean", "sum", got \'batchmean\''),
    (lambda: multi_source_kl(reduction="avg"), 'multi_source_kl: reduction: expected one of "none", "mean", "sum", got \'avg\''),
    (lambda: multi_source_kl(direction="back"), 'multi_source_kl: direction: expected one of "reverse", "forward", got \'back\''),
    (lambda: distillation_loss(direction=""), 'distillation_loss: direction: expected one of "reverse", "forward", got \'\''),
    (lambda: multi_source_kl(t=S), "multi_source_kl: sources: expected shape (S, N, K) or a sequence of (N, K), got (5, 3)"),
    (lambda: teacher_loss(z=Z), "teacher_loss: features: expected a sequence of tensors, one for each modality, got one tensor of shape (5, 4)"),
    (lambda: teacher_loss(c=C), "teacher_loss: prototypes: expected a sequence of tensors, one for each modality, got one tensor of shape (3, 4)"),
    (lambda: pycdgkd.convergence_rates(Z, [C], Y), "convergence_rates: features: expected a sequence of tensors"),
    (lambda: teacher_loss(s=S[0, 0], c=None), "teacher_loss: logits: expected shape (N, K), got ()"),
    (lambda: teacher_loss(c=None, class_counts=torch.ones(3)), "teacher_loss: class_counts: expected None beside prototypes=None"),
    (lambda: multi_source_kl(t=(S, S.clone().requires_grad_())), "multi_source_kl: sources[1]: expected a tensor without gradient (sources and their weights are fixed), got one that requires grad; detach() it"),
    (lambda: distillation_loss(t=S[None].clone().requires_grad_()), "distillation_loss: sources[0]: expected a tensor without gradient"),
    (lambda: multi_source_kl(source_weights=torch.ones(1, requires_grad=True)), "multi_source_kl: source_weights: expected a tensor without gradient"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), TENSORS)
def test_wrong_tensors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"pycdgkd.{message}")):
        call()


@pytest.mark.parametrize(("call", "message"), OPTIONS)
def test_wrong_options(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"pycdgkd.{message}")):
        call()


def test_sources_that_require_grad_are_fine_without_gradients() -> None:
    source = S.clone().requires_grad_()
    with torch.no_grad():
        assert multi_source_kl(t=(source,)).item() == 0.0


def test_unused_labels_are_checked_too() -> None:
    """A wrong label is an error even where its class could not have mattered."""
    with pytest.raises(RuntimeError, match=r"labels\[0\]"):
        prototype_loss(y=Y - 1, class_counts=torch.zeros(3))
