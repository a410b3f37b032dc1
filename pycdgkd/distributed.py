"""The teacher's loss over several processes: rates, means and divisors of the global batch.

Losses whose weights depend on a sum over the batch (Eq. 6) are not the mean of the ranks' losses:
each rank alone may even favour another modality. So the sums are reduced, the loss is formed from
them on every rank, and each rank's gradient is scaled so that the mean over ranks is the gradient
of the global batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops import arithmetic_dtype, attach_teacher_gradient


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def all_reduce_class_means(
    means: list[Tensor], counts: Tensor, group: Any
) -> tuple[list[Tensor], Tensor]:
    """Global class means and counts from each rank's; differentiable in the means."""
    sums = [mean * counts[:, None] for mean in means]
    total = counts.clone()
    dist.all_reduce(total, group=group)
    divisor = total.clamp(min=1)[:, None]
    return [_SumOverRanks.apply(local, group) / divisor for local in sums], total


def _combine(
    statistics: Tensor, modalities: int, proto_weight: float
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(loss, cross_entropy, prototype_losses, rates, weights) of the summed statistics (Eqs. 4-6).

    statistics: sum of the cross-entropies, rows in it, rows in the prototype losses, then the M
    sums of prototype losses and the M rates.
    """
    cross_entropy = statistics[0] / statistics[1]
    prototype_losses = statistics[3 : 3 + modalities] / statistics[2]
    rates = statistics[3 + modalities :]
    weights = torch.ops.pycdgkd.modality_weights(rates)
    terms = torch.where(weights == 0, 0.0, weights * prototype_losses)
    ce_term = (1 - proto_weight) * cross_entropy
    if proto_weight == 1:  # then it takes no part, even where it is infinite
        ce_term = torch.where(cross_entropy.isinf(), 0.0, ce_term)
    loss = ce_term + proto_weight * terms.sum()
    return (loss, cross_entropy, prototype_losses, rates, weights), weights


def global_teacher_loss(arguments: tuple[Any, ...], group: Any) -> tuple[Tensor, ...]:
    """``teacher_loss`` over the global batch; arguments as the op takes them."""
    logits, features, prototypes, labels, counts, proto_weight, scale, ignore_index, *_ = arguments
    # What the prototypes' gradient needs leaves the coefficients open until the sums are in.
    options = (proto_weight, scale, ignore_index, True, True)
    with torch.no_grad():
        *_, saved = torch.ops.pycdgkd.teacher_loss(
            logits, features, prototypes, labels, counts, *options
        )
    modalities = len(features)
    sums, coefficients = saved[0].split([3 + 2 * modalities, 1 + modalities])
    dist.all_reduce(sums, group=group)
    outputs, weights = _combine(sums, modalities, proto_weight)
    # All parts want the global divisor, times the world size that the mean over ranks will take
    # away again.
    world = dist.get_world_size(group)
    coefficients[0] = world * (1 - proto_weight) / sums[1].clamp(min=1)
    coefficients[1:] = world * proto_weight * 2 * scale * weights / sums[2].clamp(min=1)
    dtype = arithmetic_dtype(logits.dtype)
    results = tuple(output.to(dtype) for output in outputs)
    return attach_teacher_gradient(
        (*results, saved), logits, features, prototypes, labels, counts, *options
    )[:5]
