"""OGM-GE: Peng et al., CVPR 2022.

"Balanced Multimodal Learning via On-the-fly Gradient Modulation". A modality's scores are the
softmax of the logits that the fusion head gives it alone. With s_m = sum over the batch of the true
class's score and rho_m = s_m / s_other (their Eqs. 8-9),

    k_m = 1 - tanh(alpha rho_m) if rho_m > 1, else 1                              (their Eq. 10)

slows the modality ahead: the gradient g of its encoder becomes k_m g + h, where the noise h (the
generalisation enhancement) has mean 0 and the standard deviation of g. Theirs is SGD; the shared
schedule's Adam divides by the running size of gradients, so that a k that did not change would not
slow anything: here its changes act, and the noise, which is the larger beside a small k g.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.models.networks import MultimodalNet, MultimodalOutput, Network
from pycdgkd.training.environment import derive_seed
from pycdgkd.training.inference import evaluating, forward
from pycdgkd.training.objective import Objective
from pycdgkd.training.recordings import Batch


@dataclass(frozen=True)
class OGMGESettings:
    """alpha: strength; the paper tunes it for each data set, from 0.1 to 0.8, here the middle.

    first_epoch, last_epoch: in which gradients are modulated, from 0; 0 and 50 of 100 in the
    released code. noise: the generalisation enhancement.
    """

    alpha: float = 0.5
    first_epoch: int = 0
    last_epoch: int = 50
    noise: bool = True

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        if not 0.0 <= self.alpha < math.inf:
            raise InputError(
                f"ogm-ge: alpha: expected a finite number of at least 0; got {self.alpha}; "
                "remedy: 0.1 to 0.8, as published"
            )
        if not 0 <= self.first_epoch <= self.last_epoch:
            raise InputError(
                "ogm-ge: first_epoch and last_epoch: expected 0 <= first <= last; got "
                f"{self.first_epoch} and {self.last_epoch}; remedy: 0 and 50, as released"
            )


def alone_scores(head: nn.Module, video: Tensor, eeg: Tensor, labels: Tensor) -> Tensor:
    """s_m: sums (2,) of the true class's probability with one modality alone, without gradient.

    The paper splits a linear head's product and bias between the modalities. Ours has a hidden
    layer and no such split; the other modality's features are set to 0 instead, without dropout.
    """
    alone = [torch.cat([video, torch.zeros_like(eeg)], 1)]
    alone += [torch.cat([torch.zeros_like(video), eeg], 1)]
    with evaluating(head):
        scores = [head(features).softmax(1).gather(1, labels.unsqueeze(1)) for features in alone]
    return torch.cat(scores, 1).sum(0)


def coefficients(scores: Tensor, alpha: float) -> Tensor:
    """k_m (2,) for the sums s_m (2,)."""
    ratios = scores / scores.flip(0)
    return torch.where(ratios > 1, 1 - torch.tanh(alpha * ratios), 1.0)


def modulate(gradient: Tensor, coefficient: Tensor, generator: torch.Generator | None) -> Tensor:
    """k g + h, with h ~ N(0, (std(g) + 1e-8)^2) from the generator; without one, k g."""
    changed = gradient * coefficient
    if generator is None:
        return changed
    noise = torch.randn(
        gradient.shape, generator=generator, device=gradient.device, dtype=gradient.dtype
    )
    return changed + noise * (gradient.std(correction=0) + 1e-8)


class OGMGE(Objective):
    """Cross-entropy with modulated gradients.

    The released code modulates convolutions alone. In a transformer these are only the patch
    embeddings, in TSception nearly everything, so that one modality would escape: here all
    parameters of a branch are modulated.
    """

    columns = (
        *("loss", "cross_entropy", "rate_video", "rate_eeg"),
        *("coefficient_video", "coefficient_eeg"),
    )

    def __init__(self, settings: OGMGESettings, device: torch.device, seed: int) -> None:
        self.settings = settings
        self.generator = torch.Generator(device).manual_seed(seed)
        self.epoch = -1
        self.scores = torch.zeros(2, device=device)

    def begin_epoch(self, net: Network) -> None:
        """Count epochs, from 0."""
        del net
        self.epoch += 1

    def begin_step(self) -> None:
        """The scores are sums over all parts of a batch."""
        self.scores = torch.zeros_like(self.scores)

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the batch; takes note of the scores."""
        del positions
        assert isinstance(net, MultimodalNet), "modulation needs both modalities"
        output = forward(net, batch)
        assert isinstance(output, MultimodalOutput), "modulation needs both modalities"
        loss = nn.functional.cross_entropy(output.logits, batch.labels)
        scores = alone_scores(net.head, output.video.detach(), output.eeg.detach(), batch.labels)
        self.scores = self.scores + scores
        k = coefficients(scores, self.settings.alpha)
        return loss, torch.cat([loss.detach().expand(2), scores / len(batch.labels), k])

    def adjust_gradients(self, net: Network) -> None:
        """Modulate the gradients of both branches in the epochs meant for it."""
        settings = self.settings
        if not settings.first_epoch <= self.epoch <= settings.last_epoch:
            return
        assert isinstance(net, MultimodalNet), "modulation needs both modalities"
        generator = self.generator if settings.noise else None
        k = coefficients(self.scores, settings.alpha)
        for branch, coefficient in zip((net.visual, net.eeg), k, strict=True):
            for parameter in branch.parameters():
                if parameter.grad is not None:
                    parameter.grad = modulate(parameter.grad, coefficient, generator)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and state of the noise's generator."""
        return {"epoch": self.epoch, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self.epoch = state["epoch"]
        self.generator.set_state(state["generator"])


def train(bench: Bench, settings: OGMGESettings) -> Classifier:
    """The shared fusion network by modulated gradients."""
    net = bench.multimodal_net()
    seed = derive_seed(bench.config.seed, "ogm-ge", "noise")
    objective = OGMGE(settings, bench.data.device, seed)
    return bench.classifier(net, bench.fit("fusion", net, objective, seed_role="teacher"))


METHOD = Method("ogm-ge", "OGM-GE", ("video", "eeg"), OGMGESettings(), train)
