"""The ops under ``torch.ops.pycdgkd``: shapes for tracing, gradients, registration, op by op.

Importing this module loads the compiled library, which registers the schemas (csrc/schemas.cpp)
and the kernels; what the quantities mean is said in ``pycdgkd.losses``. Gradients that a forward
pass already holds are saved, never recomputed: ``residual`` is P - Y (N, K) of the distance
softmax, ``unit_grad`` the gradient for grad_loss = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

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

FEW_CLASSES = 32  # csrc/cpu_modality.h: up to here an (N, K) residual is kept for the backward pass
SMALL_FEATURES = 1 << 18  # csrc/cpu_teacher_ops.cpp: up to here gradients are made at once
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


_autograd: Any = cast(Any, torch.library.Library)("pycdgkd", "IMPL")


def _register_differentiable(name: str, fake: Any, call: Any) -> None:
    """``call`` takes the op's arguments; it is also what the public functions call directly.

    A hand-written ``torch.autograd.Function`` costs a third of what ``register_autograd`` adds to
    each call (it flattens every argument), which at the paper's batch is most of the time.
    """
    torch.library.register_fake(f"pycdgkd::{name}", fake)
    _autograd.impl(name, call, "Autograd")


def _kernel(op: Any, *arguments: Any) -> Any:
    """The op below autograd: the functions of this file attach the graph themselves."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _backward_kernel(op: Any, *arguments: Any) -> Any:
    """A backward op; where a graph of it is asked for, autograd says that there is none."""
    return op(*arguments) if torch.is_grad_enabled() else _kernel(op, *arguments)


def _wants_graph(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _can_look(grad_loss: Tensor) -> bool:
    """Whether values may be looked at here: on the CPU (a device would have to be waited for), not
    while tracing (tensor subclasses), nor where a graph of the gradient is asked for.
    """
    return type(grad_loss) is Tensor and grad_loss.is_cpu and not torch.is_grad_enabled()


def _is_final(grad_loss: Tensor, unit_grad: Tensor, like: Tensor) -> bool:
    """Whether the gradient that the forward pass left for grad_loss = 1 can be handed out itself:
    only if the graph is not kept for another pass.
    """
    return (
        _can_look(grad_loss)
        and grad_loss.dim() == 0
        and unit_grad.dtype == like.dtype
        and not _graph_is_kept()
        and grad_loss.item() == 1.0
    )


# Without the means to ask, assume that the graph is kept.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


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
    need_features: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    rows, classes = features.shape[0], prototypes.shape[0]
    by_row = reduction == REDUCTIONS["none"]
    loss = _new(features, rows) if by_row else _new(features)
    saved = []
    if need_features or need_prototypes:
        if classes <= FEW_CLASSES:
            saved = [_new(features, rows, classes)]
        elif not by_row:
            wanted = ((features, need_features), (prototypes, need_prototypes))
            saved = [_new(x, *x.shape) if need else _new(x, 0) for x, need in wanted]
    return loss, _new(features, rows), saved


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        outputs: Any,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        class_counts: Tensor | None,
        *options: Any,
    ) -> Tensor:
        loss, _, saved = outputs
        ctx.options = options
        ctx.save_for_backward(features, prototypes, labels, class_counts, *saved)
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        features, prototypes, labels, class_counts, *saved = ctx.saved_tensors
        *options, need_features, need_prototypes = ctx.options
        _, want_features, want_prototypes, *_ = ctx.needs_input_grad
        enough = need_features >= want_features and need_prototypes >= want_prototypes
        _require_saved(enough, "prototype_loss")
        if len(saved) == 2 and not need_prototypes and _is_final(grad_loss, saved[0], features):
            return None, saved[0], *[None] * 8
        grad_features, grad_prototypes = _backward_kernel(
            _prototype_loss_backward, grad_loss, saved, features, prototypes,
            labels, class_counts, *options, need_features, need_prototypes,
        )  # fmt: skip
        return (
            None,
            grad_features if need_features else None,
            grad_prototypes if need_prototypes else None,
            *[None] * 7,
        )


def prototype_loss(
    features: Tensor, prototypes: Tensor, labels: Tensor, *options: Any
) -> tuple[Any, ...]:
    """The op with its gradient; arguments as in csrc/schemas.cpp."""
    outputs: tuple[Any, ...] = _kernel(_prototype_loss, features, prototypes, labels, *options)
    if not _wants_graph(features, prototypes):
        return outputs
    loss = _PrototypeLoss.apply(outputs, features, prototypes, labels, *options)
    return loss, *outputs[1:]


def _prototype_loss_backward_fake(
    grad_loss: Tensor,
    saved: Sequence[Tensor],
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    class_counts: Tensor | None,
    scale: float,
    reduction: int,
    ignore_index: int,
    need_features: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    return (
        _new(features, *(features.shape if need_features else (0,)), dtype=features.dtype),
        _new(prototypes, *(prototypes.shape if need_prototypes else (0,))),
    )


def _require_saved(need_grad: bool, op: str) -> None:
    if not need_grad:
        raise RuntimeError(
            f"pycdgkd.{op}: called without need_grad, but its gradient is asked for; "
            "call the public function, or ask for it"
        )


_prototype_loss = torch.ops.pycdgkd.prototype_loss.default
_prototype_loss_backward = torch.ops.pycdgkd.prototype_loss_backward.default
_register_differentiable("prototype_loss", _prototype_loss_fake, prototype_loss)
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


def _padded(count: int | torch.SymInt) -> Any:
    return (count + 15) // 16 * 16


def _centred_size(width: int | torch.SymInt, classes: int | torch.SymInt) -> Any:
    """Elements of one modality's centred prototypes (csrc/kernels.h: CentrePrototypes)."""
    rows = 3 if classes == 2 else classes
    return (1 + rows) * _padded(width) + _padded(classes)


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
    need_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    rows, classes = logits.shape
    count, few = len(features), classes <= FEW_CLASSES
    dtype = arithmetic_dtype(logits.dtype)
    small = few and sum(z.numel() for z in features) <= SMALL_FEATURES
    saved = []
    if need_grad and not need_prototypes and small and all(z.dtype == dtype for z in features):
        saved = [_new(logits, *logits.shape), *(_new(z, *z.shape) for z in features)]
    elif need_grad:
        saved = [
            _new(logits, 4 + 3 * count, dtype=torch.float64),
            _new(logits, sum(_centred_size(z.shape[1], classes) for z in features)),
            _new(logits, 1 + count if few else 1, rows, classes),
        ]
    return (
        _new(logits),
        _new(logits),
        _new(logits, count),
        _new(logits, count),
        _new(logits, count),
        saved,
    )


class _TeacherLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        outputs: Any,
        modalities: int,
        options: tuple[Any, ...],
        labels: Tensor,
        class_counts: Tensor | None,
        logits: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        saved = outputs[5]
        ctx.options, ctx.modalities, ctx.prototypes = options, modalities, len(rest) - modalities
        ctx.wanted = ctx.needs_input_grad[6:]
        ctx.save_for_backward(labels, class_counts, logits, *rest[:modalities], *saved)
        return cast(Tensor, outputs[0])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        _, scale, ignore_index, need_grad, need_prototypes = ctx.options
        wanted, given = ctx.wanted[: ctx.modalities], any(ctx.wanted[ctx.modalities :])
        _require_saved(need_grad and need_prototypes >= given, "teacher_loss")
        idle = [False] * ctx.modalities
        labels, class_counts, logits, *rest = ctx.saved_tensors
        features, saved = rest[: ctx.modalities], rest[ctx.modalities :]
        if saved[0].dim() == 2:  # gradients made at once
            if _is_final(grad_loss, saved[0], logits):
                return *[None] * 5, *saved, *[None] * ctx.prototypes
        elif _can_look(grad_loss):
            idle = [factor == 0 for factor in saved[0][-ctx.modalities :].tolist()]
        needed = [int(want and not still) for want, still in zip(wanted, idle, strict=True)]
        grad_logits, grad_features, grad_prototypes = _backward_kernel(
            _teacher_loss_backward, grad_loss, saved, logits, features, labels, class_counts, scale,
            ignore_index, needed, need_prototypes,
        )  # fmt: skip
        for m, z in enumerate(features):
            if not needed[m]:
                # The fastest modality's loss weighs 0: a zero that takes no memory, as of sum().
                grad_features[m] = z.new_zeros(()).expand(z.shape) if wanted[m] else None
        if not need_prototypes:
            grad_prototypes = [None] * ctx.prototypes
        return *[None] * 5, grad_logits, *grad_features, *grad_prototypes


def teacher_loss(
    logits: Tensor,
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    labels: Tensor,
    class_counts: Tensor | None,
    *options: Any,
) -> tuple[Any, ...]:
    """The op with its gradient; arguments as in csrc/schemas.cpp."""
    arguments = (logits, features, prototypes, labels, class_counts, *options)
    return attach_teacher_gradient(_kernel(_teacher_loss, *arguments), *arguments)


def attach_teacher_gradient(
    outputs: tuple[Any, ...],
    logits: Tensor,
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    labels: Tensor,
    class_counts: Tensor | None,
    *options: Any,
) -> tuple[Any, ...]:
    """Make the op's outputs the result of a differentiable call with these arguments."""
    if not _wants_graph(logits, *features, *prototypes):
        return outputs
    loss = _TeacherLoss.apply(
        outputs, len(features), options, labels, class_counts, logits, *features, *prototypes
    )
    return loss, *outputs[1:]


def _teacher_loss_backward_fake(
    grad_loss: Tensor,
    saved: Sequence[Tensor],
    logits: Tensor,
    features: Sequence[Tensor],
    labels: Tensor,
    class_counts: Tensor | None,
    scale: float,
    ignore_index: int,
    need_features: Sequence[int],
    need_prototypes: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    shapes = [(logits.shape[1], z.shape[1]) if need_prototypes else (0,) for z in features]
    wanted = zip(features, need_features, strict=True)
    return (
        _new(logits, *logits.shape, dtype=logits.dtype),
        [_new(z, *(z.shape if need else (0,)), dtype=z.dtype) for z, need in wanted],
        [_new(logits, *shape) for shape in shapes],
    )


_teacher_loss = torch.ops.pycdgkd.teacher_loss.default
_teacher_loss_backward = torch.ops.pycdgkd.teacher_loss_backward.default
_register_differentiable("teacher_loss", _teacher_loss_fake, teacher_loss)
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


class _WithUnitGrad(torch.autograd.Function):
    """A loss whose gradient of the logits, for grad_loss = 1, the forward pass has left."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, outputs: tuple[Tensor, ...], backward: Any, need_grad: bool
    ) -> Tensor:
        ctx.backward_op, ctx.need_grad = backward, need_grad
        ctx.save_for_backward(logits, outputs[-1])
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        name = ctx.backward_op.name().removeprefix("pycdgkd::").removesuffix("_backward")
        _require_saved(ctx.need_grad, name)
        logits, unit_grad = ctx.saved_tensors
        if _is_final(grad_loss, unit_grad, logits):
            return unit_grad, None, None, None
        return _backward_kernel(ctx.backward_op, grad_loss, unit_grad, logits), None, None, None


def _with_unit_grad(
    op: Any, backward: Any, logits: Tensor, options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _kernel(op, logits, *options)
    if not _wants_graph(logits):
        return outputs
    return _WithUnitGrad.apply(logits, outputs, backward, options[-1]), *outputs[1:]


def multi_source_kl(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """The op with its gradient; arguments as in csrc/schemas.cpp."""
    return _with_unit_grad(_multi_source_kl, _multi_source_kl_backward, logits, options)


_multi_source_kl = torch.ops.pycdgkd.multi_source_kl.default
_multi_source_kl_backward = torch.ops.pycdgkd.multi_source_kl_backward.default
_register_differentiable("multi_source_kl", _multi_source_kl_fake, multi_source_kl)
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


def distillation_loss(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """The op with its gradient; arguments as in csrc/schemas.cpp."""
    return _with_unit_grad(_distillation_loss, _distillation_loss_backward, logits, options)


_distillation_loss = torch.ops.pycdgkd.distillation_loss.default
_distillation_loss_backward = torch.ops.pycdgkd.distillation_loss_backward.default
_register_differentiable("distillation_loss", _distillation_loss_fake, distillation_loss)
_register("distillation_loss_backward", _scaled_gradient_fake)


# ---- temporal_conv -------------------------------------------------------------------------------


def _temporal_conv_fake(
    eeg: Tensor, weight: Tensor, bias: Tensor, pool: int, slope: float
) -> Tensor:
    batch, chans, times = eeg.shape
    kernels, length = weight.shape
    steps = (times - length + 1) // pool
    return _new(eeg, batch, kernels, chans, steps, dtype=eeg.dtype)


class _TemporalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eeg: Tensor, weight: Tensor, bias: Tensor, pool: int, slope: float
    ) -> Tensor:
        ctx.options = pool, slope
        ctx.save_for_backward(eeg, weight, bias)
        return cast(Tensor, _kernel(_temporal_conv, eeg, weight, bias, pool, slope))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (*ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[0])
        grads = _backward_kernel(_temporal_conv_backward, grad, *arguments)
        wanted = zip(grads, ctx.needs_input_grad[:3], strict=True)
        return *(grad if needed else None for grad, needed in wanted), None, None


def temporal_conv(eeg: Tensor, weight: Tensor, bias: Tensor, pool: int, slope: float) -> Tensor:
    """The op with its gradient, which computes the activations anew instead of keeping them.

    ``eeg`` (B, C, L), ``weight`` (T, k), ``bias`` (T,) -> (B, T, C, M), M = (L - k + 1) // pool:
    convolution along time, LeakyReLU of that slope, mean of ``pool`` neighbours.
    """
    return cast(Tensor, _TemporalConv.apply(eeg, weight, bias, pool, slope))


def _temporal_conv_backward_fake(
    grad: Tensor,
    eeg: Tensor,
    weight: Tensor,
    bias: Tensor,
    pool: int,
    slope: float,
    need_eeg: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _new(eeg, *(eeg.shape if need_eeg else (0,)), dtype=eeg.dtype),
        _new(weight, *weight.shape, dtype=weight.dtype),
        _new(bias, *bias.shape, dtype=bias.dtype),
    )


_temporal_conv = torch.ops.pycdgkd.temporal_conv.default
_temporal_conv_backward = torch.ops.pycdgkd.temporal_conv_backward.default
_register_differentiable("temporal_conv", _temporal_conv_fake, temporal_conv)
_register("temporal_conv_backward", _temporal_conv_backward_fake)
