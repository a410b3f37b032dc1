"""Our three layers, timed apart: raw kernel on NumPy arrays, op without autograd, public function.

The only module here that knows the schemas of ``torch.ops.pycdgkd`` and the raw kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pycdgkd
from pycdgkd import _C, ops

from .contestants import Contestant, differentiable
from .inputs import KD_WEIGHT, PROTO_WEIGHT, TEMPERATURE, Inputs
from .records import OURS

_IGNORE = -100
_MEAN = ops.REDUCTIONS["mean"]
_ops = torch.ops.pycdgkd


def _kl_settings(i: Inputs) -> dict[str, Any]:
    return {
        "source_weights": i.weight_tensor,
        "temperature": TEMPERATURE,
        "direction": i.case.direction,
    }


def public(i: Inputs) -> Contestant:
    """The public function with autograd, as users call it."""
    settings = _kl_settings(i)
    K = i.case.classes
    calls: dict[str, Callable[[], Tensor]] = {
        "class_prototypes": lambda: pycdgkd.class_prototypes(i.features[0], i.labels, K).prototypes,
        "prototype_loss": lambda: (
            pycdgkd.prototype_loss(i.features[0], i.prototypes[0], i.labels).loss
        ),
        "convergence_rates": lambda: pycdgkd.convergence_rates(i.features, i.prototypes, i.labels),
        "teacher_loss": lambda: pycdgkd.teacher_loss(i.logits, i.features, i.labels).loss,
        "multi_source_kl": lambda: pycdgkd.multi_source_kl(i.logits, i.sources, **settings),
        "distillation_loss": lambda: (
            pycdgkd.distillation_loss(
                i.logits,
                i.sources,
                i.labels,
                temperature_power=i.temperature_power,
                **settings,
            ).loss
        ),
    }
    return differentiable(OURS, calls[i.case.op], i, layer="public")


# ---- ops through the dispatcher, autograd switched off -------------------------------------------

Calls = tuple[Callable[[], Any], Callable[[Any], Sequence[Tensor]] | None]


def _class_prototypes_op(i: Inputs) -> Calls:
    def forward() -> Any:
        return _ops.class_prototypes(i.features, i.labels, i.case.classes, _IGNORE)

    def backward(state: Any) -> Sequence[Tensor]:
        grads: list[Tensor] = _ops.class_prototypes_backward(
            [i.grad_output], i.features, i.labels, state[1], _IGNORE
        )
        return grads

    return forward, backward


def _prototype_loss_op(i: Inputs) -> Calls:
    (z,), (c,) = i.features, i.prototypes

    def forward() -> Any:
        return _ops.prototype_loss(z, c, i.labels, None, 1.0, _MEAN, _IGNORE, True, False)

    def backward(state: Any) -> Sequence[Tensor]:
        grad, _ = _ops.prototype_loss_backward(
            i.grad_output, state[2], z, c, i.labels, None, 1.0, _MEAN, _IGNORE, True, False
        )
        return [grad]

    return forward, backward


def _convergence_rates_op(i: Inputs) -> Calls:
    return lambda: _ops.convergence_rates(
        i.features, i.prototypes, i.labels, None, 1.0, _IGNORE
    ), None


def _teacher_loss_op(i: Inputs) -> Calls:
    def forward() -> Any:
        return _ops.teacher_loss(
            i.logits, i.features, [], i.labels, None, PROTO_WEIGHT, 1.0, _IGNORE, True, False
        )

    def backward(state: Any) -> Sequence[Tensor]:
        wanted = [1] * len(i.features)
        grad_logits, grad_features, _ = _ops.teacher_loss_backward(
            i.grad_output, state[5], i.logits, i.features, i.labels, None, 1.0, _IGNORE, wanted,
            False,
        )  # fmt: skip
        return [grad_logits, *grad_features]

    return forward, backward


def _multi_source_kl_op(i: Inputs) -> Calls:
    weights, direction = i.weight_tensor, ops.DIRECTIONS[i.case.direction]

    def forward() -> Any:
        return _ops.multi_source_kl(
            i.logits, i.sources, weights, TEMPERATURE, direction, _MEAN, True
        )

    return forward, lambda state: [_ops.multi_source_kl_backward(i.grad_output, state[1], i.logits)]


def _distillation_loss_op(i: Inputs) -> Calls:
    weights, direction = i.weight_tensor, ops.DIRECTIONS[i.case.direction]

    def forward() -> Any:
        return _ops.distillation_loss(
            i.logits, i.sources, i.labels, weights, KD_WEIGHT, TEMPERATURE, direction,
            i.temperature_power, _IGNORE, True,
        )  # fmt: skip

    return forward, lambda state: [
        _ops.distillation_loss_backward(i.grad_output, state[3], i.logits)
    ]


_OP_CALLS: dict[str, Callable[[Inputs], Calls]] = {
    "class_prototypes": _class_prototypes_op,
    "prototype_loss": _prototype_loss_op,
    "convergence_rates": _convergence_rates_op,
    "teacher_loss": _teacher_loss_op,
    "multi_source_kl": _multi_source_kl_op,
    "distillation_loss": _distillation_loss_op,
}


def _op_value(op: str) -> Callable[[Any], Any]:
    if op == "class_prototypes":
        return lambda state: state[0][0]
    return (lambda state: state) if op == "convergence_rates" else (lambda state: state[0])


def op(i: Inputs) -> Contestant:
    """The ops alone: checks, allocation, launch."""
    forward, backward = _OP_CALLS[i.case.op](i)
    return Contestant(
        "op",
        forward,
        backward,
        _op_value(i.case.op),
        layer="op",
        # The dispatcher goes straight to the kernel.
        context=torch._C._AutoDispatchBelowAutograd,
    )


# ---- raw kernels ---------------------------------------------------------------------------------


def _prototype_kernel(i: Inputs) -> Contestant:
    """class_prototypes (teacher_loss only), then the prototype loss of each modality."""
    arrays = [z.detach().numpy() for z in i.features]
    given = [c.numpy() for c in i.prototypes]
    classes, N, K = i.labels.int().numpy(), i.case.rows, i.case.classes
    kernels, of_batch = _C.kernels, i.case.op == "teacher_loss"

    def forward() -> Any:
        means = [kernels.class_prototypes(z, classes, K)[0] for z in arrays] if of_batch else given
        return [(*kernels.prototype_loss(z, c, classes), c) for z, c in zip(arrays, means)]  # noqa: B905

    def backward(state: Any) -> Sequence[Any]:
        return [kernels.prototype_loss_backward(w, c, 2.0 / N) for _, _, w, c in state]

    if i.case.op == "convergence_rates":
        return Contestant(
            "kernel", forward, None, lambda state: [p.sum() for _, p, _, _ in state], layer="kernel"
        )
    value_of = "teacher_loss kernels" if of_batch else ""
    return Contestant(
        "kernel",
        forward,
        backward,
        lambda state: sum(loss for loss, *_ in state) / N,
        value_of,
        layer="kernel",
    )


def _class_prototypes_kernel(i: Inputs) -> Contestant:
    z, classes = i.features[0].detach().numpy(), i.labels.int().numpy()
    K, grad = i.case.classes, i.grad_output.numpy()
    return Contestant(
        "kernel",
        lambda: _C.kernels.class_prototypes(z, classes, K),
        lambda _: [_C.kernels.class_prototypes_backward(grad, classes)],
        lambda state: state[0],
        layer="kernel",
    )


def _kl_kernel(i: Inputs) -> Contestant:
    """The kernel leaves the gradient behind; scaling it by grad_loss is the backward."""
    distilled = i.case.op == "distillation_loss"
    logits, sources = i.logits.detach().numpy(), [t.numpy() for t in i.sources]
    classes = i.labels.int().numpy() if distilled else None
    power = TEMPERATURE**i.temperature_power if distilled else 1.0
    beta = KD_WEIGHT if distilled else 1.0
    weights = [power * w for w in i.weights]
    reverse, one = i.case.direction == "reverse", i.grad_output.double().reshape(1).numpy()
    return Contestant(
        "kernel",
        lambda: _C.kernels.distillation_loss(
            logits, sources, classes, weights, beta, TEMPERATURE, reverse
        ),
        lambda state: [_C.kernels.scale_rows(state[2], one)],
        lambda state: (1 - beta) * state[0] + beta * state[1],
        layer="kernel",
    )


def kernel(i: Inputs) -> Contestant | None:
    """The raw kernels of a case, one thread; None for a type that NumPy does not have."""
    if i.case.dtype == "bfloat16":
        return None
    if i.case.op == "class_prototypes":
        return _class_prototypes_kernel(i)
    return (_kl_kernel if i.case.sources else _prototype_kernel)(i)


def ours(i: Inputs) -> list[Contestant]:
    """Public function, op and kernels, outermost first."""
    layers = [public(i), op(i), kernel(i)]
    return [contestant for contestant in layers if contestant is not None]


def exp_kernel() -> Callable[[Any], Any]:
    """The kernels' own exponential, for the measured rate of exponentials."""
    return _C.kernels.exp


def active_instructions() -> str:
    """The instruction set that the kernels use here."""
    return str(ops.build_info()["isa_active"])
