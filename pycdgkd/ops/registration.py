"""How an op gets its shape function and its gradient, and what their backward passes share."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pycdgkd import _C  # noqa: F401  importing it registers the schemas and the kernels

# Up to here the forward pass of teacher_loss makes the gradients at once: elements of all features
# (csrc/cpu_teacher_ops.cpp) and, on a device, modalities and their rows
# (csrc/cuda_teacher_ops.cpp).
SMALL_FEATURES = 1 << 18
SMALL_ROWS = 1024
SMALL_MODALITIES = 8
STATISTICS = 7  # csrc/cuda/kernels.h: statistics_size(1)
# Devices whose values the host does not wait to see: there forward ops also leave what only the
# device knows (the number of rows that take part) for their backward ops.
UNSEEN_DEVICES = {"cuda"}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
DIRECTIONS = {"reverse": 0, "forward": 1}


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all lower precisions."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new(like: Tensor, *shape: int | torch.SymInt, dtype: torch.dtype | None = None) -> Tensor:
    """An output's shape for tracing; of the arithmetic dtype unless told otherwise."""
    return like.new_empty(shape, dtype=dtype or arithmetic_dtype(like.dtype))


def _padded(count: int | torch.SymInt) -> Any:
    return (count + 15) // 16 * 16


def centred_size(width: int | torch.SymInt, classes: int | torch.SymInt) -> Any:
    """Elements of one modality's centred prototypes (csrc/kernels.h: CentrePrototypes)."""
    rows = 3 if classes == 2 else classes
    return (1 + rows) * _padded(width) + _padded(classes)


def stays_on_device(tensor: Tensor) -> bool:
    """Whether an op on this tensor must not look at values on the host."""
    return tensor.device.type in UNSEEN_DEVICES


def few_classes(like: Tensor, classes: int | torch.SymInt) -> Any:
    """Whether an (N, K) residual is kept for the backward pass of prototype losses
    (csrc/cpu_modality.h, csrc/cuda/kernels.h: kFewClasses).
    """
    return classes <= (32 if stays_on_device(like) else 40)


def register(name: str, fake: Any, backward: Any = None, setup_context: Any = None) -> None:
    """Shape function and gradient of an op; without ``backward`` its derivative is an error."""
    torch.library.register_fake(f"pycdgkd::{name}", fake)
    if backward is None:

        def backward(*_: Any) -> Any:
            raise RuntimeError(
                f"pycdgkd.{name}: has no derivative; second derivatives of the fused losses are "
                "not implemented (pycdgkd.reference states them in plain torch)"
            )

    torch.library.register_autograd(f"pycdgkd::{name}", backward, setup_context=setup_context)


_autograd: Any = cast(Any, torch.library.Library)("pycdgkd", "IMPL")


def register_differentiable(name: str, fake: Any, call: Any) -> None:
    """``call`` takes the op's arguments; it is also what the public functions call directly.

    A hand-written ``torch.autograd.Function`` costs a third of what ``register_autograd`` adds to
    each call (it flattens every argument), which at the paper's batch is most of the time.
    """
    torch.library.register_fake(f"pycdgkd::{name}", fake)
    _autograd.impl(name, call, "Autograd")


def kernel(op: Any, *arguments: Any) -> Any:
    """The op below autograd: the functions of this package attach the graph themselves."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def backward_kernel(op: Any, *arguments: Any) -> Any:
    """A backward op; where a graph of it is asked for, autograd says that there is none."""
    return op(*arguments) if torch.is_grad_enabled() else kernel(op, *arguments)


def require_saved(need_grad: bool, op: str) -> None:
    """Raise unless the forward pass was told to leave what its gradient needs."""
    if not need_grad:
        raise RuntimeError(
            f"pycdgkd.{op}: called without need_grad, but its gradient is asked for; "
            "call the public function, or ask for it"
        )


def wants_graph(*tensors: Tensor) -> bool:
    """Whether a call on these tensors is to be recorded."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_plain(grad_loss: Tensor) -> bool:
    """Whether it is one tensor in memory: not while tracing (tensor subclasses), nor where
    ``vmap`` makes one of a batch (which has no storage of its own).
    """
    return type(grad_loss) is Tensor and torch._C._has_storage(grad_loss)


def can_look(grad_loss: Tensor) -> bool:
    """Whether values may be looked at here: on the CPU (a device would have to be waited for), of
    plain tensors, and not where a graph of the gradient is asked for.
    """
    on_host = grad_loss.is_cpu and not stays_on_device(grad_loss)
    return on_host and not torch.is_grad_enabled() and _is_plain(grad_loss)


def is_final(grad_loss: Tensor, unit_grad: Tensor, like: Tensor) -> bool:
    """Whether the gradient that the forward pass left for grad_loss = 1 can be handed out itself:
    only if the graph is not kept for another pass.
    """
    return (
        can_look(grad_loss)
        and grad_loss.dim() == 0
        and unit_grad.dtype == like.dtype
        and not _graph_is_kept()
        and grad_loss.item() == 1.0
    )


def may_take_over(grad_loss: Tensor, unit_grad: Tensor, like: Tensor) -> bool:
    """Whether, on a device, the gradient that the forward pass left may be scaled where it lies."""
    return (
        stays_on_device(grad_loss)
        and not torch.is_grad_enabled()
        and _is_plain(grad_loss)
        and unit_grad.dtype == like.dtype
        and not _graph_is_kept()
    )


# Without the means to ask, assume that the graph is kept.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
