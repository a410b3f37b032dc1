"""Liger-Kernel's losses as peers of ours, where it is installed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pycdgkd.bench.contestants import Contestant, differentiable
from pycdgkd.bench.inputs import KD_WEIGHT, TEMPERATURE, Inputs


def liger(inputs: Inputs) -> list[Contestant]:
    """Its form of the case's loss: none where it is not installed or has none."""
    try:
        import liger_kernel.transformers as kernels
    except ImportError:
        return []
    if inputs.case.op == "distillation_loss":
        return [differentiable("Liger", lambda: _distillation(inputs, kernels.LigerJSD), inputs)]
    if inputs.case.op == "prototype_loss":
        linear = kernels.LigerFusedLinearCrossEntropyLoss()
        return [differentiable("Liger", lambda: _prototype(inputs, linear), inputs)]
    return []


def _distillation(i: Inputs, divergence: type[torch.nn.Module]) -> Tensor:
    """Its KL looped over the active sources. Its JSD with beta 1 is reverse KL, with beta 0 forward
    KL; its KLDiv has no gradient for the first distribution. Both take log-probabilities. (Its
    cross-entropy overwrites the logits, which other contestants still need.)
    """
    loss = divergence(beta=1.0 if i.case.direction == "reverse" else 0.0)
    log_p = (i.logits / TEMPERATURE).log_softmax(1)
    total = (1 - KD_WEIGHT) * F.cross_entropy(i.logits, i.labels)
    for weight, source in zip(i.weights, i.sources, strict=True):
        if weight:
            log_q = (source / TEMPERATURE).log_softmax(1)
            total = total + KD_WEIGHT * weight * loss(log_p, log_q)
    return total


def _prototype(i: Inputs, linear: torch.nn.Module) -> Tensor:
    """Eq. 3 as a linear layer with cross-entropy: weight 2 c, bias -|c|^2."""
    c = i.prototypes[0]
    loss: Tensor = linear(2 * c, i.features[0], i.labels, -c.square().sum(1))
    return loss
