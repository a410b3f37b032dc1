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
    may_take_over,
    new,
    register,
    register_differentiable,
    require_saved,
    stays_on_device,
    wants_graph,
)


def _scaled_gradient_fake(grad_loss: Tensor, unit_grad: Tensor, logits: Tensor) -> Tensor:
    return new(logits, *logits.shape, dtype=logits.dtype)


def _unit_grad_fake(logits: Tensor, need_grad: bool) -> Tensor:
    # csrc/cuda_distillation_ops.cpp: a device writes a bfloat16 gradient as it is.
    rounded = stays_on_device(logits) and logits.dtype == torch.bfloat16
    shape = logits.shape if need_grad else (0,)
    return new(logits, *shape, dtype=torch.bfloat16 if rounded else None)


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
    return new(logits, *rows), _unit_grad_fake(logits, need_grad)


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
        if may_take_over(grad_loss, unit_grad, logits):
            kernel(_scale_unit_grad, unit_grad, grad_loss)
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


_scale_unit_grad = torch.ops.pycdgkd.scale_unit_grad_.default
torch.library.register_fake("pycdgkd::scale_unit_grad_", lambda *_: None)
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
    return new(logits), new(logits), new(logits), _unit_grad_fake(logits, need_grad)


def distillation_loss(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """The op with its gradient; arguments as in csrc/schemas.cpp."""
    return _with_unit_grad(_distillation_loss, _distillation_loss_backward, logits, options)


_distillation_loss = torch.ops.pycdgkd.distillation_loss.default
_distillation_loss_backward = torch.ops.pycdgkd.distillation_loss_backward.default
register_differentiable("distillation_loss", _distillation_loss_fake, distillation_loss)
register("distillation_loss_backward", _scaled_gradient_fake)
