"""``teacher_loss``: shapes and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .registration import (
    SMALL_FEATURES,
    SMALL_MODALITIES,
    SMALL_ROWS,
    arithmetic_dtype,
    backward_kernel,
    can_look,
    centred_size,
    few_classes,
    is_final,
    kernel,
    may_take_over,
    new,
    register,
    register_differentiable,
    require_saved,
    stays_on_device,
    wants_graph,
)


def _makes_gradients(logits: Tensor, features: Sequence[Tensor]) -> bool:
    """Whether the forward pass of such a batch leaves the gradients for grad_loss = 1."""
    rows, classes = logits.shape
    dtype, count = arithmetic_dtype(logits.dtype), len(features)
    small = few_classes(logits, classes) and sum(z.numel() for z in features) <= SMALL_FEATURES
    if stays_on_device(logits):
        small = small and count <= SMALL_MODALITIES and count * rows <= SMALL_ROWS
    return small and all(z.dtype == dtype for z in features)


def _teacher_loss_fake(
    logits: Tensor,
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    labels: Tensor,
    class_counts: Tensor | None,
    proto_weight: float,
    scale: float,
    ignore_index: int,
    need_grad: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    rows, classes = logits.shape
    count, few = len(features), few_classes(logits, classes)
    saved = []
    if need_grad and not need_prototypes and _makes_gradients(logits, features):
        saved = [new(logits, *logits.shape), *(new(z, *z.shape) for z in features)]
    elif need_grad:
        saved = [
            new(logits, 4 + 3 * count, dtype=torch.float64),
            new(logits, sum(centred_size(z.shape[1], classes) for z in features)),
            new(logits, 1 + count if few else 1, rows, classes),
        ]
    return (
        new(logits),
        new(logits),
        new(logits, count),
        new(logits, count),
        new(logits, count),
        saved,
    )


class _TeacherLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        outputs: Any,
        modalities: int,
        options: tuple[Any, ...],
        labels: Tensor,
        class_counts: Tensor | None,
        logits: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        saved = outputs[5]
        ctx.options, ctx.modalities, ctx.prototypes = options, modalities, len(rest) - modalities
        ctx.wanted = ctx.needs_input_grad[6:]
        ctx.save_for_backward(labels, class_counts, logits, *rest[:modalities], *saved)
        return cast(Tensor, outputs[0])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        _, scale, ignore_index, need_grad, need_prototypes = ctx.options
        wanted, given = ctx.wanted[: ctx.modalities], any(ctx.wanted[ctx.modalities :])
        require_saved(need_grad and need_prototypes >= given, "teacher_loss")
        idle = [False] * ctx.modalities
        labels, class_counts, logits, *rest = ctx.saved_tensors
        features, saved = rest[: ctx.modalities], rest[ctx.modalities :]
        if saved[0].dim() == 2:  # gradients made at once
            if may_take_over(grad_loss, saved[0], logits):
                asked = [grad for grad, want in zip(saved, (True, *wanted), strict=True) if want]
                kernel(_scale_unit_grads, asked, grad_loss)
                return *[None] * 5, *saved, *[None] * ctx.prototypes
            if is_final(grad_loss, saved[0], logits):
                return *[None] * 5, *saved, *[None] * ctx.prototypes
        elif can_look(grad_loss):
            idle = [factor == 0 for factor in saved[0][-ctx.modalities :].tolist()]
        needed = [int(want and not still) for want, still in zip(wanted, idle, strict=True)]
        grad_logits, grad_features, grad_prototypes = backward_kernel(
            _teacher_loss_backward, grad_loss, saved, logits, features, labels, class_counts, scale,
            ignore_index, needed, need_prototypes,
        )  # fmt: skip
        for m, z in enumerate(features):
            if not needed[m]:
                # The fastest modality's loss weighs 0: a zero that takes no memory, as of sum().
                grad_features[m] = z.new_zeros(()).expand(z.shape) if wanted[m] else None
        if not need_prototypes:
            grad_prototypes = [None] * ctx.prototypes
        return *[None] * 5, grad_logits, *grad_features, *grad_prototypes


def teacher_loss(
    logits: Tensor,
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    labels: Tensor,
    class_counts: Tensor | None,
    *options: Any,
) -> tuple[Any, ...]:
    """The op with its gradient; arguments as in csrc/schemas.cpp."""
    arguments = (logits, features, prototypes, labels, class_counts, *options)
    return attach_teacher_gradient(kernel(_teacher_loss, *arguments), *arguments)


def attach_teacher_gradient(
    outputs: tuple[Any, ...],
    logits: Tensor,
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    labels: Tensor,
    class_counts: Tensor | None,
    *options: Any,
) -> tuple[Any, ...]:
    """Make the op's outputs the result of a differentiable call with these arguments."""
    if not wants_graph(logits, *features, *prototypes):
        return outputs
    loss = _TeacherLoss.apply(
        outputs, len(features), options, labels, class_counts, logits, *features, *prototypes
    )
    return loss, *outputs[1:]


def _teacher_loss_backward_fake(
    grad_loss: Tensor,
    saved: Sequence[Tensor],
    logits: Tensor,
    features: Sequence[Tensor],
    labels: Tensor,
    class_counts: Tensor | None,
    scale: float,
    ignore_index: int,
    need_features: Sequence[int],
    need_prototypes: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    shapes = [(logits.shape[1], z.shape[1]) if need_prototypes else (0,) for z in features]
    wanted = zip(features, need_features, strict=True)
    return (
        new(logits, *logits.shape, dtype=logits.dtype),
        [new(z, *(z.shape if need else (0,)), dtype=z.dtype) for z, need in wanted],
        [new(logits, *shape) for shape in shapes],
    )


_teacher_loss = torch.ops.pycdgkd.teacher_loss.default
_teacher_loss_backward = torch.ops.pycdgkd.teacher_loss_backward.default
_scale_unit_grads = torch.ops.pycdgkd.scale_unit_grads_.default
torch.library.register_fake("pycdgkd::scale_unit_grads_", lambda *_: None)
register_differentiable("teacher_loss", _teacher_loss_fake, teacher_loss)
register("teacher_loss_backward", _teacher_loss_backward_fake)
