"""More rows than a device has warps: each of them takes several."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, assert_grad, assert_value, double_leaf
from torch import Tensor

import pycdgkd
from pycdgkd import reference


def problem(N: int, K: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of every kind: of all classes, ignored (their features are NaN), also the last."""
    labels = torch.arange(N) * 7 % K
    prototypes = torch.randn(K, D) / D**0.5
    features = prototypes[labels] + 0.3 * torch.randn(N, D)
    labels[5::11] = labels[-1] = -100
    features[labels == -100] = torch.nan
    return features.to(dtype), prototypes.to(dtype), labels


def compare(features: Tensor, prototypes: Tensor, labels: Tensor) -> None:
    exact = double_leaf(features.nan_to_num(0.0))
    expected, expected_prob = reference.prototype_loss(exact, prototypes.double(), labels)
    expected.backward()
    fused = features.detach().requires_grad_()
    loss, true_prob = pycdgkd.prototype_loss(fused, prototypes, labels)
    loss.backward()
    assert_value(loss, expected, features.dtype)
    assert_value(true_prob, expected_prob, features.dtype)
    assert exact.grad is not None
    assert_grad(fused.grad, exact.grad, features.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [8, 136, 520])
@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize("N", [67, 259])
def test_matches_reference(N: int, K: int, D: int, dtype: torch.dtype) -> None:
    compare(*problem(N, K, D, dtype))


@pytest.mark.parametrize("N", [2049, 4100, 20011])
def test_each_warp_comes_back_for_more(N: int) -> None:
    compare(*problem(N, 2, 16, torch.float32))


def test_rows_apart() -> None:
    features, prototypes, labels = problem(131, 2, 48, torch.bfloat16)
    wide = torch.full((131, 64), torch.nan, dtype=torch.bfloat16)
    wide[:, :48] = features
    compare(wide[:, :48], prototypes, labels)
