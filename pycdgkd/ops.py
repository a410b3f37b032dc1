"""The ops under ``torch.ops.pycdgkd``: shapes for tracing, gradients, registration, op by op.

Importing this module loads the compiled library, which registers the schemas (csrc/schemas.cpp)
and the kernels; what the quantities mean is said in ``pycdgkd.losses``. Gradients that a forward
pass already holds are saved, never recomputed: ``residual`` is P - Y (N, K) of the distance
softmax, ``unit_grad`` the gradient for grad_loss = 1. No (N, D) tensor is saved but the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from . import _C
except ImportError as error:
    error.add_note(
        "pycdgkd's compiled module could not be loaded. From a source checkout: pip install . ; "
        "otherwise reinstall the wheel for this Python. `pycdgkd doctor` tells more."
    )
    raise

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
DIRECTIONS = {"reverse": 0, "forward": 1}

build_info = _C.build_info


def has_kernels(device_type: str) -> bool:
    """Whether this build computes the losses on tensors of that device type ("cpu", "cuda")."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("pycdgkd::teacher_loss", key)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all lower precisions."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _new(like: Tensor, *shape: int | torch.SymInt, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype or arithmetic_dtype(like.dtype))


def _register(name: str, fake: Any, backward: Any = None, setup_context: Any = None) -> None:
    torch.library.register_fake(f"pycdgkd::{name}", fake)
    if backward is None:

        def backward(*_: Any) -> Any:
            raise RuntimeError(
                f"pycdgkd.{name}: has no derivative; second derivatives of the fused losses are "
                "not implemented (pycdgkd.reference states them in plain torch)"
            )

    torch.library.register_autograd(f"pycdgkd::{name}", backward, setup_context=setup_context)


# ---- class_prototypes ----------------------------------------------------------------------------


def _class_prototypes_fake(
    features: Sequence[Tensor], labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[list[Tensor], Tensor]:
    prototypes = [_new(z, num_classes, z.shape[1]) for z in features]
    return prototypes, _new(features[0], num_classes, dtype=torch.int64)


def _class_prototypes_setup(ctx: Any, inputs: Any, output: Any) -> None:
    features, labels, _, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(labels, output[1], *features)


def _class_prototypes_backward(ctx: Any, grad_prototypes: list[Tensor | None], _: Any) -> Any:
    labels, counts, *features = ctx.saved_tensors
    grads = [
        _new(z, len(counts), z.shape[1]).zero_() if grad is None else grad
        for grad, z in zip(grad_prototypes, features, strict=True)
    ]
    grad_features = torch.ops.pycdgkd.class_prototypes_backward(
        grads, features, labels, counts, ctx.ignore_index
    )
    return grad_features, None, None, None


def _class_prototypes_backward_fake(
    grad_prototypes: Any, features: Sequence[Tensor], labels: Any, counts: Any, ignore_index: int
) -> list[Tensor]:
    return [_new(z, *z.shape, dtype=z.dtype) for z in features]


_register(
    "class_prototypes",
    _class_prototypes_fake,
    _class_prototypes_backward,
    _class_prototypes_setup,
)
_register("class_prototypes_backward", _class_prototypes_backward_fake)


# ---- prototype_loss ------------------------------------------------------------------------------


def _prototype_loss_fake(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    class_counts: Tensor | None,
    scale: float,
    reduction: int,
    ignore_index: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = features.shape[0]
    loss = _new(features, rows) if reduction == REDUCTIONS["none"] else _new(features)
    residual = _new(features, rows, prototypes.shape[0]) if need_grad else _new(features, 0)
    return loss, _new(features, rows), residual, _new(features, dtype=torch.float64)


def _prototype_loss_setup(ctx: Any, inputs: Any, output: Any) -> None:
    features, prototypes, _, class_counts, *_, ctx.need_grad = inputs
    _, true_prob, residual, coefficient = output
    ctx.mark_non_differentiable(true_prob, residual, coefficient)
    ctx.save_for_backward(features, prototypes, class_counts, residual, coefficient)


def _prototype_loss_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
    _require_saved(ctx, "prototype_loss")
    features, prototypes, class_counts, residual, coefficient = ctx.saved_tensors
    need_features, need_prototypes = ctx.needs_input_grad[:2]
    grad_features, grad_prototypes = torch.ops.pycdgkd.prototype_loss_backward(
        grad_loss, coefficient, residual, features, prototypes, class_counts,
        need_features, need_prototypes,
    )  # fmt: skip
    return (
        grad_features if need_features else None,
        grad_prototypes if need_prototypes else None,
        *[None] * 6,
    )


def _prototype_loss_backward_fake(
    grad_loss: Tensor,
    coefficient: Tensor,
    residual: Tensor,
    features: Tensor,
    prototypes: Tensor,
    class_counts: Tensor | None,
    need_features: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    empty = _new(features, 0, dtype=features.dtype)
    grad_features = _new(features, *features.shape, dtype=features.dtype)
    grad_prototypes = _new(prototypes, *prototypes.shape, dtype=residual.dtype)
    return (
        grad_features if need_features else empty,
        grad_prototypes if need_prototypes else _new(prototypes, 0, dtype=residual.dtype),
    )


def _require_saved(ctx: Any, op: str) -> None:
    if not ctx.need_grad:
        raise RuntimeError(
            f"pycdgkd.{op}: called with need_grad=False, but its gradient is asked for; "
            "call the public function, or pass need_grad=True"
        )


_register("prototype_loss", _prototype_loss_fake, _prototype_loss_backward, _prototype_loss_setup)
_register("prototype_loss_backward", _prototype_loss_backward_fake)


# ---- convergence_rates, modality_weights (no gradient by definition) -----------------------------


def _convergence_rates_fake(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    labels: Tensor,
    class_counts: Tensor | None,
    scale: float,
    ignore_index: int,
) -> Tensor:
    return _new(features[0], len(features))


def _modality_weights_fake(convergence_rates: Tensor) -> Tensor:
    return _new(convergence_rates, *convergence_rates.shape)


_register("convergence_rates", _convergence_rates_fake)
_register("modality_weights", _modality_weights_fake)


# ---- teacher_loss --------------------------------------------------------------------------------


def _teacher_loss_fake(
    logits: Tensor,
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    labels: Tensor,
    class_counts: Tensor | None,
    proto_weight: float,
    scale: float,
    ignore_index: int,
    need_grad: bool,
) -> tuple[Tensor, ...]:
    rows, classes = logits.shape
    count = len(features)
    return (
        _new(logits),
        _new(logits),
        _new(logits, count),
        _new(logits, count),
        _new(logits, count),
        _new(logits, 3 + 2 * count, dtype=torch.float64),
        _new(logits, 1 + count, dtype=torch.float64),
        _new(logits, count, rows, classes) if need_grad else _new(logits, 0),
        _new(logits, rows, classes) if need_grad else _new(logits, 0),
    )


def _teacher_loss_setup(ctx: Any, inputs: Any, output: Any) -> None:
    logits, features, prototypes, _, class_counts, *_, ctx.need_grad = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.modalities = len(features)
    ctx.save_for_backward(*output[6:], logits, class_counts, *features, *prototypes)


def _teacher_loss_grads(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, list[Tensor], Any]:
    _require_saved(ctx, "teacher_loss")
    coefficients, residuals, unit_grad, logits, class_counts, *rest = ctx.saved_tensors
    features, prototypes = rest[: ctx.modalities], rest[ctx.modalities :]
    need_prototypes = any(c.requires_grad for c in prototypes)
    grads = torch.ops.pycdgkd.teacher_loss_backward(
        grad_loss, coefficients, residuals, unit_grad, logits, features, prototypes, class_counts,
        need_prototypes,
    )  # fmt: skip
    grad_logits, grad_features, grad_prototypes = grads
    return grad_logits, grad_features, grad_prototypes if need_prototypes else [None] * len(rest)


def _teacher_loss_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
    grad_logits, grad_features, grad_prototypes = _teacher_loss_grads(ctx, grad_loss)
    return grad_logits, grad_features, grad_prototypes[: ctx.modalities], *[None] * 6


def _teacher_loss_backward_fake(
    grad_loss: Tensor,
    coefficients: Tensor,
    residuals: Tensor,
    unit_grad_logits: Tensor,
    logits: Tensor,
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    class_counts: Tensor | None,
    need_prototypes: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    shapes = [c.shape if need_prototypes else (0,) for c in prototypes]
    return (
        _new(logits, *logits.shape, dtype=logits.dtype),
        [_new(z, *z.shape, dtype=z.dtype) for z in features],
        [_new(c, *s, dtype=residuals.dtype) for c, s in zip(prototypes, shapes, strict=True)],
    )


_register("teacher_loss", _teacher_loss_fake, _teacher_loss_backward, _teacher_loss_setup)
_register("teacher_loss_backward", _teacher_loss_backward_fake)


# ---- multi_source_kl, distillation_loss ----------------------------------------------------------


def _scaled_gradient_fake(grad_loss: Tensor, unit_grad: Tensor, logits: Tensor) -> Tensor:
    return _new(logits, *logits.shape, dtype=logits.dtype)


def _multi_source_kl_fake(
    logits: Tensor,
    sources: Sequence[Tensor],
    source_weights: Tensor | None,
    temperature: float,
    direction: int,
    reduction: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    rows = [logits.shape[0]] if reduction == REDUCTIONS["none"] else []
    return _new(logits, *rows), _new(logits, *logits.shape) if need_grad else _new(logits, 0)


def _multi_source_kl_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.need_grad, ctx.sources = inputs[-1], len(inputs[1])
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])


def _multi_source_kl_backward(ctx: Any, grad_loss: Tensor, _: Any) -> Any:
    _require_saved(ctx, "multi_source_kl")
    grad = torch.ops.pycdgkd.multi_source_kl_backward(grad_loss, *ctx.saved_tensors)
    return grad, [None] * ctx.sources, *[None] * 5


_register(
    "multi_source_kl", _multi_source_kl_fake, _multi_source_kl_backward, _multi_source_kl_setup
)
_register("multi_source_kl_backward", _scaled_gradient_fake)


def _distillation_loss_fake(
    logits: Tensor,
    sources: Sequence[Tensor],
    labels: Tensor,
    source_weights: Tensor | None,
    kd_weight: float,
    temperature: float,
    direction: int,
    temperature_power: float,
    ignore_index: int,
    need_grad: bool,
) -> tuple[Tensor, ...]:
    unit_grad = _new(logits, *logits.shape) if need_grad else _new(logits, 0)
    return _new(logits), _new(logits), _new(logits), unit_grad


def _distillation_loss_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.need_grad, ctx.sources = inputs[-1], len(inputs[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3], inputs[0])


def _distillation_loss_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
    _require_saved(ctx, "distillation_loss")
    grad = torch.ops.pycdgkd.distillation_loss_backward(grad_loss, *ctx.saved_tensors)
    return grad, [None] * ctx.sources, *[None] * 8


_register(
    "distillation_loss",
    _distillation_loss_fake,
    _distillation_loss_backward,
    _distillation_loss_setup,
)
_register("distillation_loss_backward", _scaled_gradient_fake)
