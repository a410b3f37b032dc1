from __future__ import annotations

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
    leaf,
    make_features,
    make_labels,
    make_prototypes,
)
from torch import Tensor

import pycdgkd
from pycdgkd import reference


def compare(
    features: Tensor,
    labels: Tensor,
    K: int,
    *,
    ignore_index: int = -100,
    tolerance: float | None = None,
) -> None:
    """Means, counts and the gradient for a random output gradient against the reference."""
    dtype = features.dtype
    exact = double_leaf(features)
    expected, expected_counts = reference.class_prototypes(
        exact, labels, K, ignore_index=ignore_index
    )
    fused = features.detach().requires_grad_()
    prototypes, counts = pycdgkd.class_prototypes(fused, labels, K, ignore_index=ignore_index)
    assert_value(prototypes, expected, dtype, tolerance)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, expected_counts)
    assert not counts.requires_grad
    grad_output = torch.randn(expected.shape, dtype=prototypes.dtype)
    expected.backward(grad_output.double())
    prototypes.backward(grad_output)
    assert exact.grad is not None
    assert_grad(fused.grad, exact.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 7, 64, 513])
@pytest.mark.parametrize("K", [1, 2, 5, 33])
@pytest.mark.parametrize("N", [1, 2, 17, 129])
def test_matches_reference(dtype: torch.dtype, N: int, K: int, D: int) -> None:
    labels = make_labels(N, K)
    features = make_features(make_prototypes(K, D, dtype=dtype), labels)
    compare(features, labels, K)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype, layout: str) -> None:
    labels = make_labels(33, 3)
    features = make_features(make_prototypes(3, 70, dtype=dtype), labels)
    compare((LAYOUTS | {"expanded": expanded})[layout](features), labels, 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("contiguous", [True, False])
def test_label_types(dtype: torch.dtype, contiguous: bool) -> None:
    labels = make_labels(40, 5, dtype=dtype)
    labels = labels if contiguous else labels.repeat_interleave(3)[1::3]
    compare(make_features(make_prototypes(5, 9), labels), labels, 5)


@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 255])
def test_ignored_rows_and_absent_classes(ignore_index: int) -> None:
    dtype = torch.uint8 if ignore_index == 255 else torch.int64
    labels = torch.tensor([0, 4, 0, 4, 6, 4, 0, 6], dtype=dtype)
    labels[[1, 4]] = ignore_index
    features = torch.randn(8, 5)
    features[[1, 4]] = torch.nan  # an ignored row is not read
    prototypes, counts = pycdgkd.class_prototypes(features, labels, 7, ignore_index=ignore_index)
    assert counts.tolist() == [3, 0, 0, 0, 2, 0, 1]
    assert torch.equal(prototypes[[1, 2, 3, 5]], torch.zeros(4, 5))
    torch.testing.assert_close(prototypes[0], features[[0, 2, 6]].mean(0))
    torch.testing.assert_close(prototypes[4], features[[3, 5]].mean(0))
    assert torch.equal(prototypes[6], features[7])
    compare(features.nan_to_num(), labels, 7, ignore_index=ignore_index)


def test_empty_batch_and_all_ignored() -> None:
    for labels in (torch.zeros(0, dtype=torch.int64), torch.full((3,), -100)):
        features = torch.randn(len(labels), 4, requires_grad=True)
        prototypes, counts = pycdgkd.class_prototypes(features, labels, 3)
        assert torch.equal(prototypes, torch.zeros(3, 4))
        assert counts.tolist() == [0, 0, 0]
        prototypes.sum().backward()
        assert features.grad is not None
        assert torch.equal(features.grad, torch.zeros_like(features))


def test_far_features_keep_their_digits() -> None:
    """65536 rows at norm 1000: a plain float32 sum is off by 5e-4."""
    labels = make_labels(65536, 2)
    features = make_features(make_prototypes(2, 16, offset=1000.0), labels)
    prototypes, _ = pycdgkd.class_prototypes(features, labels, 2)
    expected, _ = reference.class_prototypes(features.double(), labels, 2)
    assert (prototypes - expected).abs().max() <= 2e-5  # half a unit in the last place of 250
    compare(features[:512], labels[:512], 2, tolerance=FAR_TOLERANCE / 100)


def test_gradient_of_several_tensors_where_one_is_unused() -> None:
    labels = make_labels(9, 3)
    first, second = leaf(torch.randn(9, 4)), leaf(torch.randn(9, 2))
    (used, _), _ = torch.ops.pycdgkd.class_prototypes([first, second], labels, 3, -100)
    used.square().sum().backward()
    exact = double_leaf(first)
    reference.class_prototypes(exact, labels, 3)[0].square().sum().backward()
    assert exact.grad is not None
    assert_grad(first.grad, exact.grad, torch.float32)
    assert second.grad is None or not second.grad.any()


def test_gradcheck() -> None:
    labels = torch.tensor([0, 2, -100, 2, 0, 0])
    features = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: pycdgkd.class_prototypes(z, labels, 4).prototypes, (features,)
    )
