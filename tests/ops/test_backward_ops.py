"""The backward ops read what a forward op left by pointer: they must refuse anything else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

N, D, K, M = 5, 4, 3, 2
ops = torch.ops.pycdgkd
Z, C, S = torch.randn(N, D), torch.randn(K, D), torch.randn(N, K)
Y, COUNTS = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([2, 2, 1])
ONE, COEFFICIENT = torch.tensor(1.0), torch.tensor(2.0, dtype=torch.float64)
LEFT = "expected what the forward op left: "


def prototype_backward(**changed: Any) -> Any:
    arguments = {
        "grad_loss": ONE,
        "coefficient": COEFFICIENT,
        "residual": torch.randn(N, K),
        "features": Z,
        "prototypes": C,
        "class_counts": None,
        "need_features": True,
        "need_prototypes": True,
    }
    return ops.prototype_loss_backward(**(arguments | changed))


def teacher_backward(**changed: Any) -> Any:
    arguments = {
        "grad_loss": ONE,
        "coefficients": torch.ones(1 + M, dtype=torch.float64),
        "residuals": torch.randn(M, N, K),
        "unit_grad_logits": torch.randn(N, K),
        "logits": S,
        "features": [Z, Z],
        "prototypes": [C, C],
        "class_counts": None,
        "need_prototypes": True,
    }
    return ops.teacher_loss_backward(**(arguments | changed))


def means_backward(**changed: Any) -> Any:
    arguments = {
        "grad_prototypes": [C],
        "features": [Z],
        "labels": Y,
        "counts": COUNTS,
        "ignore_index": -100,
    }
    return ops.class_prototypes_backward(**(arguments | changed))


def scaled_backward(op: str, **changed: Any) -> Any:
    arguments = {"grad_loss": ONE, "unit_grad": torch.randn(N, K), "logits": S}
    return getattr(ops, op)(**(arguments | changed))


def test_the_arguments_below_are_right_but_for_one() -> None:
    assert [g.shape for g in prototype_backward()] == [(N, D), (K, D)]
    assert teacher_backward()[0].shape == (N, K)
    assert means_backward()[0].shape == (N, D)
    for op in ("multi_source_kl_backward", "distillation_loss_backward"):
        unit = torch.randn(N, K)
        assert torch.equal(scaled_backward(op, unit_grad=unit, grad_loss=-2 * ONE), -2 * unit)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"residual": torch.randn(0)}, f"residual: {LEFT}float32 of shape (5, 3), got float32"),
        ({"residual": torch.randn(K, N).t()}, f"residual: {LEFT}float32 of shape (5, 3)"),
        ({"residual": torch.randn(N, K).double()}, f"residual: {LEFT}float32 of shape (5, 3)"),
        ({"features": Z[:2]}, f"residual: {LEFT}float32 of shape (2, 3)"),
        ({"features": Z[0]}, "features: expected shape (N, D)"),
        ({"prototypes": C[0]}, "prototypes: expected shape (K, D)"),
        ({"prototypes": C[:, :2]}, "prototypes: expected shape (K, 4)"),
        ({"coefficient": ONE}, f"coefficient: {LEFT}float64 of shape ()"),
        ({"grad_loss": torch.ones(3)}, "grad_loss: expected a scalar or shape (5,)"),
        ({"grad_loss": torch.ones(5, 1)}, "grad_loss: expected a scalar or shape (5,)"),
        ({"class_counts": COUNTS[:2]}, "class_counts: expected int64 of shape (3,)"),
    ],
)
def test_prototype_loss_backward(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(
        RuntimeError, match=re.escape(f"pycdgkd.prototype_loss_backward: {message}")
    ):
        prototype_backward(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"residuals": torch.randn(1, N, K)}, f"residuals: {LEFT}float32 of shape (2, 5, 3)"),
        ({"residuals": torch.randn(0)}, f"residuals: {LEFT}float32 of shape (2, 5, 3)"),
        ({"coefficients": torch.ones(2).double()}, f"coefficients: {LEFT}float64 of shape (3)"),
        ({"unit_grad_logits": torch.randn(0)}, f"unit_grad: {LEFT}float32 of shape (5, 3)"),
        ({"grad_loss": torch.ones(5)}, "grad_loss: expected a scalar"),
        ({"features": [Z]}, "prototypes: expected as many tensors as features (1), got 2"),
        ({"features": [Z, Z[:3]]}, "features[1]: expected shape (5, D)"),
        ({"prototypes": [C, C[:2]]}, "prototypes[1]: expected shape (3, 4)"),
        ({"logits": S[0]}, "logits: expected shape (N, K)"),
    ],
)
def test_teacher_loss_backward(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"pycdgkd.teacher_loss_backward: {message}")):
        teacher_backward(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"counts": torch.ones(3)}, f"counts: {LEFT}int64 of shape (3)"),
        ({"counts": COUNTS[:2]}, "labels[2]: expected a class from 0 to 1"),
        ({"grad_prototypes": [C[:2]]}, "grad_prototypes[0]: expected shape (3, 4)"),
        ({"grad_prototypes": []}, "grad_prototypes: expected as many tensors as features (1)"),
        ({"features": []}, "features: expected at least one modality"),
        ({"features": [Z[0]]}, "features[0]: expected shape (N, D)"),
        ({"labels": Y[:2]}, "labels: expected shape (5,)"),
    ],
)
def test_class_prototypes_backward(changed: dict[str, Any], message: str) -> None:
    expected = re.escape(f"pycdgkd.class_prototypes_backward: {message}")
    with pytest.raises(RuntimeError, match=expected):
        means_backward(**changed)


@pytest.mark.parametrize("op", ["multi_source_kl_backward", "distillation_loss_backward"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unit_grad": torch.randn(0)}, f"unit_grad: {LEFT}float32 of shape (5, 3)"),
        ({"unit_grad": torch.randn(K, N).t()}, f"unit_grad: {LEFT}float32 of shape (5, 3)"),
        ({"unit_grad": torch.randn(N, K).half()}, f"unit_grad: {LEFT}float32 of shape (5, 3)"),
        ({"logits": S.double()}, f"unit_grad: {LEFT}float64 of shape (5, 3)"),
        ({"logits": S[0]}, "logits: expected shape (N, K)"),
        ({"grad_loss": torch.ones(2)}, "grad_loss: expected a scalar or shape (5,)"),
        ({"grad_loss": torch.ones(5).int()}, "grad_loss: expected float32, float64"),
    ],
)
def test_scaled_gradients(op: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"pycdgkd.{op}: {message}")):
        scaled_backward(op, **changed)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: ops.prototype_loss(x, C, Y, None, 1.0, 1, -100, False)[0],
        lambda x: ops.teacher_loss(S, [x], [C], Y, None, 0.5, 1.0, -100, False)[0],
        lambda x: ops.multi_source_kl(x, [Z], None, 1.0, 0, 1, False)[0],
        lambda x: ops.distillation_loss(x, [Z], Y, None, 0.5, 1.0, 0, 0.0, -100, False)[0],
    ],
    ids=["prototype_loss", "teacher_loss", "multi_source_kl", "distillation_loss"],
)
def test_forward_without_need_grad_has_no_backward(
    loss: Callable[[torch.Tensor], torch.Tensor], request: pytest.FixtureRequest
) -> None:
    op = request.node.callspec.id
    with pytest.raises(RuntimeError, match=rf"pycdgkd\.{op}: called with need_grad=False"):
        loss(Z.clone().requires_grad_()).backward()
