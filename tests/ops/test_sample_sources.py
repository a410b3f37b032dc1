from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

import pycdgkd


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Weights are drawn on the CPU whatever the default device is."""
    with torch.device("cpu"):
        yield


def draws(count: int, num_sources: int, **options: object) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(7)
    return torch.stack(
        [pycdgkd.sample_sources(num_sources, generator=generator, **options) for _ in range(count)]
    )


def assert_share(indicator: torch.Tensor, probability: float) -> None:
    """The share of ones lies within 4.5 standard errors."""
    error = math.sqrt(probability * (1 - probability) / len(indicator))
    assert abs(indicator.double().mean().item() - probability) <= 4.5 * error + 1e-12


@pytest.mark.parametrize("num_sources", [1, 2, 3, 7])
@pytest.mark.parametrize("strategy", ["all", "subset", "bernoulli_sum", "drop_one", "drop_one_sum"])
def test_form(num_sources: int, strategy: str) -> None:
    weights = draws(50, num_sources, strategy=strategy)
    assert weights.shape == (50, num_sources)
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    if not strategy.endswith("_sum"):
        torch.testing.assert_close(weights.sum(1), torch.ones(50), rtol=1e-6, atol=0)
    kept = weights > 0
    for row, mask in zip(weights, kept, strict=True):
        assert row[mask].unique().numel() <= 1  # kept sources weigh the same


def test_all() -> None:
    assert torch.equal(pycdgkd.sample_sources(3, strategy="all"), torch.full((3,), 1 / 3))
    for strategy in ("drop_one", "drop_one_sum"):
        assert draws(5, 1, strategy=strategy).tolist() == [[1.0]] * 5


@pytest.mark.parametrize(("num_sources", "drop_prob"), [(1, 0.5), (2, 0.5), (3, 0.2), (4, 0.8)])
def test_subset_is_redrawn_until_one_is_kept(num_sources: int, drop_prob: float) -> None:
    """Each non-empty subset with its Bernoulli probability, divided by that of not being empty."""
    kept = draws(4000, num_sources, strategy="subset", drop_prob=drop_prob) > 0
    assert kept.any(1).all()
    normaliser = 1 - drop_prob**num_sources
    for j in range(num_sources):
        assert_share(kept[:, j], (1 - drop_prob) / normaliser)
    assert_share(kept.all(1), (1 - drop_prob) ** num_sources / normaliser)


@pytest.mark.parametrize("drop_prob", [0.0, 0.3, 0.9, 1.0])
def test_bernoulli_sum_may_keep_none(drop_prob: float) -> None:
    weights = draws(4000, 3, strategy="bernoulli_sum", drop_prob=drop_prob)
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    for j in range(3):
        assert_share(weights[:, j], 1 - drop_prob)
    assert_share(weights.sum(1) == 0, drop_prob**3)


@pytest.mark.parametrize(("strategy", "weight"), [("drop_one", 1 / 3), ("drop_one_sum", 1.0)])
def test_drop_one_drops_each_equally_often(strategy: str, weight: float) -> None:
    weights = draws(4000, 4, strategy=strategy)
    assert ((weights == 0).sum(1) == 1).all()
    assert torch.equal(weights.amax(1), torch.full((4000,), weight))
    for j in range(4):
        assert_share(weights[:, j] == 0, 0.25)


def test_nothing_is_dropped_at_probability_zero() -> None:
    assert torch.equal(draws(20, 3, drop_prob=0.0), torch.full((20, 3), 1 / 3))


def test_any_default_device_leaves_them_on_the_cpu() -> None:
    with torch.device("meta"):
        for strategy in ("all", "subset", "bernoulli_sum", "drop_one"):
            assert pycdgkd.sample_sources(3, strategy=strategy).device.type == "cpu"


def test_generator_makes_draws_repeatable() -> None:
    assert torch.equal(draws(30, 4), draws(30, 4))
    torch.manual_seed(1)
    first = [pycdgkd.sample_sources(4) for _ in range(10)]
    torch.manual_seed(1)
    assert all(torch.equal(a, pycdgkd.sample_sources(4)) for a in first)
    state = torch.get_rng_state()
    draws(5, 4)
    assert torch.equal(state, torch.get_rng_state())  # a given generator leaves the global one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sources": 0}, "num_sources: expected at least 1, got 0"),
        ({"strategy": "some"}, 'strategy: expected one of "all", "subset", .* got \'some\''),
        ({"drop_prob": 1.0}, "drop_prob: expected a probability below 1, got 1.0"),
        ({"drop_prob": -0.1}, "drop_prob: expected a probability below 1, got -0.1"),
        ({"drop_prob": math.nan}, "drop_prob: expected a probability below 1, got nan"),
        (
            {"drop_prob": 1.5, "strategy": "bernoulli_sum"},
            "drop_prob: expected a probability, got 1.5",
        ),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"pycdgkd\.sample_sources: {message}"):
        pycdgkd.sample_sources(**{"num_sources": 2, **options})
