"""The peers: the same losses as an expert writes them with torch's own operations.

The same detach semantics as ours: lambda and the prototypes carry no gradient, sources are fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def teacher_loss(
    logits: Tensor, features: Sequence[Tensor], labels: Tensor, *, alpha: float = 0.5
) -> Tensor:
    """Eq. 5 with batch means: one matrix product a modality, no host synchronisation."""
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    counts = one_hot.sum(0).clamp(min=1)
    losses, rates = [], []
    for z in features:
        c = (one_hot.T @ z.detach()) / counts[:, None]
        log_prob = torch.addmm(-c.square().sum(1), z, c.T, alpha=2).log_softmax(1)
        true_log_prob = log_prob.gather(1, labels[:, None])[:, 0]
        losses.append(-true_log_prob.mean())
        rates.append(true_log_prob.detach().exp().sum())
    rate = torch.stack(rates)
    weight = ((rate.max() - rate) / rate).clamp(0, 1)
    proto = (weight * torch.stack(losses)).sum()
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * proto


def distillation_loss(
    logits: Tensor,
    sources: Sequence[Tensor],
    labels: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 2.0,
) -> Tensor:
    """Eq. 9, reverse KL, mean over all sources: one kl_div a source."""
    log_p = (logits / temperature).log_softmax(1)
    kl = torch.zeros(())
    for source in sources:
        log_q = (source / temperature).log_softmax(1)
        kl = kl + F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (1 - beta) * F.cross_entropy(logits, labels) + beta * kl / len(sources)
