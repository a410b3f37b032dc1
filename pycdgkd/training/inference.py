"""Networks in evaluation mode over many samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pycdgkd.models.networks import Network

from .recordings import Batch, Indices, Recordings


class Output(Protocol):
    """What a network returns: its logits (B, K), and whatever else."""

    @property
    def logits(self) -> Tensor:
        """(B, K)."""


def forward(net: Network, batch: Batch) -> Output:
    """Run a network on what it is allowed to see: a visual net never gets the EEG."""
    output: Output = net(*(getattr(batch, name) for name in net.inputs))
    return output


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the former mode comes back after."""
    was_training = net.training
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        net.train(was_training)


def network_logits(net: Network, data: Recordings, indices: Indices, size: int) -> Tensor:
    """Logits (n, K) of these samples on the data's device, computed ``size`` samples at a time."""
    with evaluating(net):
        return torch.cat([forward(net, batch).logits for _, batch in data.batches(indices, size)])


def accuracy_and_loss(logits: Tensor, data: Recordings, indices: Indices) -> tuple[float, float]:
    """Share of right answers and mean cross-entropy (temperature 1) of these samples."""
    labels = torch.from_numpy(data.labels[indices]).to(logits.device)
    loss = nn.functional.cross_entropy(logits, labels)
    right = int((logits.argmax(1) == labels).sum())
    return right / len(indices), float(loss)


def probabilities(logits: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Softmax in float64, (n, K)."""
    return np.asarray(logits.double().softmax(1).cpu().numpy(), dtype=np.float64)
