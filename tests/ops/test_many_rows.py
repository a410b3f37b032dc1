"""More rows than a device has warps: each of them takes several."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, assert_grad, assert_kl_grad, assert_value, double_leaf
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


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K", "S"), [(9001, 40, 3), (900, 264, 1), (901, 264, 5)])
def test_long_rows_of_all_kinds_follow_one_another(
    N: int, K: int, S: int, dtype: torch.dtype, direction: str
) -> None:
    """What is asked for while a row is worked on must survive whatever the row turns out to be."""
    logits = torch.randn(N, K).to(dtype)
    sources = [(logits + torch.randn(N, K)).to(dtype) for _ in range(S)]
    labels = torch.arange(N) % (K - 1)
    kinds = torch.arange(N) * 5 // 3 % 7  # two in a row now and then
    labels[kinds == 1] = -100
    for source in sources:
        source[kinds == 2] = logits[kinds == 2]
        source[kinds == 3, K - 1] = -torch.inf  # masked in all
    logits[kinds == 3, K - 1] = -torch.inf
    # The reference wants finite logits: e^-1e4 is 0 as well.
    exact = double_leaf(logits.double().clamp(min=-1e4))
    doubles = [source.double().clamp(min=-1e4) for source in sources]
    expected = reference.distillation_loss(exact, doubles, labels, direction=direction)
    expected[0].backward()
    assert exact.grad is not None
    fused = logits.clone().requires_grad_()
    result = pycdgkd.distillation_loss(fused, sources, labels, direction=direction)
    result.loss.backward()
    assert_value(result.loss, expected[0], dtype)
    assert_kl_grad(fused.grad, exact.grad, dtype)
