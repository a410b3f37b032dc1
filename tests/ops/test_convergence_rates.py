from __future__ import annotations

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    assert_value,
    make_features,
    make_labels,
    make_prototypes,
)

import pycdgkd
from pycdgkd import reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths", [(7,), (64, 1), (33, 511, 2)])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (129, 2), (33, 17), (70, 40)])
def test_matches_reference(
    dtype: torch.dtype, layout: str, widths: tuple[int, ...], N: int, K: int
) -> None:
    labels = make_labels(N, K)
    prototypes = [make_prototypes(K, D, dtype=dtype) for D in widths]
    features = [make_features(c, labels) for c in prototypes]
    view = LAYOUTS[layout]
    rates = pycdgkd.convergence_rates([*map(view, features)], [*map(view, prototypes)], labels)
    expected = torch.stack(
        [
            reference.convergence_rate(z.double(), c.double(), labels)
            for z, c in zip(features, prototypes, strict=True)
        ]
    )
    assert_value(rates, expected, dtype)


@pytest.mark.parametrize("K", [4, 72])
def test_is_the_sum_of_true_probabilities(K: int) -> None:
    labels = make_labels(100, K)
    labels[::7] = -100
    counts = torch.tensor([3, 0, 1, 2]).repeat(K // 4)
    prototypes = [make_prototypes(K, D) for D in (5, 30)]
    features = [make_features(c, labels) for c in prototypes]
    rates = pycdgkd.convergence_rates(features, prototypes, labels, class_counts=counts, scale=0.3)
    for rate, z, c in zip(rates, features, prototypes, strict=True):
        _, true_prob = pycdgkd.prototype_loss(z, c, labels, class_counts=counts, scale=0.3)
        torch.testing.assert_close(rate, true_prob.double().sum().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("more", [0, 38, 70])
def test_extremes(more: int) -> None:
    labels = torch.tensor([0, 1, 1])
    prototypes = torch.tensor([[100.0, 0.0], [0.0, 100.0], *[[-300.0, -300.0]] * more])
    near, far = prototypes[labels], prototypes[1 - labels]
    rates = pycdgkd.convergence_rates([near, far], [prototypes, prototypes], labels)
    assert rates.tolist() == [3.0, 0.0]
    nobody = pycdgkd.convergence_rates([near], [prototypes], torch.full((3,), -100))
    assert nobody.tolist() == [0.0]
    empty = pycdgkd.convergence_rates([near[:0]], [prototypes], labels[:0])
    assert empty.tolist() == [0.0]
    absent = pycdgkd.convergence_rates(
        [near], [prototypes], labels, class_counts=torch.tensor([1, 0, *[2] * more])
    )
    assert absent.tolist() == [1.0]


def test_has_no_gradient() -> None:
    features = torch.randn(4, 3, requires_grad=True)
    prototypes = torch.randn(2, 3, requires_grad=True)
    rates = pycdgkd.convergence_rates([features], [prototypes], torch.tensor([0, 1, 0, 1]))
    assert not rates.requires_grad
    raw = torch.ops.pycdgkd.convergence_rates(
        [features], [prototypes], torch.tensor([0, 1, 0, 1]), None, 1.0, -100
    )
    with pytest.raises(RuntimeError, match=r"pycdgkd\.convergence_rates: has no derivative"):
        raw.sum().backward()
