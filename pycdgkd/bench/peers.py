"""The same quantities as others write them: eager torch, torch's fused op, other packages.

Every peer starts from the same tensors and carries no gradient where ours carries none (lambda,
prototypes, sources), except T3, which is named so. Each is in the fastest form known to us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import KD_WEIGHT, PROTO_WEIGHT, TEMPERATURE

# ---- teacher_loss --------------------------------------------------------------------------------


def _teacher(logits: Tensor, labels: Tensor, proto: Tensor) -> Tensor:
    return (1 - PROTO_WEIGHT) * F.cross_entropy(logits, labels) + PROTO_WEIGHT * proto


def _python_lambda(losses: list[Tensor], rates: list[Tensor]) -> Tensor:
    """Eq. 6 with host synchronisation, as papers' code does it."""
    values = [float(rate) for rate in rates]
    top = max(values)
    total = losses[0].new_zeros(())
    for loss, rate in zip(losses, values, strict=True):
        if rate < top:
            total = total + min((top - rate) / rate, 1.0) * loss
    return total


def t1(logits: Tensor, features: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Eqs. 1-6 word by word."""
    losses, rates = [], []
    for z in features:
        fixed = z.detach()
        c = torch.stack([fixed[labels == k].mean(0) for k in range(logits.shape[1])])
        prob = (-(z[:, None, :] - c[None]).square().sum(-1)).softmax(1)
        true_prob = prob.gather(1, labels[:, None])[:, 0]
        losses.append(-true_prob.log().mean())
        rates.append(true_prob.detach().sum())
    return _teacher(logits, labels, _python_lambda(losses, rates))


def _class_means(z: Tensor, one_hot: Tensor, counts: Tensor) -> Tensor:
    return (one_hot.T @ z) / counts[:, None]


def t2(logits: Tensor, features: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Distances by torch.cdist."""
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    counts = one_hot.sum(0).clamp(min=1)
    losses, rates = [], []
    for z in features:
        c = _class_means(z.detach(), one_hot, counts)
        row_loss = F.cross_entropy(-torch.cdist(z, c).square(), labels, reduction="none")
        losses.append(row_loss.mean())
        rates.append((-row_loss.detach()).exp().sum())
    return _teacher(logits, labels, _python_lambda(losses, rates))


def _linear_form(z: Tensor, c: Tensor) -> Tensor:
    """2 z c^T - |c|^2: Eq. 2's logits but for a constant a row."""
    return torch.addmm(-c.square().sum(1), z, c.T, alpha=2)


def _expert(
    logits: Tensor, features: Sequence[Tensor], labels: Tensor, through_means: bool
) -> Tensor:
    """Eqs. 1-6 with the fewest and fastest operations: F.linear is half an addmm with alpha=2."""
    M, (N, K) = len(features), logits.shape
    one_hot = (labels == torch.arange(K, device=labels.device)[:, None]).to(logits.dtype)
    averaging = one_hot / one_hot.sum(1, keepdim=True).clamp_(min=1)  # (K, N)
    parts = []
    for z in features:
        c = averaging @ (z if through_means else z.detach())
        parts.append(F.linear(z, 2 * c, -c.square().sum(1)))
    row_loss = F.cross_entropy(torch.cat(parts), labels.repeat(M), reduction="none").view(M, N)
    rate = row_loss.detach().neg().exp().sum(1)
    weight = ((rate.max() - rate) / rate).clamp_(0, 1)
    return _teacher(logits, labels, torch.dot(weight, row_loss.mean(1)))


def t3(logits: Tensor, features: Sequence[Tensor], labels: Tensor) -> Tensor:
    """T4 with the gradient through the class means."""
    return _expert(logits, features, labels, True)


def t4(logits: Tensor, features: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The expert's form: no host synchronisation, nothing of size N K D."""
    return _expert(logits, features, labels, False)


# ---- prototypes ----------------------------------------------------------------------------------


def literal(z: Tensor, c: Tensor, labels: Tensor) -> Tensor:
    """Eqs. 2-3 word by word."""
    prob = (-(z[:, None, :] - c[None]).square().sum(-1)).softmax(1)
    return -prob.gather(1, labels[:, None]).log().mean()


def cdist(z: Tensor, c: Tensor, labels: Tensor) -> Tensor:
    """Distances by torch.cdist."""
    return F.cross_entropy(-torch.cdist(z, c).square(), labels)


def addmm(z: Tensor, c: Tensor, labels: Tensor) -> Tensor:
    """One matrix product; the squared norm of the row cancels."""
    return F.cross_entropy(_linear_form(z, c), labels)


def lce(z: Tensor, c: Tensor, labels: Tensor, options: Any = None) -> Tensor:
    """Eqs. 2-3 are a linear layer with bias -|c|^2 and a cross-entropy."""
    loss: Tensor = F.linear_cross_entropy(
        z, 2 * c, labels, linear_bias=-c.square().sum(1), options=options
    )
    return loss


def class_means_one_hot(z: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Eq. 1 by a matrix product."""
    one_hot = F.one_hot(labels, num_classes).to(z.dtype)
    return _class_means(z, one_hot, one_hot.sum(0).clamp(min=1))


def class_means_index_add(z: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Eq. 1 by scattered additions."""
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1).to(z.dtype)
    return z.new_zeros(num_classes, z.shape[1]).index_add(0, labels, z) / counts[:, None]


def rates_addmm(features: Sequence[Tensor], prototypes: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Eq. 4 without autograd."""
    with torch.no_grad():
        rates = [
            (-F.cross_entropy(_linear_form(z, c), labels, reduction="none")).exp().sum()
            for z, c in zip(features, prototypes, strict=True)
        ]
        return torch.stack(rates)


# ---- distillation --------------------------------------------------------------------------------

Divergence = Callable[[Tensor, Sequence[Tensor], Sequence[float], bool], Tensor]


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q), mean over rows."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def d1(logits: Tensor, sources: Sequence[Tensor], weights: Sequence[float], fwd: bool) -> Tensor:
    """One kl_div a source."""
    log_p = (logits / TEMPERATURE).log_softmax(1)
    kl = logits.new_zeros(())
    for weight, source in zip(weights, sources, strict=True):
        log_q = (source / TEMPERATURE).log_softmax(1)
        kl = kl + weight * (_kl(log_p, log_q) if fwd else _kl(log_q, log_p))
    return kl


def d2(logits: Tensor, sources: Sequence[Tensor], weights: Sequence[float], fwd: bool) -> Tensor:
    """One kl_div a source, the student's softmax formed again each time."""
    kl = logits.new_zeros(())
    for weight, source in zip(weights, sources, strict=True):
        log_p, log_q = (logits / TEMPERATURE).log_softmax(1), (source / TEMPERATURE).log_softmax(1)
        kl = kl + weight * (_kl(log_p, log_q) if fwd else _kl(log_q, log_p))
    return kl


def d3(logits: Tensor, stacked: Tensor, weights: Tensor, fwd: bool) -> Tensor:
    """All sources as one tensor (S, N, K), weights on the device."""
    log_p = (logits / TEMPERATURE).log_softmax(1)
    log_q = (stacked / TEMPERATURE).log_softmax(2)
    ratio = (log_q.exp() * (log_q - log_p)) if fwd else (log_p.exp() * (log_p - log_q))
    return weights @ ratio.sum((1, 2)) / len(logits)


def d4(logits: Tensor, sources: Sequence[Tensor], weights: Sequence[float], fwd: bool) -> Tensor:
    """Reverse KL by one source with the mean logits; forward KL by the mean probabilities."""
    student = logits / TEMPERATURE
    log_p = student.log_softmax(1)
    if fwd:
        log_qs = [(source / TEMPERATURE).log_softmax(1) for source in sources]
        mean, entropy = torch.zeros_like(logits), logits.new_zeros(())
        for weight, log_q in zip(weights, log_qs, strict=True):
            q = log_q.exp()
            entropy = entropy + weight * torch.dot(q.flatten(), log_q.flatten())
            mean = torch.add(mean, q, alpha=weight)
        return (entropy - (mean * log_p).sum()) / len(logits)
    mean, lse = torch.zeros_like(logits), logits.new_zeros(())
    for weight, source in zip(weights, sources, strict=True):
        mean = torch.add(mean, source, alpha=weight / TEMPERATURE)
        lse = lse + weight * (source / TEMPERATURE).logsumexp(1).sum()
    return ((log_p.exp() * (log_p - mean)).sum() + lse) / len(logits)


def with_cross_entropy(kl: Tensor, logits: Tensor, labels: Tensor, factor: float) -> Tensor:
    """Eq. 9."""
    return (1 - KD_WEIGHT) * F.cross_entropy(logits, labels) + KD_WEIGHT * factor * kl
