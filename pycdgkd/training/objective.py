"""What a network is trained for: the interface that the loop knows, and plain cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from .inference import Network, forward
from .recordings import Batch


class Objective(Protocol):
    """What a network is trained for.

    columns: names of the values of one step, "loss" and "cross_entropy" among them.
    """

    columns: tuple[str, ...]

    def begin_epoch(self, net: Network) -> None:
        """Prepare an epoch, before its first step."""

    def begin_step(self) -> None:
        """Prepare a step: all parts of one batch share what is drawn here."""

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (a mean over the batch) and the detached values of the columns.

        positions: (B,) places of the samples in the train split, on the CPU.
        """

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""


class CrossEntropy:
    """Plain cross-entropy: the control, a teacher without prototypes, networks without sources."""

    columns: tuple[str, ...] = ("loss", "cross_entropy")

    def begin_epoch(self, net: Network) -> None:
        """Nothing to prepare."""

    def begin_step(self) -> None:
        """Nothing to draw."""

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the batch."""
        del positions
        loss = nn.functional.cross_entropy(forward(net, batch).logits, batch.labels)
        return loss, loss.detach().expand(2)

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """No state."""
