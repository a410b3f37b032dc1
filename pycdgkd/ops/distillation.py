"""``multi_source_kl`` and ``distillation_loss``: shapes and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .registration import (
    REDUCTIONS,
    backward_kernel,
    is_final,
    kernel,
    new,
    register,
    register_differentiable,
    require_saved,
    wants_graph,
)


def _scaled_gradient_fake(grad_loss: Tensor, unit_grad: Tensor, logits: Tensor) -> Tensor:
    return new(logits, *logits.shape, dtype=logits.dtype)


def _multi_source_kl_fake(
    logits: Tensor,
    sources: Sequence[Tensor],
    source_weights: Tensor | None,
    temperature: float,
    direction: int,
    reduction: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    rows = [logits.shape[0]] if reduction == REDUCTIONS["none"] else []
    return new(logits, *rows), new(logits, *logits.shape) if need_grad else new(logits, 0)


class _WithUnitGrad(torch.autograd.Function):
    """A loss whose gradient of the logits, for grad_loss = 1, the forward pass has left."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, outputs: tuple[Tensor, ...], backward: Any, need_grad: bool
    ) -> Tensor:
        ctx.backward_op, ctx.need_grad = backward, need_grad
        ctx.save_for_backward(logits, outputs[-1])
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        name = ctx.backward_op.name().removeprefix("pycdgkd::").removesuffix("_backward")
        require_saved(ctx.need_grad, name)
        logits, unit_grad = ctx.saved_tensors
        if is_final(grad_loss, unit_grad, logits):
            return unit_grad, None, None, None
        return backward_kernel(ctx.backward_op, grad_loss, unit_grad, logits), None, None, None


def _with_unit_grad(
    op: Any, backward: Any, logits: Tensor, options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = kernel(op, logits, *options)
    if not wants_graph(logits):
        return outputs
    return _WithUnitGrad.apply(logits, outputs, backward, options[-1]), *outputs[1:]


def multi_source_kl(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """The op with its gradient; arguments as in csrc/schemas.cpp."""
    return _with_unit_grad(_multi_source_kl, _multi_source_kl_backward, logits, options)


_multi_source_kl = torch.ops.pycdgkd.multi_source_kl.default
_multi_source_kl_backward = torch.ops.pycdgkd.multi_source_kl_backward.default
register_differentiable("multi_source_kl", _multi_source_kl_fake, multi_source_kl)
register("multi_source_kl_backward", _scaled_gradient_fake)


def _distillation_loss_fake(
    logits: Tensor,
    sources: Sequence[Tensor],
    labels: Tensor,
    source_weights: Tensor | None,
    kd_weight: float,
    temperature: float,
    direction: int,
    temperature_power: float,
    ignore_index: int,
    need_grad: bool,
) -> tuple[Tensor, ...]:
    unit_grad = new(logits, *logits.shape) if need_grad else new(logits, 0)
    return new(logits), new(logits), new(logits), unit_grad


def distillation_loss(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """The op with its gradient; arguments as in csrc/schemas.cpp."""
    return _with_unit_grad(_distillation_loss, _distillation_loss_backward, logits, options)


_distillation_loss = torch.ops.pycdgkd.distillation_loss.default
_distillation_loss_backward = torch.ops.pycdgkd.distillation_loss_backward.default
register_differentiable("distillation_loss", _distillation_loss_fake, distillation_loss)
register("distillation_loss_backward", _scaled_gradient_fake)
