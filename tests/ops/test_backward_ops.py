"""The backward ops read what a forward op left by pointer: they must refuse anything else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

N, D, K, M = 5, 4, 3, 2
MANY = 70  # classes: no residual is kept, but the gradients for grad_loss = 1
ops = torch.ops.pycdgkd
Z, C, S = torch.randn(N, D), torch.randn(K, D), torch.randn(N, K)
Y, COUNTS = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([2, 2, 1])
CS = torch.randn(MANY, D)
ONE = torch.tensor(1.0)
UNIT = [torch.randn(N, D), torch.randn(MANY, D)]
STATISTICS = torch.ones(4 + 3 * M, dtype=torch.float64)
CENTRED = torch.zeros(M * ((1 + K) * 16 + 16))  # rows of whole vectors: csrc/kernels.h
AT_ONCE = [S, Z, Z]  # gradients that a teacher_loss of few rows makes in its forward pass
LEFT = "expected what the forward op left: "


def prototype_backward(**changed: Any) -> Any:
    arguments = {
        "grad_loss": ONE,
        "saved": [torch.randn(N, K)],
        "features": Z,
        "prototypes": C,
        "labels": Y,
        "class_counts": None,
        "scale": 1.0,
        "reduction": 1,
        "ignore_index": -100,
        "need_features": True,
        "need_prototypes": True,
    }
    return ops.prototype_loss_backward(**(arguments | changed))


def many_backward(**changed: Any) -> Any:
    return prototype_backward(**({"saved": UNIT, "prototypes": CS} | changed))


def teacher_backward(**changed: Any) -> Any:
    arguments = {
        "grad_loss": ONE,
        "saved": [STATISTICS, CENTRED, torch.randn(1 + M, N, K)],
        "logits": S,
        "features": [Z, Z],
        "labels": Y,
        "class_counts": None,
        "scale": 1.0,
        "ignore_index": -100,
        "need_features": [1] * M,
        "need_prototypes": True,
    }
    return ops.teacher_loss_backward(**(arguments | changed))


def saved_teacher(index: int, wrong: torch.Tensor) -> dict[str, Any]:
    saved = [STATISTICS, CENTRED, torch.randn(1 + M, N, K)]
    return {"saved": [*saved[:index], wrong, *saved[index + 1 :]]}


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
    for ours, unit in zip(many_backward(grad_loss=-2 * ONE), UNIT, strict=True):
        assert torch.equal(ours, -2 * unit)
    rows = many_backward(saved=[], grad_loss=torch.ones(N), reduction=0)
    assert [g.shape for g in rows] == [(N, D), (MANY, D)]
    assert teacher_backward()[0].shape == (N, K)
    grads = teacher_backward(
        saved=AT_ONCE, need_prototypes=False, need_features=[0, 1], grad_loss=-2 * ONE
    )
    assert torch.equal(grads[0], -2 * S)
    assert [g.shape for g in grads[1]] == [(0,), (N, D)]
    assert torch.equal(grads[1][1], -2 * Z)
    assert means_backward()[0].shape == (N, D)
    for op in ("multi_source_kl_backward", "distillation_loss_backward"):
        unit = torch.randn(N, K)
        assert torch.equal(scaled_backward(op, unit_grad=unit, grad_loss=-2 * ONE), -2 * unit)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"saved": [torch.randn(0)]}, f"saved[0]: {LEFT}float32 of shape (5, 3), got float32"),
        ({"saved": [torch.randn(K, N).t()]}, f"saved[0]: {LEFT}float32 of shape (5, 3)"),
        ({"saved": [torch.randn(N, K).double()]}, f"saved[0]: {LEFT}float32 of shape (5, 3)"),
        ({"saved": []}, f"saved: {LEFT}1 tensors, got 0"),
        ({"saved": UNIT}, f"saved: {LEFT}1 tensors, got 2"),
        ({"features": Z[:2], "labels": Y[:2]}, f"saved[0]: {LEFT}float32 of shape (2, 3)"),
        ({"features": Z[:2]}, "labels: expected shape (2,)"),
        ({"features": Z[0]}, "features: expected shape (N, D)"),
        ({"prototypes": C[0]}, "prototypes: expected shape (K, 4)"),
        ({"prototypes": C[:, :2]}, "prototypes: expected shape (K, 4)"),
        ({"labels": Y + 1}, "labels[2]: expected a class from 0 to 2"),
        ({"grad_loss": torch.ones(3)}, "grad_loss: expected a scalar or shape (5,)"),
        ({"grad_loss": torch.ones(5, 1)}, "grad_loss: expected a scalar or shape (5,)"),
        ({"grad_loss": ONE.int()}, "grad_loss: expected float32, float64"),
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
        ({"saved": []}, f"saved: {LEFT}2 tensors, got 0"),
        ({"saved": UNIT, "grad_loss": torch.ones(N)}, f"saved: {LEFT}0 tensors, got 2"),
        ({"saved": [UNIT[0][:2], UNIT[1]]}, f"saved[0]: {LEFT}float32 of shape (5, 4)"),
        ({"saved": [UNIT[0].double(), UNIT[1]]}, f"saved[0]: {LEFT}float32 of shape (5, 4)"),
        ({"saved": [UNIT[0], torch.randn(D, MANY).t()]}, f"saved[1]: {LEFT}float32 of shape (70"),
        ({"saved": [UNIT[0], torch.randn(0)]}, f"saved[1]: {LEFT}float32 of shape (70, 4)"),
        ({"features": Z[:2], "labels": Y[:2]}, f"saved[0]: {LEFT}float32 of shape (2, 4)"),
        ({"prototypes": CS[:65]}, f"saved[1]: {LEFT}float32 of shape (65, 4)"),
        ({"class_counts": COUNTS}, "class_counts: expected int64 of shape (70,)"),
    ],
)
def test_prototype_loss_backward_of_many_classes(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(
        RuntimeError, match=re.escape(f"pycdgkd.prototype_loss_backward: {message}")
    ):
        many_backward(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (saved_teacher(2, torch.randn(M, N, K)), f"saved[2]: {LEFT}float32 of shape (3, 5, 3)"),
        (saved_teacher(2, torch.randn(0)), f"saved[2]: {LEFT}float32 of shape (3, 5, 3)"),
        (saved_teacher(0, STATISTICS[:3]), f"saved[0]: {LEFT}float64 of shape (10)"),
        (saved_teacher(0, STATISTICS.float()), f"saved[0]: {LEFT}float64 of shape (10)"),
        (saved_teacher(1, CENTRED[1:]), f"saved[1]: {LEFT}float32 of shape (160)"),
        (saved_teacher(1, CENTRED.double()), f"saved[1]: {LEFT}float32 of shape (160)"),
        ({"saved": []}, f"saved: {LEFT}3 tensors, got 0"),
        ({"saved": AT_ONCE}, "saved[0]: expected what the forward op left"),
        ({"saved": AT_ONCE[:2], "need_prototypes": False}, f"saved: {LEFT}3 tensors, got 2"),
        (
            {"saved": [S, Z, Z[:2]], "need_prototypes": False},
            f"saved[2]: {LEFT}float32 of shape (5, 4)",
        ),
        (
            {"saved": [S[:2], Z, Z], "need_prototypes": False},
            f"saved[0]: {LEFT}float32 of shape (5, 3)",
        ),
        ({"need_features": [1]}, "need_features: expected one flag a modality, got 1"),
        ({"grad_loss": torch.ones(5)}, "grad_loss: expected a scalar"),
        ({"features": [Z], "need_features": [1]}, f"saved[0]: {LEFT}float64 of shape (7)"),
        ({"features": []}, "features: expected at least one modality, got none"),
        ({"features": [Z, Z[:3]]}, "features[1]: expected shape (5, D)"),
        ({"features": [Z, torch.randn(N, 17)]}, f"saved[1]: {LEFT}float32 of shape (224)"),
        ({"logits": S[0]}, "logits: expected shape (N, K)"),
    ],
)
def test_teacher_loss_backward(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"pycdgkd.teacher_loss_backward: {message}")):
        teacher_backward(**changed)


def test_teacher_loss_backward_of_many_classes() -> None:
    """It reads the labels again, and so checks them again."""
    wide = {
        "logits": torch.randn(N, MANY),
        "saved": [
            STATISTICS,
            torch.zeros(M * ((1 + MANY) * 16 + 80)),
            torch.randn(1, N, MANY),
        ],
    }
    parts = [*wide["saved"][:2], torch.randn(1 + M, N, MANY)]
    assert teacher_backward(**wide)[0].shape == (N, MANY)
    for changed, message in (
        ({"labels": Y[:2]}, "labels: expected shape (5,)"),
        ({"labels": Y - 1}, "labels[0]: expected a class from 0 to 69"),
        ({"class_counts": COUNTS}, "class_counts: expected int64 of shape (70,)"),
        ({"saved": parts}, f"saved[2]: {LEFT}float32 of shape (1, 5, 70)"),
    ):
        expected = re.escape(f"pycdgkd.teacher_loss_backward: {message}")
        with pytest.raises(RuntimeError, match=expected):
            teacher_backward(**(wide | changed))


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
        lambda x: ops.prototype_loss(x, C, Y, None, 1.0, 1, -100, False, False)[0],
        lambda x: ops.prototype_loss(x, C, Y, None, 1.0, 1, -100, False, True)[0],
        lambda x: ops.teacher_loss(S, [x], [C], Y, None, 0.5, 1.0, -100, False, False)[0],
        lambda x: ops.multi_source_kl(x, [Z], None, 1.0, 0, 1, False)[0],
        lambda x: ops.distillation_loss(x, [Z], Y, None, 0.5, 1.0, 0, 0.0, -100, False)[0],
    ],
    ids=[
        "prototype_loss",
        "prototype_loss-half",
        "teacher_loss",
        "multi_source_kl",
        "distillation_loss",
    ],
)
def test_forward_without_need_grad_has_no_backward(
    loss: Callable[[torch.Tensor], torch.Tensor], request: pytest.FixtureRequest
) -> None:
    op = request.node.callspec.id.partition("-")[0]
    with pytest.raises(RuntimeError, match=rf"pycdgkd\.{op}: called without need_grad"):
        loss(Z.clone().requires_grad_()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_may_lie_anywhere(dtype: torch.dtype) -> None:
    """A hook may hand back a part of a larger buffer."""
    logits = torch.randn(4, 8, dtype=dtype)
    left = ops.multi_source_kl(logits, [torch.randn(4, 8)], None, 1.0, 0, 1, True)[1]
    moved = left.new_empty(33)[1:].view(4, 8).copy_(left)
    for factor in (ONE, torch.tensor(2.0)):
        found, expected = (ops.multi_source_kl_backward(factor, x, logits) for x in (moved, left))
        assert torch.equal(found, expected)
