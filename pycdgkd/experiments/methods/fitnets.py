"""FitNets: a student that learns the teacher's fused feature through a regressor.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015. Its
Eq. 3 is the squared error between the teacher's hint and a regressor of the student's guided layer.
Here the hint is z = [z_v; z_e], so that the student guesses from the face what the teacher takes
from the EEG, and the guided layer is the student's z_v. The regressor is dropped after training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.models.networks import (
    MultimodalNet,
    MultimodalOutput,
    Network,
    VisualNet,
    VisualOutput,
)
from pycdgkd.training.config import DistillConfig
from pycdgkd.training.distill import Distillation
from pycdgkd.training.environment import derive_seed
from pycdgkd.training.inference import evaluating, forward
from pycdgkd.training.objective import Objective
from pycdgkd.training.recordings import Batch, Indices, Recordings

STAGES = ("one", "two")


@dataclass(frozen=True)
class FitNetsSettings:
    """How the student takes the hint.

    stages: "one" adds the hint to the cross-entropy, as the paper's authors' baseline does; "two"
    is Romero et al.'s Algorithm 1: pre-training by the hint alone, then KD on the whole network.
    hint_weight: of the hint in one stage, against 1 - hint_weight of the cross-entropy; the
    authors weigh both by 0.5. (The 1 to 100 of other code is 100/101 here, but for the scale of
    the loss, which Adam takes out.)
    hint_share: of the schedule's epochs, for the pre-training of two stages; the second has the
    whole schedule, as every student. Romero et al. give a number of epochs for their data alone.
    distill: Eq. 9's settings in the second stage; those of the KD baseline.
    """

    stages: str = "one"
    hint_weight: float = 0.5
    hint_share: float = 0.25
    distill: DistillConfig = field(default_factory=lambda: DistillConfig(strategy="previous"))

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        if self.stages not in STAGES:
            raise InputError(
                f"fitnets.stages: expected one of {', '.join(STAGES)}; got '{self.stages}'; "
                "remedy: two for hint pre-training before KD, one otherwise"
            )
        if not 0.0 <= self.hint_weight < 1.0:
            raise InputError(
                "fitnets.hint_weight: expected a number from 0 to below 1; "
                f"got {self.hint_weight}; remedy: w / (1 + w) for a weight w beside a whole "
                "cross-entropy"
            )
        if not 0.0 < self.hint_share <= 1.0:
            raise InputError(
                "fitnets.hint_share: expected a number above 0, at most 1; "
                f"got {self.hint_share}; remedy: one stage to leave the pre-training out"
            )


class FitNetsLoss(NamedTuple):
    """The loss and its parts, scalars."""

    loss: Tensor
    cross_entropy: Tensor
    hint: Tensor


def fitnets_loss(
    logits: Tensor, labels: Tensor, guess: Tensor, hint: Tensor, hint_weight: float
) -> FitNetsLoss:
    """(1 - w) CE + w ||hint - guess||^2 / D, means over the batch (FitNets, Eq. 3, per feature).

    logits: (B, K). labels: (B,). guess: (B, D), the regressor's. hint: (B, D), the teacher's.
    """
    cross_entropy = F.cross_entropy(logits, labels)
    error = F.mse_loss(guess, hint)
    return FitNetsLoss(
        (1.0 - hint_weight) * cross_entropy + hint_weight * error, cross_entropy, error
    )


def fused_features(net: MultimodalNet, data: Recordings, indices: Indices, size: int) -> Tensor:
    """z = [z_v; z_e] (n, Dv + De) of these samples in evaluation mode, ``size`` at a time."""
    rows = []
    with evaluating(net):
        for _, batch in data.batches(indices, size):
            output = forward(net, batch)
            assert isinstance(output, MultimodalOutput), "hints come from both modalities"
            rows.append(torch.cat([output.video, output.eeg], dim=1))
    return torch.cat(rows)


class Hints(Objective):
    """Objective of a student that sees the hints; at a weight of 1 they alone train it.

    The train split is not augmented and the teacher is frozen, so its hints are a table.
    """

    columns = ("loss", "cross_entropy", "hint")

    def __init__(self, regressor: nn.Linear, hints: Tensor, hint_weight: float) -> None:
        """Hints (n, D), rows in the train split's order; the regressor is trained with the net."""
        self.regressor, self.hints, self.hint_weight = regressor, hints, hint_weight

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """FitNets loss of the batch against the rows of its samples."""
        output = forward(net, batch)
        assert isinstance(output, VisualOutput), "the student sees video alone"
        result = fitnets_loss(
            output.logits,
            batch.labels,
            self.regressor(output.video),
            self.hints[positions.to(self.hints.device)],
            self.hint_weight,
        )
        return result.loss, torch.stack(result).detach()

    def parameter_groups(self, net: Network) -> list[list[nn.Parameter]]:
        """The network and the regressor; without its classifier where no label trains that."""
        assert isinstance(net, VisualNet), "the student sees video alone"
        guided = net.visual if self.hint_weight == 1.0 else net  # weight decay would eat the head
        return [[*guided.parameters(), *self.regressor.parameters()]]

    def state_dict(self) -> dict[str, Any]:
        """The regressor's weights."""
        return dict(self.regressor.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up saved weights."""
        self.regressor.load_state_dict(state)


def build_hints(bench: Bench, net: VisualNet, hint_weight: float) -> Hints:
    """The shared teacher's hints on the train split, and a new regressor from z_v to them."""
    teacher = bench.teacher().load("teacher")
    assert isinstance(teacher, MultimodalNet), "teachers see both modalities"
    hints = fused_features(teacher, bench.data, bench.split.train, bench.config.optim.part_size)
    bench.seed("regressor")
    regressor = nn.Linear(net.visual.project.out_features, hints.shape[1])
    return Hints(regressor.to(bench.data.device), hints, hint_weight)


def kd_objective(bench: Bench, distill: DistillConfig) -> Distillation:
    """What the KD baseline's student is trained for, with the same draws."""
    chain = bench.chain(replace(bench.config, distill=distill, assistants=0), bench.method)
    chain.trained = {"teacher": bench.teacher().folder("teacher")}
    seed = derive_seed(bench.config.seed, "student", "sources")
    return Distillation(distill, ("teacher",), [chain.frozen_logits("teacher")], seed)


def train_fitnets(bench: Bench, settings: FitNetsSettings) -> Classifier:
    """A student by hints and labels at once, or by hints first and KD after."""
    net = bench.visual_net()
    if settings.stages == "one":
        hints = build_hints(bench, net, settings.hint_weight)
        return bench.classifier(net, bench.fit("student", net, hints))
    epochs = max(1, round(settings.hint_share * bench.config.optim.epochs))
    hints = build_hints(bench, net, 1.0)
    hinted = bench.fit("hinted", net, hints, seed_role="hinted", epochs=epochs)
    state = bench.fit("student", net, kd_objective(bench, settings.distill))
    note = f"{epochs} epochs of pre-training by hints, {hinted.seconds:.0f} s"
    return bench.classifier(net, state, note, spent=hinted.seconds)


METHOD = Method(
    "fitnets",
    "FitNets",
    ("video",),
    FitNetsSettings(),
    train_fitnets,
    "the teacher's features",
)
