"""What a network is trained for: the interface that the loop knows, and plain cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pycdgkd.models.networks import Network

from .inference import forward
from .recordings import Batch


class Objective:
    """What a network is trained for. Only ``__call__`` must be given; the rest does nothing.

    columns: names of the values of one step, "loss" and "cross_entropy" among them.
    """

    columns: tuple[str, ...] = ("loss", "cross_entropy")

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (a mean over the batch) and the detached values of the columns.

        positions: (B,) places of the samples in the train split, on the CPU.
        """
        del net, batch, positions
        raise TypeError(f"{type(self).__name__} defines no loss")

    def parameter_groups(self, net: Network) -> list[list[nn.Parameter]]:
        """What is trained, in groups whose learning rates ``scales`` sets apart."""
        return [list(net.parameters())]

    def scales(self) -> Sequence[float]:
        """Factors of a step's learning rate, one a group; asked for after the step's losses."""
        return (1.0,)

    def begin_epoch(self, net: Network) -> None:
        """Prepare an epoch, before its first step."""

    def begin_step(self) -> None:
        """Prepare a step: all parts of one batch share what is drawn here."""

    def adjust_gradients(self, net: Network) -> None:
        """Change the gradients of a step before they are used."""

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""


class CrossEntropy(Objective):
    """Plain cross-entropy: the control, a teacher without prototypes, networks without sources."""

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the batch."""
        del positions
        loss = nn.functional.cross_entropy(forward(net, batch).logits, batch.labels)
        return loss, loss.detach().expand(2)
