"""AMBOKD: online distillation among three peers, balanced by how each of them fares.

Li et al., "Adaptive Modality Balanced Online Knowledge Distillation for Brain-Eye-Computer based
Dim Object Detection", arXiv 2407.01894, 2024. Peers m (EEG, face video, attention fusion of both)
learn together, each from the other two n:

    L_m = CE_m + sum_n a_mn T^2 KL(p_n || p_m),    a_mn = clip(CE_m / CE_n, 0.1, 10)

so that a peer ahead is listened to and one behind is not; p are softmaxes at T, those of n fixed.
From the second epoch on, a peer that learns more slowly than the others has a higher learning rate:

    R_m = clip((L0_m - CE_m) / L0_m, 0.1, 1)
    lr_m = lr clip((mean_n R_n / R_m)^3, 0.1, 10)

with CE_m of the step at hand and L0_m its mean over the first epoch. (In the released code the
visual peer's mean has the fusion's R twice.) KL here is a mean over samples; the released code's is
one over samples and classes, 1/K of that. The paper evaluates the fusion; the tables are about face
video, so the visual peer is what training leaves.

The authors' lr is 1e-4, so that none of their rates is above 1e-3. Where all methods share a higher
lr the same bound holds, since the rule alone would leave it: ten times the nano preset's 5e-4 keeps
a PVT at chance. At 1e-4, the paper preset's, the bound changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycdgkd import losses
from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.models.networks import EEGNet, Network, VisualNet, VisualOutput
from pycdgkd.training.environment import loss_device
from pycdgkd.training.objective import Objective
from pycdgkd.training.recordings import Batch

PEERS = ("eeg", "visual", "fusion")
_TINY = 1e-12  # instead of a cross-entropy of 0 in a denominator


@dataclass(frozen=True)
class AMBOKDSettings:
    """As in the released code.

    temperature: T. limit: a_mn and the rates' factors lie between 1 / limit and limit. slowest: the
    lower limit of R. power: of the rates' factors, 0 for equal rates. highest: learning rate above
    which no factor raises a peer's; inf for the rule without it.
    """

    temperature: float = 4.0
    limit: float = 10.0
    slowest: float = 0.1
    power: float = 3.0
    highest: float = 1e-3

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"ambokd.temperature must be above 0; got {self.temperature}")
        if not 1 <= self.limit < math.inf:
            raise InputError(f"ambokd.limit must be a finite number from 1; got {self.limit}")
        if not 0 < self.slowest <= 1:
            raise InputError(f"ambokd.slowest must be above 0 and at most 1; got {self.slowest}")
        if not (math.isfinite(self.power) and self.power >= 0):
            raise InputError(f"ambokd.power must be a finite number from 0; got {self.power}")
        if not self.highest > 0:
            raise InputError(f"ambokd.highest must be above 0; got {self.highest}")


def guidance(cross_entropies: Tensor, limit: float) -> Tensor:
    """a_mn (M, M) of the peers' cross-entropies (M,): row m learns from column n; no gradient."""
    fixed = cross_entropies.detach()
    return (fixed[:, None] / fixed.clamp_min(_TINY)).clamp(1 / limit, limit)


def peer_losses(
    logits: Sequence[Tensor], labels: Tensor, settings: AMBOKDSettings
) -> tuple[Tensor, Tensor]:
    """L_m (M,) and the detached CE_m (M,) of M peers' logits (B, K).

    L_m has a gradient in the logits of peer m alone.
    """
    cross_entropies = torch.stack([F.cross_entropy(own, labels) for own in logits])
    weights = guidance(cross_entropies, settings.limit)
    lessons = []
    for learner, own in enumerate(logits):
        others = [n for n in range(len(logits)) if n != learner]
        kl = losses.multi_source_kl(
            own,
            [logits[n].detach() for n in others],
            source_weights=weights[learner, others],
            temperature=settings.temperature,
            direction="forward",
        )
        lessons.append(settings.temperature**2 * kl)
    return cross_entropies + torch.stack(lessons), cross_entropies.detach()


def rate_factors(first: Tensor, present: Tensor, settings: AMBOKDSettings, lr: float) -> Tensor:
    """lr_m / lr (M,) from the peers' first and present cross-entropies (M,)."""
    most = min(settings.limit, max(1.0, settings.highest / lr))
    progress = ((first - present) / first.clamp_min(_TINY)).clamp(settings.slowest, 1.0)
    others = (progress.sum() - progress) / (len(progress) - 1)
    return (others / progress).pow(settings.power).clamp(1 / settings.limit, most)


class AttentionFusion(nn.Module):
    """Two features as two tokens that attend to each other, side by side into one linear layer.

    As in the released code, the attention has neither an output projection nor a residual path.
    """

    def __init__(
        self, widths: Sequence[int], num_classes: int, *, token: int = 64, heads: int = 2
    ) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.ModuleList(nn.Linear(width, token) for width in widths)
        self.qkv = nn.Linear(token, 3 * token)
        self.dropout = 0.5
        self.classify = nn.Linear(token * len(widths), num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One (B, width) of each modality -> logits (B, K)."""
        pairs = zip(self.embed, features, strict=True)
        tokens = torch.stack([embed(feature) for embed, feature in pairs], dim=1)
        batch, count, width = tokens.shape
        heads = (batch, count, 3, self.heads, width // self.heads)
        query, key, value = self.qkv(tokens).view(heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        logits: Tensor = self.classify(mixed.transpose(1, 2).reshape(batch, count * width))
        return logits


class PeerNet(Network):
    """The three peers; used as a network it is the visual one."""

    inputs = ("video", "frame_mask")

    def __init__(self, eeg: EEGNet, visual: VisualNet, num_classes: int) -> None:
        super().__init__()
        self.eeg, self.visual = eeg, visual
        widths = (eeg.eeg.project.out_features, visual.visual.project.out_features)
        self.fusion = AttentionFusion(widths, num_classes)

    def forward(self, video: Tensor, frame_mask: Tensor | None = None) -> VisualOutput:
        """The visual peer's output."""
        output: VisualOutput = self.visual(video, frame_mask)
        return output

    def peers(
        self, video: Tensor, frame_mask: Tensor | None, eeg: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, K) of each of ``PEERS``; the fusion's have a gradient in all encoders."""
        seen, heard = self(video, frame_mask), self.eeg(eeg)
        return heard.logits, seen.logits, self.fusion([heard.eeg, seen.video])


class MutualLearning(Objective):
    """sum_m L_m, with a learning rate for each peer.

    The authors have an Adam for each peer and clear all gradients before any backward pass: every
    weight gets the sum of what the losses give it. Adam treats each weight by itself, so one Adam
    with three rates takes the same steps on the summed loss.
    """

    columns = ("loss", "cross_entropy", "cross_entropy_eeg", "cross_entropy_fusion")

    def __init__(self, settings: AMBOKDSettings, device: torch.device, lr: float) -> None:
        """device: the networks'. lr: what the rates are factors of."""
        self.settings, self.lr = settings, lr
        self.place = loss_device(device)
        self.epoch = 0
        # Sums of each peer's cross-entropy over the samples of the first epoch and of this step.
        self.first = self.present = torch.zeros(len(PEERS), device=self.place)
        self.first_count = self.present_count = 0

    def parameter_groups(self, net: Network) -> list[list[nn.Parameter]]:
        """One for each of ``PEERS``."""
        return [list(net.get_submodule(peer).parameters()) for peer in PEERS]

    def begin_epoch(self, net: Network) -> None:
        """Count the epochs."""
        del net
        self.epoch += 1

    def begin_step(self) -> None:
        """Forget the step before."""
        self.present, self.present_count = torch.zeros_like(self.first), 0

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss; "cross_entropy" is the visual peer's."""
        del positions
        assert isinstance(net, PeerNet), "peers learn from one another"
        logits = net.peers(batch.video, batch.frame_mask, batch.eeg)
        each, cross_entropies = peer_losses(
            [own.to(self.place) for own in logits], batch.labels.to(self.place), self.settings
        )
        count = len(batch.labels)
        self.present = self.present + count * cross_entropies
        self.present_count += count
        if self.epoch == 1:
            self.first = self.first + count * cross_entropies
            self.first_count += count
        loss = each.sum()
        eeg, visual, fusion = cross_entropies
        return loss, torch.stack([loss.detach(), visual, eeg, fusion])

    def scales(self) -> Sequence[float]:
        """lr_m / lr of this step, for each of ``PEERS``; 1 in the first epoch."""
        if self.epoch == 1:
            return (1.0,) * len(PEERS)
        first, present = self.first / self.first_count, self.present / self.present_count
        factors: list[float] = rate_factors(first, present, self.settings, self.lr).tolist()
        return factors

    def state_dict(self) -> dict[str, Any]:
        """What the first epoch left; a step begins anew."""
        return {"epoch": self.epoch, "first": self.first, "first_count": self.first_count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self.epoch, self.first_count = state["epoch"], state["first_count"]
        self.first = state["first"].to(self.place)


def peer_net(bench: Bench) -> PeerNet:
    """The EEG network and the student that all methods share, and a fusion."""
    eeg, visual = bench.eeg_net(), bench.visual_net()
    bench.seed("ambokd fusion")
    return PeerNet(eeg, visual, bench.num_classes).to(bench.data.device)


def train(bench: Bench, settings: AMBOKDSettings) -> Classifier:
    """The three peers together; the best epoch is the visual one's."""
    net = peer_net(bench)
    learning = MutualLearning(settings, bench.data.device, bench.config.optim.lr)
    state = bench.fit("peers", net, learning)
    return bench.classifier(net.visual, state)


METHOD = Method(
    "ambokd", "AMBOKD", ("video",), AMBOKDSettings(), train, "two peers trained beside it"
)
