"""Densely guided distillation from frozen sources whose logits are computed once a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pycdgkd import losses
from pycdgkd.models.networks import Network
from pycdgkd.sampling import sample_sources

from .config import DistillConfig
from .environment import loss_device
from .inference import forward
from .objective import Objective
from .recordings import Batch


class Distillation(Objective):
    """Objective of the assistants and the student (Eq. 9).

    The train split is not augmented and the sources are frozen in evaluation mode, so their logits
    are a table: training never runs a source.
    """

    def __init__(
        self, config: DistillConfig, names: Sequence[str], logits: Sequence[Tensor], seed: int
    ) -> None:
        """Learn from the sources ``names``; logits: (n, K) each, rows in the train split's order.

        seed: of the generator that draws the sources of each step.
        """
        self.config = config
        self.columns: tuple[str, ...] = ("loss", "cross_entropy", "kl")
        self.columns += tuple(f"weight_{name}" for name in names)
        table = torch.stack(list(logits))  # (S, n, K)
        self.table = table.to(loss_device(table.device))
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = torch.zeros(len(names))

    def begin_step(self) -> None:
        """Draw the sources of this step."""
        weights = sample_sources(
            len(self.table),
            # Of the network before alone there is nothing to draw.
            strategy="all" if self.config.strategy == "previous" else self.config.strategy,
            drop_prob=self.config.drop_prob,
            generator=self.generator,
        )
        self.weights = weights.to(self.table.device)

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Distillation loss of the batch against the rows of its samples."""
        result = losses.distillation_loss(
            forward(net, batch).logits.to(self.table.device),
            self.table[:, positions.to(self.table.device)],
            batch.labels.to(self.table.device),
            kd_weight=self.config.kd_weight,
            temperature=self.config.temperature,
            direction=self.config.direction,
            temperature_power=self.config.temperature_power,
            source_weights=self.weights,
        )
        scalars = torch.stack([result.loss, result.cross_entropy, result.kl]).detach()
        return result.loss, torch.cat([scalars, self.weights.to(scalars.dtype)])

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved generator state."""
        self.generator.set_state(state["generator"])
