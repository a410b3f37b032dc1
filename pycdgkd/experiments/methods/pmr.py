"""PMR: Fan et al., "PMR: Prototypical Modal Rebalance for Multimodal Learning", CVPR 2023.

For modality m with features z_i and class prototypes c_k,

    p_i^m(k) = softmax_k(-||z_i - c_k||),    L_m = -mean_i log p_i^m(y_i),    r_m = sum_i p_i^m(y_i)

and the modality of the lower r is the slower learner: the loss is CE + alpha L_slower. Unlike the
paper's teacher (Eqs. 2-6) the distance has its square root, cross-entropy keeps its full weight,
and as released the slower modality's weight is constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.models.networks import MultimodalNet, MultimodalOutput, Network
from pycdgkd.training.config import TeacherConfig
from pycdgkd.training.inference import forward
from pycdgkd.training.recordings import Batch
from pycdgkd.training.teacher import Rebalancing

WEIGHTINGS = ("constant", "ratio")


@dataclass(frozen=True)
class PMRSettings:
    """alpha: weight of the slower modality's prototype loss; 1 in the released code.

    momentum: share of the old prototypes kept at each epoch; 0.2 in the released code.
    weighting: "constant", as released, in every epoch (there 0 to 100), or "ratio":
    alpha clip(r_faster / r_slower - 1, 0, 1), the paper's formula as it is recalled. The paper's
    entropy regulariser of the first epochs, which the released code lacks as well, is left out.
    """

    alpha: float = 1.0
    momentum: float = 0.2
    weighting: str = "constant"

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        if not 0.0 <= self.alpha < math.inf:
            raise InputError(
                f"pmr: alpha: expected a finite number of at least 0; got {self.alpha}; "
                "remedy: 1, as released"
            )
        if not 0.0 <= self.momentum < 1.0:
            raise InputError(
                f"pmr: momentum: expected a number from 0 to below 1; got {self.momentum}; "
                "remedy: 0.2, as released"
            )
        if self.weighting not in WEIGHTINGS:
            raise InputError(
                f"pmr: weighting: expected one of {', '.join(WEIGHTINGS)}; got '{self.weighting}'; "
                "remedy: constant, as released"
            )


class PMRLoss(NamedTuple):
    """The loss and its parts; only ``loss`` carries a gradient."""

    loss: Tensor  # scalar
    cross_entropy: Tensor  # scalar
    prototype_losses: Tensor  # (M,)
    rates: Tensor  # (M,) means of p_i(y_i)
    weights: Tensor  # (M,) of the prototype losses


def log_closeness(features: Tensor, prototypes: Tensor, counts: Tensor) -> Tensor:
    """log p(k), (B, K): log-softmax over negative Euclidean distances (B, D) to (K, D).

    Classes of count 0 take no part. On a prototype, where the distance has no derivative, its
    gradient is 0.
    """
    # The norm of differences: torch gives it that gradient, and no digits cancel.
    distances = torch.linalg.vector_norm(features.unsqueeze(1) - prototypes, dim=2)
    log_p: Tensor = (-distances).masked_fill(counts == 0, -math.inf).log_softmax(1)
    return log_p


def slower_weights(rates: Tensor, weighting: str) -> Tensor:
    """Weights (2,) of the prototype losses for rates (2,): the slower modality's alone is not 0.

    Where none is slower both are.
    """
    others = rates.flip(0)
    slower = (rates < others).to(rates.dtype)
    if weighting == "constant":
        return slower
    return slower * (others / rates.clamp(min=1e-8) - 1.0).clamp(0.0, 1.0)


def pmr_loss(
    logits: Tensor,
    features: Sequence[Tensor],
    labels: Tensor,
    prototypes: Sequence[Tensor],
    counts: Tensor,
    *,
    alpha: float,
    weighting: str = "constant",
) -> PMRLoss:
    """CE + alpha sum_m w_m L_m, the weights without gradient.

    Args:
        logits: (B, K).
        features: of both modalities, (B, D) each.
        labels: (B,).
        prototypes: of both modalities, (K, D) each.
        counts: (K,) training samples of each class.
        alpha: see ``PMRSettings``.
        weighting: see ``PMRSettings``.
    """
    cross_entropy = F.cross_entropy(logits, labels)
    pairs = zip(features, prototypes, strict=True)
    closeness = [log_closeness(z, c, counts) for z, c in pairs]
    losses = torch.stack([F.nll_loss(log_p, labels) for log_p in closeness])
    true = torch.stack([log_p.gather(1, labels.unsqueeze(1)) for log_p in closeness])
    rates = true.detach().exp().mean((1, 2))
    weights = slower_weights(rates, weighting)
    loss = cross_entropy + alpha * (weights * losses).sum()
    return PMRLoss(loss, cross_entropy.detach(), losses.detach(), rates, weights)


class PMR(Rebalancing):
    """The loss of PMR on prototypes that the paper's teacher has as well.

    They are class means of the train split, taken before every epoch and smoothed.
    """

    def __init__(self, settings: PMRSettings, net: MultimodalNet, bench: Bench) -> None:
        config = TeacherConfig(momentum=settings.momentum)
        size = bench.config.optim.part_size
        super().__init__(config, net, bench.data, bench.split.train, size)
        self.settings = settings

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the batch."""
        del positions
        output = forward(net, batch)
        assert isinstance(output, MultimodalOutput), "rebalancing needs both modalities"
        banks = self._banks()
        result = pmr_loss(
            output.logits.to(self.place),
            [output.video.to(self.place), output.eeg.to(self.place)],
            batch.labels.to(self.place),
            [bank.prototypes for bank in banks],
            banks[0].counts,
            alpha=self.settings.alpha,
            weighting=self.settings.weighting,
        )
        scalars = torch.stack([result.loss.detach(), result.cross_entropy])
        pieces = (result.prototype_losses, result.rates, self.settings.alpha * result.weights)
        return result.loss, torch.cat([scalars, *pieces])


def train(bench: Bench, settings: PMRSettings) -> Classifier:
    """The shared fusion network by PMR's loss."""
    net = bench.multimodal_net()
    objective = PMR(settings, net, bench)
    return bench.classifier(net, bench.fit("fusion", net, objective, seed_role="teacher"))


METHOD = Method("pmr", "PMR", ("video", "eeg"), PMRSettings(), train)
