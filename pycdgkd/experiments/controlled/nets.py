"""Small networks in the roles of the paper's: one branch a modality, a head on their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .study import NUM_CLASSES, Part

_VIDEO_HIDDEN = (32,)
_EEG_HIDDEN = ((32, 32), (24,), (8,))  # by level: the teacher's, then ever simpler assistants'


class Output(NamedTuple):
    """logits (N, K); features: by modality (N, F), F equal for all."""

    logits: Tensor
    features: dict[str, Tensor]


class Net(nn.Module):
    """Branches of the modalities it sees, and a head on their concatenated features.

    widths: of each modality's input. feature: F, equal for all branches, so that distances to
    prototypes can be compared. level: of the EEG branch.
    """

    def __init__(self, widths: Mapping[str, int], feature: int, level: int = 0) -> None:
        super().__init__()
        hidden = {"video": _VIDEO_HIDDEN, "eeg": _EEG_HIDDEN[level]}
        self.branches = nn.ModuleDict(
            {name: _perceptron((width, *hidden[name], feature)) for name, width in widths.items()}
        )
        self.head = _perceptron((feature * len(widths), 16, NUM_CLASSES))

    def forward(self, *inputs: Tensor) -> Output:
        """Logits and features; one (N, D) input for each modality it sees, in their order."""
        pairs = zip(self.branches.items(), inputs, strict=True)
        features = {name: branch(given) for (name, branch), given in pairs}
        return Output(self.head(torch.cat(list(features.values()), 1)), features)

    def inputs(self, part: Part) -> list[Tensor]:
        """What it sees of a part."""
        return [getattr(part, name) for name in self.branches]


def build_net(sees: Sequence[str], level: int, part: Part, feature: int, seed: int) -> Net:
    """A network with initial weights of a seed that fits the samples of a part."""
    torch.manual_seed(seed)
    return Net({name: getattr(part, name).shape[1] for name in sees}, feature, level)


def _perceptron(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
