from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    FAR_TOLERANCE,
    LAYOUTS,
    assert_grad,
    assert_value,
    double_leaf,
    expanded,
    make_features,
    make_labels,
    make_prototypes,
)
from torch import Tensor

import pycdgkd
from pycdgkd import reference


def compare(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    tolerance: float | None = None,
    grad_output: Tensor | None = None,
    **options: Any,
) -> None:
    """Loss, probabilities and both gradients; the tensors are used as they lie in memory."""
    dtype = features.dtype
    exact = [double_leaf(features), double_leaf(prototypes)]
    expected, expected_prob = reference.prototype_loss(*exact, labels, **options)
    fused = [x.detach().requires_grad_() for x in (features, prototypes)]
    loss, true_prob = pycdgkd.prototype_loss(*fused, labels, **options)
    assert_value(loss, expected, dtype, tolerance)
    assert_value(true_prob, expected_prob, dtype, tolerance)
    assert not true_prob.requires_grad
    if grad_output is None:
        grad_output = torch.randn(expected.shape, dtype=loss.dtype)
    expected.backward(grad_output.double())
    loss.backward(grad_output)
    for ours, theirs in zip(fused, exact, strict=True):
        assert theirs.grad is not None
        assert_grad(ours.grad, theirs.grad, dtype, tolerance)


def problem(
    N: int, K: int, D: int, dtype: torch.dtype = torch.float32, **options: float
) -> tuple[Tensor, Tensor, Tensor]:
    labels = make_labels(N, K)
    prototypes = make_prototypes(K, D, dtype=dtype, **options)
    return make_features(prototypes, labels), prototypes, labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2, 7, 33, 511])
@pytest.mark.parametrize("K", [1, 2, 3, 17])
@pytest.mark.parametrize("N", [1, 15, 16, 33])
def test_matches_reference(dtype: torch.dtype, N: int, K: int, D: int) -> None:
    compare(*problem(N, K, D, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "K", "D"), [(2, 5, 64), (129, 31, 513), (17, 33, 64), (129, 1001, 33)]
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions_and_larger_shapes(
    dtype: torch.dtype, N: int, K: int, D: int, reduction: str
) -> None:
    compare(*problem(N, K, D, dtype), reduction=reduction, scale=0.7)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype, layout: str) -> None:
    features, prototypes, labels = problem(33, 3, 70, dtype)
    view = (LAYOUTS | {"expanded": expanded})[layout]
    compare(view(features), view(prototypes), labels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_of_many_classes(dtype: torch.dtype, layout: str) -> None:
    features, prototypes, labels = problem(33, 40, 70, dtype)
    compare(LAYOUTS[layout](features), LAYOUTS[layout](prototypes), labels)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_label_types(dtype: torch.dtype) -> None:
    features, prototypes, labels = problem(40, 5, 9)
    compare(features, prototypes, labels.to(dtype))
    compare(features, prototypes, labels.to(dtype).repeat_interleave(3)[1::3])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 1, 255])
@pytest.mark.parametrize("K", [2, 5])
def test_ignored_rows(ignore_index: int, reduction: str, K: int) -> None:
    features, prototypes, labels = problem(20, K, 6)
    labels[[0, 7, 16]] = ignore_index
    labels = labels.to(torch.uint8) if ignore_index == 255 else labels
    options = {"reduction": reduction, "ignore_index": ignore_index}
    compare(features, prototypes, labels, **options)
    ignored = labels == ignore_index
    features[ignored] = torch.nan  # an ignored row is not read
    _, true_prob = pycdgkd.prototype_loss(features, prototypes, labels, **options)
    assert torch.equal(true_prob[ignored], torch.zeros(int(ignored.sum())))
    assert true_prob[~ignored].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[1, 0], [0, 9], [3, 0, 1, 0, 0], [0, 0, 0, 0, 2], [1, 1, 1]])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_absent_classes(dtype: torch.dtype, counts: list[int], reduction: str) -> None:
    """Rows of absent classes are among the labels; absent prototypes may hold anything."""
    class_counts = torch.tensor(counts)
    features, prototypes, labels = problem(33, len(counts), 7, dtype)
    options: dict[str, Any] = {"class_counts": class_counts, "reduction": reduction}
    compare(features, prototypes, labels, **options)
    fused = features.clone().requires_grad_()
    before = pycdgkd.prototype_loss(fused, prototypes, labels, **options)
    prototypes[class_counts == 0] = torch.nan
    after = pycdgkd.prototype_loss(fused, prototypes, labels, **options)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.true_prob, after.true_prob)
    (grad,) = torch.autograd.grad(after.loss.sum(), fused)
    assert grad.isfinite().all()


def test_counts_of_any_type_and_stride() -> None:
    features, prototypes, labels = problem(33, 3, 7)
    expected = pycdgkd.prototype_loss(
        features, prototypes, labels, class_counts=torch.tensor([1, 0, 5])
    )
    for counts in (
        torch.tensor([True, False, True]),
        torch.tensor([1.0, 0.0, 2.0]),
        torch.tensor([1, 9, 0, 9, 5, 9])[::2],
    ):
        loss, _ = pycdgkd.prototype_loss(features, prototypes, labels, class_counts=counts)
        assert torch.equal(loss, expected.loss)


@pytest.mark.parametrize("labels", [torch.zeros(0, dtype=torch.int64), torch.full((5,), -100)])
def test_no_row_takes_part(labels: Tensor) -> None:
    features = torch.randn(len(labels), 4, requires_grad=True)
    prototypes = torch.randn(3, 4, requires_grad=True)
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
        loss, true_prob = pycdgkd.prototype_loss(features, prototypes, labels, reduction=reduction)
        assert torch.equal(loss.nan_to_num(-1.0), torch.tensor(expected).nan_to_num(-1.0))
        assert torch.equal(true_prob, torch.zeros(len(labels)))
        grads = torch.autograd.grad(loss, (features, prototypes))
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    rows, _ = pycdgkd.prototype_loss(features, prototypes, labels, reduction="none")
    assert torch.equal(rows, torch.zeros(len(labels)))


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("K", [2, 3, 17])
@pytest.mark.parametrize("D", [2, 33, 512])
def test_features_far_from_the_origin(offset: float, K: int, D: int) -> None:
    """The textbook form 2 z.c - |c|^2 has 16 % error at norm 1000 and 100000 % at 10000."""
    compare(*problem(129, K, D, offset=offset, spread=3.0), tolerance=FAR_TOLERANCE)


@pytest.mark.parametrize("margin", [1.0, 6.0, 15.0, 30.0])
@pytest.mark.parametrize("K", [2, 3])
def test_sure_rows_keep_a_relatively_exact_loss(margin: float, K: int) -> None:
    """Losses down to 1e-26, where p - 1 and log(p) have no digit left, in float64 either."""
    prototypes = torch.eye(K, 8) * margin**0.5
    features = (prototypes + 0.1 * torch.randn(K, 8)).requires_grad_()
    loss, _ = pycdgkd.prototype_loss(features, prototypes, torch.arange(K), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), features)

    z, c = features.detach().double(), prototypes.double()
    prob = (-torch.cdist(z, c).square()).softmax(1).fill_diagonal_(0.0)  # all but the true class
    others = prob.sum(1)
    torch.testing.assert_close(loss.double(), -torch.log1p(-others), rtol=5e-5, atol=0)
    expected = 2 * (prob @ c - others[:, None] * c)
    torch.testing.assert_close(grad.double()[:, :K], expected[:, :K], rtol=5e-5, atol=0)


def test_hopeless_rows_keep_their_loss_and_gradient() -> None:
    """True probability underflows to 0: ProxyNCA implementations drop such rows."""
    prototypes = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 40.0]])
    labels = torch.tensor([1, 2])
    features = torch.tensor([[0.0, 0.1], [29.0, 0.0]])
    compare(features, prototypes, labels, reduction="none")
    loss, true_prob = pycdgkd.prototype_loss(features, prototypes, labels, reduction="none")
    assert (loss > 890).all()
    assert torch.equal(true_prob, torch.zeros(2))


@pytest.mark.parametrize("K", [1, 2, 7])
def test_equal_prototypes(K: int) -> None:
    prototypes = torch.randn(1, 6).repeat(K, 1).requires_grad_()
    features = torch.randn(20, 6, requires_grad=True)
    loss, true_prob = pycdgkd.prototype_loss(features, prototypes, make_labels(20, K))
    torch.testing.assert_close(loss, torch.tensor(float(K)).log())
    torch.testing.assert_close(true_prob, torch.full((20,), 1 / K))
    loss.backward()
    assert features.grad is not None
    assert torch.equal(features.grad, torch.zeros(20, 6))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["zero", "negative", "large", "expanded"])
def test_gradient_outputs(reduction: str, kind: str) -> None:
    features, prototypes, labels = problem(18, 4, 5)
    shape = (18,) if reduction == "none" else ()
    grad_output = {
        "zero": torch.zeros(shape),
        "negative": -torch.rand(shape),
        "large": torch.full(shape, 2.0**16),
        "expanded": torch.tensor(-1.5).expand(shape),
    }[kind]
    compare(features, prototypes, labels, reduction=reduction, grad_output=grad_output)


def test_one_sided_gradients() -> None:
    features, prototypes, labels = problem(18, 4, 5)
    z, c = features.clone().requires_grad_(), prototypes.clone().requires_grad_()
    both = torch.autograd.grad(pycdgkd.prototype_loss(z, c, labels).loss, (z, c))
    only_z = torch.autograd.grad(pycdgkd.prototype_loss(z, prototypes, labels).loss, (z,))
    only_c = torch.autograd.grad(pycdgkd.prototype_loss(features, c, labels).loss, (c,))
    assert torch.equal(both[0], only_z[0])
    assert torch.equal(both[1], only_c[0])


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("counts", [None, [2, 0, 1, 1]])
def test_gradcheck(K: int, reduction: str, counts: list[int] | None) -> None:
    labels = torch.tensor([0, 1, 0, -100, K - 1])
    features = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    prototypes = torch.randn(K, 3, dtype=torch.float64, requires_grad=True)
    class_counts = None if counts is None else torch.tensor(counts[:K])

    def loss(z: Tensor, c: Tensor) -> Tensor:
        return pycdgkd.prototype_loss(
            z, c, labels, class_counts=class_counts, scale=0.4, reduction=reduction
        ).loss

    assert torch.autograd.gradcheck(loss, (features, prototypes))
