from __future__ import annotations

import itertools

import pytest
import torch

import pycdgkd
from pycdgkd import reference

GRID = (1e-30, 1e-10, 1e-3, 0.5, 1.0, 1.5, 63.7, 127.5, 128.0)


def paper_equation_6(rate_v: float, rate_e: float) -> list[float]:
    """Eq. 6 as printed: the slower modality gets clip(ratio - 1, 0, 1), the faster one 0."""
    if rate_v < rate_e:
        return [min(max(rate_e / rate_v - 1, 0.0), 1.0), 0.0]
    return [0.0, min(max(rate_v / rate_e - 1, 0.0), 1.0)]


@pytest.mark.parametrize(("rate_v", "rate_e"), list(itertools.product(GRID, GRID)))
def test_two_modalities_as_the_paper_prints_it(rate_v: float, rate_e: float) -> None:
    rates = torch.tensor([rate_v, rate_e], dtype=torch.float64)
    weights = pycdgkd.modality_weights(rates)
    expected = torch.tensor(paper_equation_6(rate_v, rate_e), dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    single = rates.float()
    exact = torch.tensor(paper_equation_6(*single.tolist()))
    torch.testing.assert_close(pycdgkd.modality_weights(single), exact, rtol=1e-6, atol=1e-7)


def test_near_equality_keeps_its_digits() -> None:
    """(a - b) / b, not a / b - 1."""
    rates = torch.tensor([64.0, 64.0 * (1 + 2**-20)])
    torch.testing.assert_close(
        pycdgkd.modality_weights(rates), torch.tensor([2.0**-20, 0.0]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([7.0], [0.0]),
        ([0.0], [0.0]),
        ([3.0, 3.0], [0.0, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([0.0, 5.0], [1.0, 0.0]),
        ([4.0, 8.0, 16.0], [1.0, 1.0, 0.0]),
        ([8.0, 10.0, 4.0, 10.0], [0.25, 0.0, 1.0, 0.0]),
        ([-1.0, 2.0], [0.0, 0.0]),  # not a rate; the clip holds all the same
    ],
)
def test_special_values(rates: list[float], expected: list[float]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        given = torch.tensor(rates, dtype=dtype)
        weights = pycdgkd.modality_weights(given)
        assert weights.tolist() == expected
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert reference.modality_weights(given.double()).tolist() == expected


def test_nan_stays_nan() -> None:
    for rates in ([torch.nan, 1.0], [1.0, torch.nan], [2.0, torch.nan, 1.0]):
        assert pycdgkd.modality_weights(torch.tensor(rates)).isnan().all()


def test_strides_and_no_gradient() -> None:
    rates = torch.tensor([8.0, -1.0, 10.0, -1.0], requires_grad=True)
    weights = pycdgkd.modality_weights(rates[::2])
    assert weights.tolist() == [0.25, 0.0]
    assert not weights.requires_grad
    assert pycdgkd.modality_weights(torch.tensor(2.0).expand(3)).tolist() == [0.0] * 3
