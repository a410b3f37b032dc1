"""Class prototypes that outlive a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .checks import check
from .losses import class_prototypes


class PrototypeBank(nn.Module):
    """Class prototypes over a whole pass of the training set, smoothed from pass to pass (Eq. 1).

    Call ``update`` on every batch of a pass, then ``refresh`` once. State is in buffers, so it is
    saved with the model; nothing is differentiated.

    Args:
        num_classes: K.
        dim: D.
        momentum: share of the old prototypes kept at a refresh, in [0, 1).

    Attributes:
        prototypes: (K, D) float32, zero rows for classes never seen.
        counts: (K,) int64, rows of each class in the last pass that had any.
    """

    prototypes: Tensor
    counts: Tensor
    _sums: Tensor
    _pending: Tensor

    def __init__(self, num_classes: int, dim: int, *, momentum: float = 0.2) -> None:
        super().__init__()
        check("PrototypeBank", "num_classes", num_classes, num_classes >= 1, "at least 1")
        check("PrototypeBank", "momentum", momentum, 0 <= momentum < 1, "a number in [0, 1)")
        self.momentum = momentum
        self.register_buffer("prototypes", torch.zeros(num_classes, dim))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("_sums", torch.zeros(num_classes, dim, dtype=torch.float64))
        self.register_buffer("_pending", torch.zeros(num_classes, dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the sums in float64 where the model goes to a lower precision."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._sums = self._sums.double()
        return self

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch (N, D) with labels (N,) to the pass; rows labelled -100 take no part."""
        shape = tuple(features.shape)
        fits = features.dim() == 2 and shape[1] == self.prototypes.shape[1]
        check("PrototypeBank", "features", shape, fits, f"shape (N, {self.prototypes.shape[1]})")
        means, counts = class_prototypes(features, labels, len(self.counts))
        self._sums += means.double() * counts[:, None]
        self._pending += counts

    @torch.no_grad()
    def refresh(self, process_group: Any = None) -> None:
        """Close the pass: prototypes <- momentum * old + (1 - momentum) * new class means.

        A class seen for the first time takes its new mean; one not seen in this pass keeps its old
        prototype. With a process group, sums and counts are those of all ranks.
        """
        sums, counts = self._sums, self._pending
        if process_group is not None:
            torch.distributed.all_reduce(sums, group=process_group)
            torch.distributed.all_reduce(counts, group=process_group)
        means = (sums / counts.clamp(min=1)[:, None]).to(self.prototypes.dtype)
        keep = torch.where(self.counts > 0, self.momentum, 0.0)[:, None]
        blended = keep * self.prototypes + (1 - keep) * means
        self.prototypes.copy_(torch.where((counts > 0)[:, None], blended, self.prototypes))
        self.counts.copy_(torch.where(counts > 0, counts, self.counts))
        self._sums.zero_()
        self._pending.zero_()
