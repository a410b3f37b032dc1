"""The method's losses: prototype rebalancing (Eqs. 1-6) and dense guidance (Eq. 9), fused.

Letters: N rows, D feature width, K classes, S sources, M modalities. Feature and logit tensors may
be float32, float64, bfloat16 or float16 with any strides; arithmetic and returned losses are in
float32 (float64 for float64, which must not be mixed with lower precision), whatever autocast says.
Labels are int64, int32 or uint8. Rows labelled ``ignore_index`` take no part. Without a row that
takes part, a mean is NaN and its gradient zero, as in ``torch.nn.functional.cross_entropy``.

Wrong options raise ``ValueError``, wrong tensors ``RuntimeError``; the message names the function,
the argument, what was expected and what came. Equations are those of the paper (IJCAI 2025);
``pycdgkd.reference`` states them in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import ops
from .checks import check, check_choice
from .distributed import all_reduce_class_means, global_teacher_loss

_ops = torch.ops.pycdgkd


class ClassPrototypes(NamedTuple):
    """Eq. 1: class means and how many rows each was taken over."""

    prototypes: Tensor  # (K, D)
    counts: Tensor  # (K,) int64


class PrototypeLoss(NamedTuple):
    """Eqs. 2-3."""

    loss: Tensor  # scalar, or (N,)
    true_prob: Tensor  # (N,), no gradient


class TeacherLoss(NamedTuple):
    """Eq. 5 and its parts; only ``loss`` carries a gradient."""

    loss: Tensor  # scalar
    cross_entropy: Tensor  # scalar
    prototype_losses: Tensor  # (M,)
    convergence_rates: Tensor  # (M,)
    modality_weights: Tensor  # (M,)


class DistillationLoss(NamedTuple):
    """Eq. 9 and its parts; only ``loss`` carries a gradient."""

    loss: Tensor  # scalar
    cross_entropy: Tensor  # scalar
    kl: Tensor  # scalar


def class_prototypes(
    features: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = -100
) -> ClassPrototypes:
    """Class means of the features (Eq. 1).

    Args:
        features: (N, D).
        labels: (N,) classes from 0 to num_classes - 1, or ignore_index.
        num_classes: K.
        ignore_index: label of rows that take no part.

    Returns:
        prototypes (K, D) in the arithmetic dtype (a zero row for an absent class), differentiable
        in ``features``; counts (K,) int64.
    """
    prototypes, counts = _ops.class_prototypes([features], labels, num_classes, ignore_index)
    return ClassPrototypes(prototypes[0], counts)


def prototype_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    class_counts: Tensor | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> PrototypeLoss:
    """Cross-entropy of the softmax over negative squared distances to the prototypes (Eqs. 2-3).

    Args:
        features: (N, D).
        prototypes: (K, D).
        labels: (N,).
        class_counts: (K,); classes of count 0 take no part, neither as candidates nor with rows
            that bear their label. None: all classes take part.
        scale: factor of the squared distance, > 0. The paper's is 1; 1/D keeps wide features from
            saturating the softmax.
        reduction: "mean" over the rows that take part, "sum", or "none".
        ignore_index: label of rows that take no part (loss 0, true_prob 0).

    Returns:
        loss, differentiable in features and prototypes; true_prob (N,), detached.
    """
    check("prototype_loss", "scale", scale, 0 < scale < math.inf, "a finite number above 0")
    check_choice("prototype_loss", "reduction", reduction, ops.REDUCTIONS)
    loss, true_prob, _ = _implementation().prototype_loss(
        features,
        prototypes,
        labels,
        _counts(class_counts),
        scale,
        ops.REDUCTIONS[reduction],
        ignore_index,
        _need_grad(features),
        _need_grad(prototypes),
    )
    return PrototypeLoss(loss, true_prob)


def convergence_rates(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    labels: Tensor,
    *,
    class_counts: Tensor | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Sum over the batch of the true class's probability, for each of M modalities (Eq. 4).

    Args:
        features: M tensors (N, D_m).
        prototypes: M tensors (K, D_m).
        labels: (N,).
        class_counts, scale, ignore_index: as in ``prototype_loss``.

    Returns:
        (M,) rates between 0 and N; no gradient.
    """
    check("convergence_rates", "scale", scale, 0 < scale < math.inf, "a finite number above 0")
    features, prototypes = _modalities("convergence_rates", features, prototypes)
    with torch.no_grad():
        rates = _ops.convergence_rates(
            features, prototypes, labels, _counts(class_counts), scale, ignore_index
        )
    return cast(Tensor, rates)


def modality_weights(convergence_rates: Tensor) -> Tensor:
    """Weight of each modality's prototype loss (Eq. 6): clip((max r - r_m) / r_m, 0, 1).

    Args:
        convergence_rates: (M,), M >= 1.

    Returns:
        (M,) in [0, 1]; the fastest modality gets 0. A rate of 0 beside a larger one gives 1, all
        rates 0 give 0. No gradient.
    """
    with torch.no_grad():
        return cast(Tensor, _ops.modality_weights(convergence_rates))


def teacher_loss(
    logits: Tensor,
    features: Sequence[Tensor],
    labels: Tensor,
    prototypes: Sequence[Tensor] | None = None,
    *,
    class_counts: Tensor | None = None,
    proto_weight: float = 0.5,
    scale: float = 1.0,
    detach_prototypes: bool = True,
    ignore_index: int = -100,
    process_group: Any = None,
) -> TeacherLoss:
    """The rebalanced teacher's loss (Eq. 5): (1 - alpha) CE + alpha sum_m lambda_m L_proto^m.

    One op forward and one backward for all modalities (batch means that are not detached take one
    more each way). lambda is never differentiated.

    Args:
        logits: (N, K) of the fused classifier.
        features: M tensors (N, D_m), one a modality.
        labels: (N,).
        prototypes: M tensors (K, D_m), for instance of a ``PrototypeBank`` for each modality. None:
            the class means of this batch. Batch means contain each row itself, so that wide noise
            looks separable; prefer prototypes of the whole training set.
        class_counts: (K,), as in ``prototype_loss``; only with given prototypes.
        proto_weight: the paper's alpha, in [0, 1].
        scale: as in ``prototype_loss``.
        detach_prototypes: no gradient into the prototypes (nor, for batch means, through them).
        ignore_index: label of rows that take no part.
        process_group: a ``torch.distributed`` group. Rates, weights, batch means and the divisor
            are then those of the global batch, and the reported values are the global ones; the
            mean of the ranks' gradients (what DistributedDataParallel forms) is the gradient of
            the global batch, whatever share of it each rank holds.

    Returns:
        ``TeacherLoss``; ``loss`` is differentiable in logits, features and, unless detached,
        prototypes.
    """
    name = "teacher_loss"
    check(name, "scale", scale, 0 < scale < math.inf, "a finite number above 0")
    check(name, "proto_weight", proto_weight, 0 <= proto_weight <= 1, "a number from 0 to 1")
    check(name, "logits", tuple(logits.shape), logits.dim() == 2, "shape (N, K)")
    features, given = _modalities(name, features, prototypes)
    counts = _counts(class_counts)
    if prototypes is None:
        if class_counts is not None:
            raise ValueError(
                f"pycdgkd.{name}: class_counts: expected None beside prototypes=None (the batch's "
                "own counts are used), got a tensor"
            )
        if process_group is not None or not detach_prototypes:  # else the op takes the means itself
            means_of = [z.detach() for z in features] if detach_prototypes else features
            given, batch = _ops.class_prototypes(means_of, labels, logits.shape[-1], ignore_index)
            if process_group is not None:
                given, batch = all_reduce_class_means(given, batch, process_group)
            counts = batch
    elif features and not given:
        raise RuntimeError(
            f"pycdgkd.{name}: prototypes: expected as many tensors as features "
            f"({len(features)}), got 0"
        )
    elif detach_prototypes:
        given = [c.detach() for c in given]
    arguments = (
        logits, features, given, labels, counts, proto_weight, scale, ignore_index,
        _need_grad(logits, *features, *given), _need_grad(*given),
    )  # fmt: skip
    if process_group is not None:
        return TeacherLoss(*global_teacher_loss(arguments, process_group))
    return TeacherLoss(*_implementation().teacher_loss(*arguments)[:5])


def multi_source_kl(
    logits: Tensor,
    sources: Tensor | Sequence[Tensor],
    *,
    source_weights: Tensor | None = None,
    temperature: float = 1.0,
    direction: str = "reverse",
    reduction: str = "mean",
) -> Tensor:
    """sum_j w_j KL between one student and S sources, straight from logits (Eq. 9, second term).

    Args:
        logits: (N, K) of the student.
        sources: (S, N, K), or S tensors (N, K), which are not stacked. Detached: one that requires
            a gradient is refused.
        source_weights: (S,), used as they are; None means 1/S each. A source of weight 0 is not
            read; all zeros give 0 with zero gradient.
        temperature: T > 0; softmax(logits / T) on both sides. No factor T^2.
        direction: "reverse" is KL(student || source), as the paper prints it; "forward" is
            KL(source || student), the usual distillation loss.
        reduction: "mean" over rows, "sum", or "none".

    Returns:
        scalar or (N,), never negative, +inf only where the first distribution has mass and the
        second has none (-inf logits); differentiable in ``logits`` alone.
    """
    name = "multi_source_kl"
    check_choice(name, "reduction", reduction, ops.REDUCTIONS)
    source_list = _sources(name, sources, source_weights, temperature, direction)
    loss, _ = _implementation().multi_source_kl(
        logits,
        source_list,
        source_weights,
        temperature,
        ops.DIRECTIONS[direction],
        ops.REDUCTIONS[reduction],
        _need_grad(logits),
    )
    return cast(Tensor, loss)


def distillation_loss(
    logits: Tensor,
    sources: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    kd_weight: float = 0.5,
    temperature: float = 2.0,
    direction: str = "reverse",
    temperature_power: float = 0,
    source_weights: Tensor | None = None,
    ignore_index: int = -100,
) -> DistillationLoss:
    """The densely guided student's loss (Eq. 9): (1 - beta) CE + beta T^a sum_j w_j KL.

    Args:
        logits: (N, K) of the student.
        sources, source_weights, temperature, direction: as in ``multi_source_kl``.
        labels: (N,).
        kd_weight: the paper's beta, in [0, 1].
        temperature_power: a; 0 as in the paper, 2 as in Hinton's distillation.
        ignore_index: label of rows that take part in neither term.

    Returns:
        ``DistillationLoss``; the cross-entropy is at temperature 1. ``loss`` is differentiable in
        ``logits`` alone.
    """
    name = "distillation_loss"
    check(name, "kd_weight", kd_weight, 0 <= kd_weight <= 1, "a number from 0 to 1")
    finite = -math.inf < temperature_power < math.inf
    check(name, "temperature_power", temperature_power, finite, "a finite number")
    source_list = _sources(name, sources, source_weights, temperature, direction)
    outputs = _implementation().distillation_loss(
        logits,
        source_list,
        labels,
        source_weights,
        kd_weight,
        temperature,
        ops.DIRECTIONS[direction],
        temperature_power,
        ignore_index,
        _need_grad(logits),
    )
    return DistillationLoss(*outputs[:3])


def _implementation() -> Any:
    """The functions that attach gradients at once; a compiler wants to see the ops themselves."""
    return _ops if torch.compiler.is_compiling() else ops


def _need_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _counts(class_counts: Tensor | None) -> Tensor | None:
    return None if class_counts is None else class_counts.to(torch.int64)


def _modalities(
    op: str, features: Sequence[Tensor], prototypes: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    for name, value in (("features", features), ("prototypes", prototypes)):
        if isinstance(value, Tensor):
            raise ValueError(
                f"pycdgkd.{op}: {name}: expected a sequence of tensors, one for each modality, "
                f"got one tensor of shape {tuple(value.shape)}"
            )
    return list(features), list(prototypes or ())


def _sources(
    op: str,
    sources: Tensor | Sequence[Tensor],
    source_weights: Tensor | None,
    temperature: float,
    direction: str,
) -> list[Tensor]:
    finite = 0 < temperature < math.inf
    check(op, "temperature", temperature, finite, "a finite number above 0")
    check_choice(op, "direction", direction, ops.DIRECTIONS)
    if isinstance(sources, Tensor):
        shape = tuple(sources.shape)
        check(op, "sources", shape, sources.dim() == 3, "shape (S, N, K) or a sequence of (N, K)")
        sources = sources.unbind(0)
    for index, source in enumerate(sources):
        _refuse_gradient(op, f"sources[{index}]", source)
    if source_weights is not None:
        _refuse_gradient(op, "source_weights", source_weights)
    return list(sources)


def _refuse_gradient(op: str, name: str, fixed: Tensor) -> None:
    if fixed.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"pycdgkd.{op}: {name}: expected a tensor without gradient (sources and their weights "
            "are fixed), got one that requires grad; detach() it"
        )
