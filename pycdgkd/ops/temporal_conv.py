"""``temporal_conv``: TSception's temporal convolution, shapes and gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .registration import backward_kernel, kernel, new, register, register_differentiable


def _temporal_conv_fake(
    eeg: Tensor, weight: Tensor, bias: Tensor, pool: int, slope: float
) -> Tensor:
    batch, chans, times = eeg.shape
    kernels, length = weight.shape
    steps = (times - length + 1) // pool
    return new(eeg, batch, kernels, chans, steps, dtype=eeg.dtype)


class _TemporalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eeg: Tensor, weight: Tensor, bias: Tensor, pool: int, slope: float
    ) -> Tensor:
        ctx.options = pool, slope
        ctx.save_for_backward(eeg, weight, bias)
        return cast(Tensor, kernel(_temporal_conv, eeg, weight, bias, pool, slope))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (*ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[0])
        grads = backward_kernel(_temporal_conv_backward, grad, *arguments)
        wanted = zip(grads, ctx.needs_input_grad[:3], strict=True)
        return *(grad if needed else None for grad, needed in wanted), None, None


def temporal_conv(eeg: Tensor, weight: Tensor, bias: Tensor, pool: int, slope: float) -> Tensor:
    """The op with its gradient, which computes the activations anew instead of keeping them.

    ``eeg`` (B, C, L), ``weight`` (T, k), ``bias`` (T,) -> (B, T, C, M), M = (L - k + 1) // pool:
    convolution along time, LeakyReLU of that slope, mean of ``pool`` neighbours.
    """
    return cast(Tensor, _TemporalConv.apply(eeg, weight, bias, pool, slope))


def _temporal_conv_backward_fake(
    grad: Tensor,
    eeg: Tensor,
    weight: Tensor,
    bias: Tensor,
    pool: int,
    slope: float,
    need_eeg: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        new(eeg, *(eeg.shape if need_eeg else (0,)), dtype=eeg.dtype),
        new(weight, *weight.shape, dtype=weight.dtype),
        new(bias, *bias.shape, dtype=bias.dtype),
    )


_temporal_conv = torch.ops.pycdgkd.temporal_conv.default
_temporal_conv_backward = torch.ops.pycdgkd.temporal_conv_backward.default
register_differentiable("temporal_conv", _temporal_conv_fake, temporal_conv)
register("temporal_conv_backward", _temporal_conv_backward_fake)
