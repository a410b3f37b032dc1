"""The rebalanced teacher: prototypes of the train split, modality weights for every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycdgkd import losses
from pycdgkd.bank import PrototypeBank
from pycdgkd.models.networks import MultimodalNet, MultimodalOutput, Network

from .config import TeacherConfig
from .environment import loss_device
from .inference import Output, evaluating, forward
from .objective import Objective
from .recordings import Batch, Indices, Recordings

MODALITIES = ("video", "eeg")


class Rebalancing(Objective):
    """Objective of the teacher (Eq. 5).

    The prototypes (Eq. 1) are class means over the whole train split, taken in evaluation mode
    before every epoch and smoothed by momentum. Means over the batch would not do: each sample's
    share in its own class mean puts it next to that mean, so both modalities look converged and
    the weights vanish.
    """

    columns: tuple[str, ...] = (
        "loss",
        "cross_entropy",
        *(f"prototype_loss_{name}" for name in MODALITIES),
        *(f"rate_{name}" for name in MODALITIES),
        *(f"lambda_{name}" for name in MODALITIES),
    )

    def __init__(
        self,
        config: TeacherConfig,
        net: MultimodalNet,
        data: Recordings,
        train: Indices,
        size: int,
    ) -> None:
        """Prototypes as wide as the features of ``net``, computed ``size`` samples at a time."""
        widths = (net.visual.project.out_features, net.eeg.project.out_features)
        self.config, self.data, self.train, self.size = config, data, train, size
        self.place = loss_device(data.device)
        self.banks = torch.nn.ModuleList(
            PrototypeBank(data.num_classes, width, momentum=config.momentum) for width in widths
        ).to(self.place)

    def begin_epoch(self, net: Network) -> None:
        """Take the class means of the train split with the present weights."""
        with evaluating(net):
            for _, batch in self.data.batches(self.train, self.size):
                both = _features(forward(net, batch))
                for bank, features in zip(self._banks(), both, strict=True):
                    bank.update(features.to(self.place), batch.labels.to(self.place))
        for bank in self._banks():
            bank.refresh()

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher loss of the batch; rates are given for one sample (the sums divided by B)."""
        del positions
        output = forward(net, batch)
        banks = self._banks()
        result = losses.teacher_loss(
            output.logits.to(self.place),
            [features.to(self.place) for features in _features(output)],
            batch.labels.to(self.place),
            [bank.prototypes for bank in banks],
            class_counts=banks[0].counts,
            proto_weight=self.config.proto_weight,
            scale=self.config.scale,
        )
        rates = result.convergence_rates / len(batch.labels)
        pieces = (result.prototype_losses, rates, result.modality_weights)
        scalars = torch.stack([result.loss.detach(), result.cross_entropy.detach()])
        return result.loss, torch.cat([scalars, *(piece.detach() for piece in pieces)])

    def state_dict(self) -> dict[str, Any]:
        """The banks' buffers."""
        return dict(self.banks.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up saved buffers."""
        self.banks.load_state_dict(state)

    def _banks(self) -> list[PrototypeBank]:
        return [bank for bank in self.banks if isinstance(bank, PrototypeBank)]


def _features(output: Output) -> tuple[Tensor, Tensor]:
    assert isinstance(output, MultimodalOutput), "rebalancing needs both modalities"
    return output.video, output.eeg
