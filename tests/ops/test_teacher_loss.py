from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    FAR_TOLERANCE,
    LAYOUTS,
    TOLERANCE,
    assert_grad,
    assert_same_bits,
    assert_value,
    double_leaf,
    expanded,
    expanded_columns,
    make_features,
    make_labels,
    make_logits,
    make_prototypes,
)
from torch import Tensor

import pycdgkd
from pycdgkd import reference

Problem = tuple[Tensor, list[Tensor], Tensor, list[Tensor]]


def problem(
    N: int, K: int, widths: Sequence[int], dtype: torch.dtype = torch.float32, offset: float = 0.0
) -> Problem:
    """Logits, features, labels, prototypes; modalities differ in how well they separate."""
    labels = make_labels(N, K)
    prototypes = [make_prototypes(K, D, dtype=dtype, offset=offset) for D in widths]
    features = [make_features(c, labels, noise=1.0 + m) for m, c in enumerate(prototypes)]
    return make_logits(N, K, dtype=dtype), features, labels, prototypes


def compare(
    logits: Tensor,
    features: list[Tensor],
    labels: Tensor,
    prototypes: list[Tensor] | None,
    *,
    tolerance: float | None = None,
    **options: Any,
) -> pycdgkd.TeacherLoss:
    dtype = logits.dtype
    given = [] if prototypes is None else prototypes
    M = len(features)
    exact = [double_leaf(x) for x in (logits, *features, *given)]
    fused = [x.detach().requires_grad_() for x in (logits, *features, *given)]

    def split(x: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor] | None]:
        return x[0], x[1 : 1 + M], labels, None if prototypes is None else x[1 + M :]

    expected = reference.teacher_loss(*split(exact), **options)
    result = pycdgkd.teacher_loss(*split(fused), **options)
    for ours, theirs in zip(result, expected, strict=True):
        assert_value(ours, theirs.detach(), dtype, tolerance)
    assert [x.requires_grad for x in result] == [True, False, False, False, False]
    expected[0].backward()
    result.loss.backward()
    detached = options.get("detach_prototypes", True)
    if prototypes is None and not detached and tolerance is None:
        # Two gradients, through the distances and through the means, each stored and then added
        # by autograd in the inputs' dtype: roundings of the larger of them.
        tolerance = TOLERANCE[dtype].grad + 4 * TOLERANCE[dtype].storage
    for index, (ours, theirs) in enumerate(zip(fused, exact, strict=True)):
        if index > M and detached:
            assert ours.grad is None
            continue
        assert theirs.grad is not None
        assert_grad(ours.grad, theirs.grad, ours.dtype, tolerance)
    return result


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "K", "widths"),
    [
        (1, 2, (1,)),
        (2, 3, (7, 33)),
        (15, 2, (64, 2)),
        (17, 5, (33, 1, 64)),
        (33, 1, (5, 6)),
        (129, 2, (511, 64)),
        (129, 31, (33, 7)),
        (1, 33, (7, 4)),
        (1, 65, (7, 4)),
        (33, 70, (9, 65)),
        (700, 300, (5,)),
    ],
)
def test_matches_reference(
    dtype: torch.dtype, N: int, K: int, widths: tuple[int, ...], given: bool, detach: bool
) -> None:
    logits, features, labels, prototypes = problem(N, K, widths, dtype)
    compare(
        logits,
        features,
        labels,
        prototypes if given else None,
        detach_prototypes=detach,
        proto_weight=0.7,
        scale=0.5,
    )


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3])
@pytest.mark.parametrize("K", [2, 70])
def test_features_far_from_the_origin(offset: float, K: int, given: bool, detach: bool) -> None:
    """Batch means are float32 tensors: at norm 1000 their own rounding is 4e-5 of the gradient."""
    logits, features, labels, prototypes = problem(129, K, (512, 64), offset=offset)
    compare(
        logits,
        features,
        labels,
        prototypes if given else None,
        detach_prototypes=detach,
        tolerance=FAR_TOLERANCE if given or offset < 1e3 else 2e-4,
    )


@pytest.mark.parametrize("proto_weight", [0.0, 0.5, 1.0])
# Not many classes at 0.01: rates differ by 0.2 %, and lambda is their difference over one of them.
@pytest.mark.parametrize(("K", "scale"), [(4, 0.01), (4, 1.0), (4, 3.0), (70, 0.3), (70, 3.0)])
def test_options(proto_weight: float, K: int, scale: float) -> None:
    compare(*problem(33, K, (9, 5)), proto_weight=proto_weight, scale=scale)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("K", [3, 70])
def test_any_strides(dtype: torch.dtype, layout: str, given: bool, K: int) -> None:
    view = (LAYOUTS | {"expanded": expanded})[layout]
    other = (LAYOUTS | {"expanded": expanded_columns})[layout]
    logits, features, labels, prototypes = problem(33, K, (70, 9), dtype)
    compare(
        view(logits),
        [view(z) for z in features],
        labels,
        [other(c) for c in prototypes] if given else None,
        detach_prototypes=False,
    )


@pytest.mark.parametrize(("N", "K"), [(33, 3), (99, 70)])
def test_mixed_lower_precisions(N: int, K: int) -> None:
    logits, features, labels, prototypes = problem(N, K, (16, 9))
    halves = [features[0].bfloat16(), features[1].half()]
    compare(logits, halves, labels, prototypes, detach_prototypes=False, scale=3.0)
    compare(logits, halves, labels, None, scale=3.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("ignore_index", [-100, 1, 255])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("K", [4, 41])
def test_labels_and_ignored_rows(
    dtype: torch.dtype, ignore_index: int, given: bool, K: int
) -> None:
    logits, features, labels, prototypes = problem(99, K, (9, 5))
    if dtype != torch.uint8 or ignore_index > 0:
        labels[[0, 5, 16]] = ignore_index
    labels = labels.to(dtype).repeat_interleave(2)[::2]
    options: dict[str, Any] = {"ignore_index": ignore_index, "detach_prototypes": False}
    args = (labels, prototypes if given else None)
    result = compare(logits, features, *args, **options)
    ignored = labels == ignore_index
    leaves = [x.requires_grad_() for x in (logits, *features, *(prototypes if given else ()))]
    expected = torch.autograd.grad(
        pycdgkd.teacher_loss(logits, features, *args, **options).loss, leaves
    )
    with torch.no_grad():
        for tensor in (logits, *features):
            tensor[ignored] = torch.nan  # an ignored row is not read
    again = pycdgkd.teacher_loss(logits, features, *args, **options)
    assert all(torch.equal(a, b) for a, b in zip(again, result, strict=True))
    assert_same_bits(torch.autograd.grad(again.loss, leaves), expected)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("K", [5, 70])
def test_absent_classes(given: bool, K: int) -> None:
    """Rows of an absent class still count in the cross-entropy."""
    logits, features, labels, prototypes = problem(60, K, (9, 5))
    if given:
        counts = torch.tensor([3, 0, 1, 0, 2] * (K // 5))
        compare(logits, features, labels, prototypes, class_counts=counts)
        compare(logits, features, labels, prototypes, class_counts=counts, detach_prototypes=False)
    else:
        labels[labels == 2] = 4
        compare(logits, features, labels, None, detach_prototypes=False)
        compare(logits, features, labels, None)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("K", [3, 70])
def test_one_class_in_the_batch_looks_converged(detach: bool, K: int) -> None:
    """With batch means: probability 1, rate N, loss and gradient 0."""
    logits, features, _, _ = problem(10, K, (4, 6))
    leaves = [z.requires_grad_() for z in features]
    result = pycdgkd.teacher_loss(logits, leaves, torch.full((10,), 2), detach_prototypes=detach)
    assert result.convergence_rates.tolist() == [10.0, 10.0]
    assert result.prototype_losses.tolist() == [0.0, 0.0]
    assert result.modality_weights.tolist() == [0.0, 0.0]
    torch.testing.assert_close(result.loss, 0.5 * result.cross_entropy)


@pytest.mark.parametrize("labels", [torch.zeros(0, dtype=torch.int64), torch.full((5,), -100)])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("K", [3, 70])
def test_no_row_takes_part(labels: Tensor, given: bool, K: int) -> None:
    N = len(labels)
    leaves = [torch.randn(N, K, requires_grad=True), torch.randn(N, 4, requires_grad=True)]
    prototypes = [torch.randn(K, 4)] if given else None
    result = pycdgkd.teacher_loss(leaves[0], leaves[1:], labels, prototypes)
    assert result.loss.isnan()
    assert result.cross_entropy.isnan()
    assert result.convergence_rates.tolist() == [0.0]
    assert result.modality_weights.tolist() == [0.0]
    grads = torch.autograd.grad(result.loss, leaves)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("K", [2, 70])
def test_no_class_seen_yet_leaves_the_cross_entropy(K: int) -> None:
    """A PrototypeBank before its first refresh: counts 0. The loss must not be NaN."""
    logits, features, labels, _ = problem(17, K, (4, 6))
    leaf = logits.requires_grad_()
    prototypes = [torch.zeros(K, 4), torch.zeros(K, 6)]
    result = pycdgkd.teacher_loss(
        leaf, features, labels, prototypes, class_counts=torch.zeros(K, dtype=torch.int64)
    )
    torch.testing.assert_close(result.loss, 0.5 * result.cross_entropy)
    assert result.prototype_losses.isnan().all()
    assert torch.autograd.grad(result.loss, leaf)[0].isfinite().all()


@pytest.mark.parametrize("K", [3, 70])
def test_undetached_batch_means_only_move_rows_against_each_other(K: int) -> None:
    """The loss does not change if all features of a modality move together."""
    logits, features, labels, _ = problem(129, K, (64, 33), torch.float64)
    leaves = [z.requires_grad_() for z in features]
    result = pycdgkd.teacher_loss(logits, leaves, labels, detach_prototypes=False, scale=0.1)
    for grad in torch.autograd.grad(result.loss, leaves):
        assert grad.sum(0).abs().max() <= 1e-14
    assert result.modality_weights.max() > 0


@pytest.mark.parametrize("K", [3, 70])
def test_weights_are_never_differentiated(K: int) -> None:
    """lambda moves the gradient by its value alone: as if it were a constant."""
    logits, features, labels, prototypes = problem(17, K, (4, 6), torch.float64)
    leaves = [z.requires_grad_() for z in features]
    result = pycdgkd.teacher_loss(logits, leaves, labels, prototypes)
    grads = torch.autograd.grad(result.loss, leaves)
    for m, grad in enumerate(grads):
        loss, _ = pycdgkd.prototype_loss(leaves[m], prototypes[m], labels)
        (alone,) = torch.autograd.grad(loss, leaves[m])
        torch.testing.assert_close(grad, 0.5 * result.modality_weights[m] * alone)


@pytest.mark.parametrize("grad_output", [0.0, -2.5, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [3, 70])
def test_gradient_outputs(dtype: torch.dtype, grad_output: float, K: int) -> None:
    logits, features, labels, prototypes = problem(18, K, (5, 9), dtype)
    tensors = [logits, *features, *prototypes]
    exact = [double_leaf(x) for x in tensors]
    fused = [x.clone().requires_grad_() for x in tensors]
    expected = reference.teacher_loss(
        exact[0], exact[1:3], labels, exact[3:], detach_prototypes=False
    )
    result = pycdgkd.teacher_loss(fused[0], fused[1:3], labels, fused[3:], detach_prototypes=False)
    (expected[0] * grad_output).backward()
    (result.loss * grad_output).backward()
    for ours, theirs in zip(fused, exact, strict=True):
        assert theirs.grad is not None
        assert_grad(ours.grad, theirs.grad, dtype)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("K", [3, 65])
def test_gradcheck(given: bool, detach: bool, K: int) -> None:
    """Means that are to be detached are passed as constants: numbers would see through detach."""
    logits, _, labels, prototypes = problem(7, K, (4, 2), torch.float64)
    # lambda is a constant of the method, so it is made one for the numerical derivative too: with
    # one modality sure and the other undecided it is clipped to 1, which a small step cannot move.
    labels[:3], labels[3] = torch.arange(3), -100
    prototypes = [prototypes[0] * 30.0, prototypes[1] * 0.05]
    features = [
        make_features(c, labels, noise=n) for c, n in zip(prototypes, (1.0, 0.1), strict=True)
    ]
    leaves = [x.requires_grad_() for x in (logits, *features)]
    means = [reference.class_prototypes(z.detach(), labels, K)[0] for z in features]
    chosen = prototypes if given else (means if detach else None)
    weights = pycdgkd.teacher_loss(logits, features, labels, chosen).modality_weights
    assert weights.tolist() == [0.0, 1.0]

    def loss(s: Tensor, *z: Tensor) -> Tensor:
        return pycdgkd.teacher_loss(s, z, labels, chosen, detach_prototypes=detach).loss

    assert torch.autograd.gradcheck(loss, leaves)
    if given and not detach:
        both = [*leaves, *(c.requires_grad_() for c in prototypes)]
        assert torch.autograd.gradcheck(
            lambda s, a, b, c, d: (
                pycdgkd.teacher_loss(s, [a, b], labels, [c, d], detach_prototypes=False).loss
            ),
            both,
        )


@pytest.mark.parametrize(
    ("K", "dtype"), [(2, torch.float32), (2, torch.bfloat16), (70, torch.float32)]
)
def test_an_infinite_cross_entropy_of_weight_0_takes_no_part(K: int, dtype: torch.dtype) -> None:
    logits, labels = make_logits(6, K), make_labels(6, 2)
    logits[0, 0], labels[0] = -torch.inf, 0
    features = [make_logits(6, 5, dtype=dtype) for _ in range(2)]
    result = pycdgkd.teacher_loss(logits, features, labels, proto_weight=1.0)
    assert result.cross_entropy == torch.inf
    weighted = (result.modality_weights * result.prototype_losses).sum()
    torch.testing.assert_close(result.loss, weighted)
