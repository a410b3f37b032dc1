"""Class means, prototype losses, rates and weights: shapes and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .registration import (
    REDUCTIONS,
    STATISTICS,
    backward_kernel,
    centred_size,
    few_classes,
    is_final,
    kernel,
    new,
    register,
    register_differentiable,
    require_saved,
    stays_on_device,
    wants_graph,
)

# ---- class_prototypes ----------------------------------------------------------------------------


def _class_prototypes_fake(
    features: Sequence[Tensor], labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[list[Tensor], Tensor]:
    prototypes = [new(z, num_classes, z.shape[1]) for z in features]
    return prototypes, new(features[0], num_classes, dtype=torch.int64)


def _class_prototypes_setup(ctx: Any, inputs: Any, output: Any) -> None:
    features, labels, _, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(labels, output[1], *features)


def _class_prototypes_backward(ctx: Any, grad_prototypes: list[Tensor | None], _: Any) -> Any:
    labels, counts, *features = ctx.saved_tensors
    grads = [
        new(z, len(counts), z.shape[1]).zero_() if grad is None else grad
        for grad, z in zip(grad_prototypes, features, strict=True)
    ]
    grad_features = torch.ops.pycdgkd.class_prototypes_backward(
        grads, features, labels, counts, ctx.ignore_index
    )
    return grad_features, None, None, None


def _class_prototypes_backward_fake(
    grad_prototypes: Any, features: Sequence[Tensor], labels: Any, counts: Any, ignore_index: int
) -> list[Tensor]:
    return [new(z, *z.shape, dtype=z.dtype) for z in features]


register(
    "class_prototypes",
    _class_prototypes_fake,
    _class_prototypes_backward,
    _class_prototypes_setup,
)
register("class_prototypes_backward", _class_prototypes_backward_fake)


# ---- prototype_loss ------------------------------------------------------------------------------


def _prototype_loss_fake(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    class_counts: Tensor | None,
    scale: float,
    reduction: int,
    ignore_index: int,
    need_features: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    rows, classes = features.shape[0], prototypes.shape[0]
    by_row = reduction == REDUCTIONS["none"]
    loss = new(features, rows) if by_row else new(features)
    saved = []
    if need_features or need_prototypes:
        if few_classes(features, classes):
            saved = [new(features, rows, classes)]
            if stays_on_device(features):
                saved.append(new(features, STATISTICS, dtype=torch.float64))
                saved.append(new(features, centred_size(features.shape[1], classes)))
        elif not by_row:
            wanted = ((features, need_features), (prototypes, need_prototypes))
            saved = [new(x, *x.shape) if need else new(x, 0) for x, need in wanted]
    return loss, new(features, rows), saved


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        outputs: Any,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        class_counts: Tensor | None,
        *options: Any,
    ) -> Tensor:
        loss, _, saved = outputs
        ctx.options = options
        ctx.save_for_backward(features, prototypes, labels, class_counts, *saved)
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        features, prototypes, labels, class_counts, *saved = ctx.saved_tensors
        *options, need_features, need_prototypes = ctx.options
        _, want_features, want_prototypes, *_ = ctx.needs_input_grad
        enough = need_features >= want_features and need_prototypes >= want_prototypes
        require_saved(enough, "prototype_loss")
        if len(saved) == 2 and not need_prototypes and is_final(grad_loss, saved[0], features):
            return None, saved[0], *[None] * 8
        grad_features, grad_prototypes = backward_kernel(
            _prototype_loss_backward, grad_loss, saved, features, prototypes,
            labels, class_counts, *options, need_features, need_prototypes,
        )  # fmt: skip
        return (
            None,
            grad_features if need_features else None,
            grad_prototypes if need_prototypes else None,
            *[None] * 7,
        )


def prototype_loss(
    features: Tensor, prototypes: Tensor, labels: Tensor, *options: Any
) -> tuple[Any, ...]:
    """The op with its gradient; arguments as in csrc/schemas.cpp."""
    outputs: tuple[Any, ...] = kernel(_prototype_loss, features, prototypes, labels, *options)
    if not wants_graph(features, prototypes):
        return outputs
    loss = _PrototypeLoss.apply(outputs, features, prototypes, labels, *options)
    return loss, *outputs[1:]


def _prototype_loss_backward_fake(
    grad_loss: Tensor,
    saved: Sequence[Tensor],
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    class_counts: Tensor | None,
    scale: float,
    reduction: int,
    ignore_index: int,
    need_features: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    return (
        new(features, *(features.shape if need_features else (0,)), dtype=features.dtype),
        new(prototypes, *(prototypes.shape if need_prototypes else (0,))),
    )


_prototype_loss = torch.ops.pycdgkd.prototype_loss.default
_prototype_loss_backward = torch.ops.pycdgkd.prototype_loss_backward.default
register_differentiable("prototype_loss", _prototype_loss_fake, prototype_loss)
register("prototype_loss_backward", _prototype_loss_backward_fake)


# ---- convergence_rates, modality_weights (no gradient by definition) -----------------------------


def _convergence_rates_fake(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    labels: Tensor,
    class_counts: Tensor | None,
    scale: float,
    ignore_index: int,
) -> Tensor:
    return new(features[0], len(features))


def _modality_weights_fake(convergence_rates: Tensor) -> Tensor:
    return new(convergence_rates, *convergence_rates.shape)


register("convergence_rates", _convergence_rates_fake)
register("modality_weights", _modality_weights_fake)
