"""Training of the small networks with the library's losses: Eqs. 1-6 and Eq. 9.

One loop for all: Adam, early stopping on the validation accuracy (whose labels are as noisy as
those of training), the weights of the best epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pycdgkd.bank import PrototypeBank
from pycdgkd.losses import (
    convergence_rates,
    distillation_loss,
    modality_weights,
    prototype_loss,
    teacher_loss,
)
from pycdgkd.sampling import sample_sources

from .nets import Net, Output
from .study import MODALITIES, NUM_CLASSES, Part


@dataclass(frozen=True)
class Schedule:
    """How every network is trained."""

    learning_rate: float = 5e-3
    batch_size: int = 64
    epochs: int = 50
    patience: int = 12


class CrossEntropy:
    """What a network is trained for: here the labels it is told, nothing else."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def begin_epoch(self, net: Net) -> None:
        """Prepare an epoch."""

    def __call__(self, output: Output, rows: Tensor) -> Tensor:
        """Loss of a batch; rows: (B,) its places in the part."""
        return F.cross_entropy(output.logits, self.part.labels[rows])

    def log(self) -> dict[str, float]:
        """What is worth keeping of the training."""
        return {}


class Rebalancing(CrossEntropy):
    """Eq. 5 with the library's ``teacher_loss``.

    prototypes: "dataset" (class means of the whole part before each epoch, momentum 0.2) or "batch"
    (class means of the batch itself). weights: "step" (Eqs. 4 and 6 on every batch, the paper) or
    "epoch" (once before each epoch, on the whole part; dataset prototypes only). feature: F.
    """

    proto_weight = 0.5

    def __init__(self, part: Part, feature: int, prototypes: str, weights: str) -> None:
        super().__init__(part)
        self.prototypes, self.weights = prototypes, weights
        self.banks = [PrototypeBank(NUM_CLASSES, feature, momentum=0.2) for _ in MODALITIES]
        self.steps = 0
        self.weight_sum = torch.zeros(len(MODALITIES))
        self.rate_sum = torch.zeros(len(MODALITIES))
        self.rates = self.epoch_weights = torch.zeros(len(MODALITIES))

    @property
    def _means(self) -> list[Tensor] | None:
        return None if self.prototypes == "batch" else [bank.prototypes for bank in self.banks]

    def begin_epoch(self, net: Net) -> None:
        """Class means of the part with the present weights (Eq. 1), and the epoch's lambda."""
        means = self._means
        if means is None:
            return
        net.eval()
        with torch.no_grad():
            features = list(net(*net.inputs(self.part)).features.values())
        net.train()
        for bank, of_modality in zip(self.banks, features, strict=True):
            bank.update(of_modality, self.part.labels)
            bank.refresh()
        rates = convergence_rates(features, means, self.part.labels)
        self.rates, self.epoch_weights = rates / len(self.part), modality_weights(rates)

    def __call__(self, output: Output, rows: Tensor) -> Tensor:
        """(1 - alpha) CE + alpha sum_m lambda_m L_proto^m."""
        labels, features = self.part.labels[rows], list(output.features.values())
        self.steps += 1
        if self.weights == "epoch":
            self.weight_sum += self.epoch_weights
            self.rate_sum += self.rates
            return self._with_weights(output.logits, features, labels)
        result = teacher_loss(
            output.logits, features, labels, self._means, proto_weight=self.proto_weight
        )
        self.weight_sum += result.modality_weights
        self.rate_sum += result.convergence_rates / len(rows)
        return result.loss

    def _with_weights(self, logits: Tensor, features: Sequence[Tensor], labels: Tensor) -> Tensor:
        loss = (1 - self.proto_weight) * F.cross_entropy(logits, labels)
        each = zip(self.epoch_weights, features, self.banks, strict=True)
        for weight, of_modality, bank in each:
            term = prototype_loss(of_modality, bank.prototypes, labels).loss
            loss = loss + self.proto_weight * weight * term
        return loss

    def log(self) -> dict[str, float]:
        """Means of lambda and of the rates (for one sample) over all steps."""
        return {
            f"{quantity}_{name}": float(total / self.steps)
            for quantity, sums in (("lambda", self.weight_sum), ("rate", self.rate_sum))
            for name, total in zip(MODALITIES, sums, strict=True)
        }


@dataclass(frozen=True)
class Eq9:
    """Settings of the library's ``distillation_loss`` and of ``sample_sources``; no factor T^2."""

    strategy: str = "subset"
    direction: str = "reverse"
    temperature: float = 2.0
    kd_weight: float = 0.5


class Guidance(CrossEntropy):
    """Eq. 9 against a table of the frozen sources' logits (S, N, K)."""

    def __init__(self, part: Part, table: Tensor, settings: Eq9, seed: int) -> None:
        super().__init__(part)
        self.table, self.settings = table, settings
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: Output, rows: Tensor) -> Tensor:
        """(1 - beta) CE + beta sum_j w_j KL, sources drawn for every batch."""
        settings = self.settings
        weights = sample_sources(
            len(self.table), strategy=settings.strategy, generator=self.generator
        )
        return distillation_loss(
            output.logits,
            self.table[:, rows],
            self.part.labels[rows],
            kd_weight=settings.kd_weight,
            temperature=settings.temperature,
            direction=settings.direction,
            source_weights=weights,
        ).loss


def train_net(net: Net, objective: CrossEntropy, val: Part, schedule: Schedule, seed: int) -> int:
    """Train on the objective's part; leaves the best epoch's weights, returns epochs trained."""
    part = objective.part
    given, labels = net.inputs(part), val.labels
    optimizer = torch.optim.Adam(net.parameters(), lr=schedule.learning_rate, fused=True)
    order = torch.Generator().manual_seed(seed)
    best, best_epoch, kept = -1.0, 0, net.state_dict()
    for epoch in range(1, schedule.epochs + 1):
        objective.begin_epoch(net)
        shuffled = torch.randperm(len(part), generator=order)
        for rows in torch.split(shuffled, schedule.batch_size):
            loss = objective(net(*(tensor[rows] for tensor in given)), rows)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
        accuracy = share_right(logits_of(net, val), labels)
        if accuracy > best:
            best, best_epoch = accuracy, epoch
            kept = {name: value.clone() for name, value in net.state_dict().items()}
        if epoch - best_epoch >= schedule.patience:
            break
    net.load_state_dict(kept)
    return epoch


@torch.no_grad()
def logits_of(net: Net, part: Part) -> Tensor:
    """Logits (N, K) of a part."""
    logits: Tensor = net(*net.inputs(part)).logits
    return logits


def share_right(logits: Tensor, labels: Tensor) -> float:
    """Accuracy of logits (N, K) against labels (N,)."""
    return (logits.argmax(1) == labels).double().mean().item()
