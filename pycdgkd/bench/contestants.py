"""Whoever takes part in a comparison: one forward and one backward call on given inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inputs import Inputs, Result


@dataclass(frozen=True)
class Contestant:
    """Two calls. ``forward()`` returns a state, ``backward(state)`` the gradients."""

    name: str
    forward: Callable[[], Any]
    backward: Callable[[Any], Sequence[Any]] | None
    value: Callable[[Any], Any] = lambda state: state
    value_of: str = ""  # which entry of inputs.VALUES it computes; "": the case's op
    threads: int = 1
    context: Callable[[], AbstractContextManager[object]] = nullcontext  # around its calls
    layer: str = "peer"  # "public", "op", "kernel", "peer" or "neighbour"

    def result(self) -> Result:
        """Value and gradients of one call, as tensors."""
        with self.context():
            state = self.forward()
            value = torch.as_tensor(self.value(state)).detach()
            grads = [] if self.backward is None else self.backward(state)
        return value, [None if grad is None else torch.as_tensor(grad) for grad in grads]


def differentiable(
    name: str, value: Callable[[], Tensor], inputs: Inputs, **settings: Any
) -> Contestant:
    """A contestant that autograd differentiates with respect to the case's leaves."""
    leaves, grad_output = inputs.leaves, inputs.grad_output

    def backward(result: Tensor) -> Sequence[Tensor | None]:
        # Code that branches in Python leaves out the modality of weight 0: its gradient is None.
        return torch.autograd.grad(result, leaves, grad_output, allow_unused=True)

    return Contestant(name, value, backward if leaves else None, **settings)
