from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    FAR_TOLERANCE,
    LAYOUTS,
    arithmetic,
    assert_grad,
    assert_same_bits,
    assert_value,
    double_leaf,
    expanded,
    expanded_columns,
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
        grad_output = torch.randn(expected.shape, dtype=loss.dtype, device="cpu").to(loss.device)
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


@pytest.mark.parametrize("D", [1, 7, 15, 16, 17, 31, 33, 130, 511])
@pytest.mark.parametrize("K", [*range(2, 34), 39, 40])
def test_every_number_of_few_classes(K: int, D: int) -> None:
    """Register tiles take 5, 3, 2 or 1 prototypes and 16 or 4 rows at a time."""
    compare(*problem((5, 13, 33, 50)[K % 4], K, D))


# Up to 40 classes fused (32 on a device); above, blocks of 32 to 512 rows, of which four at a time
# are summed.
SHAPES = [(2, 5, 64), (129, 31, 513), (17, 33, 64), (17, 41, 64), (129, 1001, 33)]
MANY_CLASSES = [
    *[(N, K, D) for K in (33, 41, 70, 300) for N, D in ((1, 7), (2, 1), (31, 33), (33, 130))],
    (127, 65, 15),
    (130, 1030, 5),  # prototypes' gradients are summed for 1024 classes at a time
    (1500, 70, 9),
    (2600, 65, 3),  # six blocks: one and a half groups
    (530, 4100, 2),  # five blocks of 128 rows
]


@pytest.mark.parametrize("D", [1, 2, 15, 16])
def test_thin_products_over_many_classes_keep_their_digits(D: int) -> None:
    """Some libraries sum them class by class: ten times the error that is allowed."""
    compare(*problem(200, 20000, D), scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "D"), SHAPES + MANY_CLASSES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions_and_larger_shapes(
    dtype: torch.dtype, N: int, K: int, D: int, reduction: str
) -> None:
    compare(*problem(N, K, D, dtype), reduction=reduction, scale=0.7)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [3, 70])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_strides(dtype: torch.dtype, layout: str, K: int, reduction: str) -> None:
    features, prototypes, labels = problem(50, K, 70, dtype)
    view = (LAYOUTS | {"expanded": expanded})[layout]
    # Prototypes must differ, or the exact gradient of the features is 0.
    other = (LAYOUTS | {"expanded": expanded_columns})[layout]
    compare(view(features), other(prototypes), labels, reduction=reduction)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_of_many_classes(dtype: torch.dtype, layout: str) -> None:
    features, prototypes, labels = problem(33, 70, 70, dtype)
    compare(LAYOUTS[layout](features), LAYOUTS[layout](prototypes), labels)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("K", [5, 70])
def test_label_types(dtype: torch.dtype, K: int) -> None:
    features, prototypes, labels = problem(40, K, 9)
    compare(features, prototypes, labels.to(dtype))
    compare(features, prototypes, labels.to(dtype).repeat_interleave(3)[1::3])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 1, 255])
@pytest.mark.parametrize("K", [2, 5, 70])
def test_ignored_rows(ignore_index: int, reduction: str, K: int) -> None:
    features, prototypes, labels = problem(40, K, 6)
    labels[[0, 7, 16, 39]] = ignore_index
    labels = labels.to(torch.uint8) if ignore_index == 255 else labels
    options = {"reduction": reduction, "ignore_index": ignore_index}
    compare(features, prototypes, labels, **options)
    ignored = labels == ignore_index
    results = []
    for content in (0.5, torch.nan):  # an ignored row is not read
        features[ignored] = content
        leaves = [x.clone().requires_grad_() for x in (features, prototypes)]
        loss, true_prob = pycdgkd.prototype_loss(*leaves, labels, **options)
        results.append([loss.detach(), true_prob, *torch.autograd.grad(loss.sum(), leaves)])
        assert not true_prob[ignored].any()
        assert not results[-1][2][ignored].any()
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts",
    [[1, 0], [0, 9], [3, 0, 1, 0, 0], [0, 0, 0, 0, 2], [1, 1, 1], [0, 3] * 35, [0] * 69 + [1]],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_absent_classes(dtype: torch.dtype, counts: list[int], reduction: str) -> None:
    """Rows of absent classes are among the labels; absent prototypes may hold anything."""
    class_counts = torch.tensor(counts)
    features, prototypes, labels = problem(33, len(counts), 7, dtype)
    options: dict[str, Any] = {"class_counts": class_counts, "reduction": reduction}
    compare(features, prototypes, labels, **options)
    results = []
    for content in (0.5, torch.nan):
        prototypes[class_counts == 0] = content
        leaves = [x.clone().requires_grad_() for x in (features, prototypes)]
        loss, true_prob = pycdgkd.prototype_loss(*leaves, labels, **options)
        results.append([loss.detach(), true_prob, *torch.autograd.grad(loss.sum(), leaves)])
        assert not results[-1][3][class_counts == 0].any()
    assert_same_bits(*results)


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
@pytest.mark.parametrize("K", [2, 3, 70])
def test_no_row_takes_part(labels: Tensor, K: int) -> None:
    features = torch.randn(len(labels), 4, requires_grad=True)
    prototypes = torch.randn(K, 4, requires_grad=True)
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
        loss, true_prob = pycdgkd.prototype_loss(features, prototypes, labels, reduction=reduction)
        assert torch.equal(loss.nan_to_num(-1.0), torch.tensor(expected).nan_to_num(-1.0))
        assert torch.equal(true_prob, torch.zeros(len(labels)))
        grads = torch.autograd.grad(loss, (features, prototypes))
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    rows, _ = pycdgkd.prototype_loss(features, prototypes, labels, reduction="none")
    assert torch.equal(rows, torch.zeros(len(labels)))
    grads = torch.autograd.grad(rows, (features, prototypes), torch.ones(len(labels)))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("K", [2, 3, 17, 70, 300])
@pytest.mark.parametrize("D", [2, 33, 512])
def test_features_far_from_the_origin(offset: float, K: int, D: int) -> None:
    """The textbook form 2 z.c - |c|^2 has 16 % error at norm 1000 and 100000 % at 10000."""
    compare(*problem(129, K, D, offset=offset, spread=3.0), tolerance=FAR_TOLERANCE)


@pytest.mark.parametrize("margin", [1.0, 6.0, 15.0, 30.0])
@pytest.mark.parametrize("K", [2, 3, 70])
def test_sure_rows_keep_a_relatively_exact_loss(margin: float, K: int) -> None:
    """Losses down to 1e-26, where p - 1 and log(p) have no digit left, in float64 either."""
    prototypes = torch.eye(K, max(K, 8)) * margin**0.5
    features = (prototypes + 0.1 * torch.randn(prototypes.shape)).requires_grad_()
    loss, _ = pycdgkd.prototype_loss(features, prototypes, torch.arange(K), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), features)

    z, c = features.detach().double(), prototypes.double()
    prob = (-torch.cdist(z, c).square()).softmax(1).fill_diagonal_(0.0)  # all but the true class
    others = prob.sum(1)
    # A float32 logit of size 80 is right to some 1e-5, and so, relatively, is its exponential; the
    # 4900 of K = 70 have farther outliers.
    rtol = 5e-5 if K <= 3 else 1e-4
    torch.testing.assert_close(loss.double(), -torch.log1p(-others), rtol=rtol, atol=0)
    expected = 2 * (prob @ c - others[:, None] * c)
    torch.testing.assert_close(grad.double()[:, :K], expected[:, :K], rtol=rtol, atol=0)


@pytest.mark.parametrize("more", [0, 30, 70])
def test_hopeless_rows_keep_their_loss_and_gradient(more: int) -> None:
    """True probability underflows to 0: ProxyNCA implementations drop such rows."""
    prototypes = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 40.0], *[[-99.0, 9.0]] * more])
    labels = torch.tensor([1, 2])
    features = torch.tensor([[0.0, 0.1], [29.0, 0.0]])
    compare(features, prototypes, labels, reduction="none")
    loss, true_prob = pycdgkd.prototype_loss(features, prototypes, labels, reduction="none")
    assert (loss > 890).all()
    assert torch.equal(true_prob, torch.zeros(2))


@pytest.mark.parametrize("K", [1, 2, 7, 64])  # 64: their float32 mean is exact
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
@pytest.mark.parametrize("kind", ["zero", "negative", "large", "some", "expanded"])
@pytest.mark.parametrize(("N", "K"), [(18, 2), (18, 4), (150, 70)])
def test_gradient_outputs(reduction: str, kind: str, N: int, K: int) -> None:
    features, prototypes, labels = problem(N, K, 5)
    shape = (N,) if reduction == "none" else ()
    grad_output = {
        "zero": torch.zeros(shape),
        "negative": -torch.rand(shape),
        "large": torch.full(shape, 2.0**16),
        "some": torch.randn(shape) * (torch.rand(shape) < 0.5),
        "expanded": torch.tensor(-1.5).expand(shape),
    }[kind]
    compare(features, prototypes, labels, reduction=reduction, grad_output=grad_output)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(18, 2), (18, 4), (18, 65), (1100, 70)])
def test_one_sided_gradients(
    dtype: torch.dtype, N: int, K: int, reduction: str, keep: bool
) -> None:
    features, prototypes, labels = problem(N, K, 5, dtype)
    weights = torch.rand(N if reduction == "none" else (), dtype=arithmetic(dtype))
    z, c = features.clone().requires_grad_(), prototypes.clone().requires_grad_()

    def grads(first: Tensor, second: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
        loss, _ = pycdgkd.prototype_loss(first, second, labels, reduction=reduction)
        return torch.autograd.grad(loss, wanted, weights, retain_graph=keep)

    both = grads(z, c, z, c)
    assert_same_bits(both, [*grads(z, prototypes, z), *grads(features, c, c)])
    assert_same_bits(both, [*grads(z, c, z), *grads(z, c, c)])


@pytest.mark.parametrize("K", [2, 4, 65])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("counts", [None, [2, 0, 1, 1, *range(61)]], ids=["all", "some"])
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
