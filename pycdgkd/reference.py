"""The method's equations in plain torch: the tests' oracle and the readable statement of the paper.

"A Cross-Modal Densely Guided Knowledge Distillation Based on Modality Rebalancing Strategy for
Enhanced Unimodal Emotion Recognition" (IJCAI 2025), Eqs. 1-6 and 9. Written for clarity: nothing
here is fast or safe at the extremes. Give float64 tensors and let autograd differentiate; the
fused ops in ``pycdgkd.losses`` are compared with the result.

Letters: N rows, D feature width, K classes, S sources, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def class_prototypes(
    features: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Eq. 1: (K, D) means of the features of each class, and (K,) counts; zero row if absent."""
    valid = labels != ignore_index
    one_hot = features.new_zeros(len(labels), num_classes)
    one_hot[valid, labels[valid].long()] = 1.0  # (N, K)
    counts = one_hot.sum(0)
    return one_hot.T @ features / counts.clamp(min=1.0)[:, None], counts.long()


def class_log_probabilities(
    features: Tensor, prototypes: Tensor, *, class_counts: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Eq. 2, logarithm: log softmax_k(-scale * |z_i - c_k|^2), (N, K); absent classes get -inf."""
    distance = (features[:, None, :] - prototypes[None, :, :]).square().sum(-1)
    logits = -scale * distance
    if class_counts is not None:
        logits = logits.masked_fill(class_counts == 0, -torch.inf)
    return logits.log_softmax(-1)


def prototype_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    class_counts: Tensor | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Eq. 3 and the true class's probability: (scalar or (N,), (N,)).

    A row whose own class is absent (count 0) has no prototype to be near to: it is left out like
    an ignored row.
    """
    valid = labels != ignore_index
    if class_counts is not None:
        valid = valid & (class_counts > 0)[torch.where(valid, labels.long(), 0)]
    log_prob = class_log_probabilities(features, prototypes, class_counts=class_counts, scale=scale)
    target = torch.where(valid, labels.long(), 0)
    true_log_prob = log_prob.gather(1, target[:, None])[:, 0]
    row_loss = torch.where(valid, -true_log_prob, 0.0)
    true_prob = torch.where(valid, true_log_prob.exp(), 0.0).detach()
    if reduction == "none":
        return row_loss, true_prob
    return (row_loss.sum() if reduction == "sum" else row_loss.sum() / valid.sum()), true_prob


def convergence_rate(features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Eq. 4: the sum over the batch of the true class's probability."""
    return prototype_loss(features, prototypes, labels)[1].sum()


def modality_weights(convergence_rates: Tensor) -> Tensor:
    """Eq. 6, for any number of modalities: clip((max r - r_m) / r_m, 0, 1), no gradient.

    For two modalities this is clip(r_e/r_v - 1, 0, 1) for the slower one and 0 for the faster.
    A modality with rate 0 beside a faster one gets 1; if all rates are 0, all get 0.
    """
    rates = convergence_rates.detach()
    gap = rates.max() - rates
    return torch.where(gap > 0, (gap / rates).clamp(0.0, 1.0), 0.0)


def teacher_loss(
    logits: Tensor,
    features: Sequence[Tensor],
    labels: Tensor,
    prototypes: Sequence[Tensor] | None = None,
    *,
    class_counts: Tensor | None = None,
    proto_weight: float = 0.5,
    scale: float = 1.0,
    detach_prototypes: bool = True,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eq. 5: (loss, cross_entropy, prototype_losses (M,), rates (M,), weights (M,))."""
    if prototypes is None:
        means = [
            class_prototypes(z, labels, logits.shape[1], ignore_index=ignore_index)
            for z in features
        ]
        prototypes, class_counts = [mean for mean, _ in means], means[0][1]
    if detach_prototypes:
        prototypes = [c.detach() for c in prototypes]
    terms = [
        prototype_loss(
            z, c, labels, class_counts=class_counts, scale=scale, ignore_index=ignore_index
        )
        for z, c in zip(features, prototypes, strict=True)
    ]
    prototype_losses = torch.stack([loss for loss, _ in terms])
    rates = torch.stack([true_prob.sum() for _, true_prob in terms])
    weights = modality_weights(rates)
    cross_entropy = torch.nn.functional.cross_entropy(
        logits, labels.long(), ignore_index=ignore_index
    )
    # A modality of weight 0 takes no part, even where its own loss is NaN for want of rows.
    weighted = torch.where(weights == 0, 0.0, weights * prototype_losses)
    loss = (1 - proto_weight) * cross_entropy + proto_weight * weighted.sum()
    return loss, cross_entropy, prototype_losses, rates, weights


def multi_source_kl(
    logits: Tensor,
    sources: Sequence[Tensor] | Tensor,
    *,
    source_weights: Sequence[float] | Tensor | None = None,
    temperature: float = 1.0,
    direction: str = "reverse",
    reduction: str = "mean",
) -> Tensor:
    """Eq. 9, second term: sum_j w_j KL(student || source_j); "forward": the other way round."""
    if source_weights is None:
        source_weights = [1.0 / len(sources)] * len(sources)
    log_p = (logits / temperature).log_softmax(-1)
    row_loss = torch.zeros_like(logits[:, 0])
    for weight, source in zip(source_weights, sources, strict=True):
        log_q = (source.detach() / temperature).log_softmax(-1)
        first, second = (log_p, log_q) if direction == "reverse" else (log_q, log_p)
        row_loss = row_loss + weight * (first.exp() * (first - second)).sum(-1)
    if reduction == "none":
        return row_loss
    return row_loss.sum() if reduction == "sum" else row_loss.mean()


def distillation_loss(
    logits: Tensor,
    sources: Sequence[Tensor] | Tensor,
    labels: Tensor,
    *,
    kd_weight: float = 0.5,
    temperature: float = 2.0,
    direction: str = "reverse",
    temperature_power: float = 0,
    source_weights: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 9: (loss, cross_entropy, kl); ignored rows take part in neither term."""
    valid = labels != ignore_index
    cross_entropy = torch.nn.functional.cross_entropy(logits[valid], labels[valid].long())
    kl = multi_source_kl(
        logits[valid],
        [source[valid] for source in sources],
        source_weights=source_weights,
        temperature=temperature,
        direction=direction,
    )
    factor = kd_weight * temperature**temperature_power
    return (1 - kd_weight) * cross_entropy + factor * kl, cross_entropy, kl
