from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    assert_kl_grad,
    assert_value,
    double_leaf,
    expanded,
    make_logits,
)
from torch import Tensor

import pycdgkd
from pycdgkd import reference


def compare(
    logits: Tensor,
    sources: list[Tensor] | Tensor,
    *,
    grad_output: Tensor | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> None:
    """Value and gradient; the tensors are used as they lie in memory."""
    dtype = logits.dtype
    exact = double_leaf(logits)
    expected = reference.multi_source_kl(exact, [t.double() for t in sources], **options)
    fused = logits.detach().requires_grad_()
    loss = pycdgkd.multi_source_kl(fused, sources, **options)
    assert_value(loss, expected, dtype, tolerance)
    if grad_output is None:
        grad_output = torch.randn(expected.shape, dtype=loss.dtype)
    expected.backward(grad_output.double())
    loss.backward(grad_output)
    assert exact.grad is not None
    assert_kl_grad(fused.grad, exact.grad, dtype, tolerance)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("K", [1, 2, 5, 31, 1001])
@pytest.mark.parametrize("N", [1, 16, 33])
def test_matches_reference(dtype: torch.dtype, N: int, K: int, S: int, direction: str) -> None:
    sources = [make_logits(N, K, dtype=dtype) for _ in range(S)]
    compare(make_logits(N, K, dtype=dtype), sources, direction=direction)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("temperature", [0.7, 4.0])
@pytest.mark.parametrize(("N", "K", "S"), [(2, 3, 2), (15, 17, 8), (17, 33, 16), (129, 2, 3)])
def test_options(
    N: int, K: int, S: int, temperature: float, reduction: str, direction: str
) -> None:
    compare(
        make_logits(N, K),
        [make_logits(N, K) for _ in range(S)],
        source_weights=torch.rand(S),
        temperature=temperature,
        reduction=reduction,
        direction=direction,
    )


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [2, 35])
def test_any_strides(dtype: torch.dtype, layout: str, K: int) -> None:
    view = (LAYOUTS | {"expanded": expanded})[layout]
    sources = [view(make_logits(33, K, dtype=dtype)), make_logits(33, K, dtype=dtype)]
    compare(view(make_logits(33, K, dtype=dtype)), sources)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_one_tensor_or_a_sequence_of_mixed_types(direction: str) -> None:
    logits = make_logits(20, 6)
    stacked = torch.stack([make_logits(20, 6) for _ in range(3)])
    first = pycdgkd.multi_source_kl(logits, stacked, direction=direction)
    assert torch.equal(first, pycdgkd.multi_source_kl(logits, list(stacked), direction=direction))
    crossed = stacked.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(first, pycdgkd.multi_source_kl(logits, crossed, direction=direction))
    mixed = [stacked[0], LAYOUTS["sliced"](stacked[1].bfloat16()), stacked[2].half().t().t()]
    compare(logits, mixed, direction=direction)
    compare(logits.bfloat16(), mixed, direction=direction)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("mask", list(itertools.product([0.0, 1.0], repeat=3)))
def test_every_subset_of_sources(mask: tuple[float, ...], direction: str) -> None:
    """Weights as they are (authors' Bernoulli sums need not add to 1); inactive ones unread."""
    logits = make_logits(17, 4)
    sources = [make_logits(17, 4) for _ in range(3)]
    weights = torch.tensor(mask)
    compare(logits, sources, source_weights=weights, direction=direction)
    unread = [
        torch.full_like(t, torch.nan) if weight == 0 else t
        for t, weight in zip(sources, mask, strict=True)
    ]
    fused = [logits.clone().requires_grad_() for _ in range(2)]
    losses = [
        pycdgkd.multi_source_kl(fused[0], sources, source_weights=weights, direction=direction),
        pycdgkd.multi_source_kl(fused[1], unread, source_weights=weights, direction=direction),
    ]
    assert torch.equal(losses[0], losses[1])
    grads = torch.autograd.grad(losses, fused)
    assert torch.equal(grads[0], grads[1])
    if not any(mask):
        assert losses[0].item() == 0.0
        assert torch.equal(grads[0], torch.zeros(17, 4))


@pytest.mark.parametrize("weights_dtype", [*DTYPES, None])
def test_weights_of_any_type_and_stride(weights_dtype: torch.dtype | None) -> None:
    logits, sources = make_logits(9, 3), [make_logits(9, 3) for _ in range(2)]
    expected = pycdgkd.multi_source_kl(logits, sources, source_weights=torch.tensor([0.5, 0.25]))
    if weights_dtype is None:
        weights = torch.tensor([0.5, 9.0, 0.25, 9.0])[::2]
    else:
        weights = torch.tensor([0.5, 0.25], dtype=weights_dtype)
    assert torch.equal(expected, pycdgkd.multi_source_kl(logits, sources, source_weights=weights))


def test_none_means_one_over_s() -> None:
    logits, sources = make_logits(9, 3), [make_logits(9, 3) for _ in range(4)]
    weights = torch.full((4,), 0.25)
    assert torch.equal(
        pycdgkd.multi_source_kl(logits, sources),
        pycdgkd.multi_source_kl(logits, sources, source_weights=weights),
    )


def test_no_source_gives_zero() -> None:
    logits = make_logits(5, 3).requires_grad_()
    loss = pycdgkd.multi_source_kl(logits, [])
    assert loss.item() == 0.0
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad, torch.zeros(5, 3))


@pytest.mark.parametrize(("reduction", "expected"), [("mean", torch.nan), ("sum", 0.0)])
def test_empty_batch(reduction: str, expected: float) -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = pycdgkd.multi_source_kl(logits, [torch.zeros(0, 4)], reduction=reduction)
    assert torch.equal(loss.nan_to_num(-1.0), torch.tensor(expected).nan_to_num(-1.0))
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.shape == (0, 4)
    rows = pycdgkd.multi_source_kl(logits, torch.zeros(2, 0, 4), reduction="none")
    assert rows.shape == (0,)


def test_reverse_divergence_follows_the_mean_of_the_logits() -> None:
    """Its gradient is that of one source with the weighted mean of the logits, any subset."""
    logits = make_logits(33, 5, dtype=torch.float64).requires_grad_()
    sources = torch.stack([make_logits(33, 5, dtype=torch.float64) for _ in range(4)])
    for mask in itertools.product([0.0, 1.0], repeat=4):
        if not any(mask):
            continue
        weights = torch.tensor(mask, dtype=torch.float64) / sum(mask)
        mean = (weights[:, None, None] * sources).sum(0, keepdim=True)
        many = pycdgkd.multi_source_kl(logits, sources, source_weights=weights, temperature=3.0)
        one = pycdgkd.multi_source_kl(logits, mean, temperature=3.0)
        first, second = (torch.autograd.grad(loss, logits)[0] for loss in (many, one))
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)
        assert many >= one  # the Jensen gap


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["zero", "negative", "large", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_outputs(dtype: torch.dtype, reduction: str, kind: str) -> None:
    shape = (18,) if reduction == "none" else ()
    grad_output = {
        "zero": torch.zeros(shape),
        "negative": -torch.rand(shape),
        "large": torch.full(shape, 2.0**16),
        "expanded": torch.tensor(-1.5).expand(shape),
    }[kind].to(torch.float64 if dtype == torch.float64 else torch.float32)
    sources = [make_logits(18, 4, dtype=dtype) for _ in range(2)]
    compare(make_logits(18, 4, dtype=dtype), sources, reduction=reduction, grad_output=grad_output)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(reduction: str, direction: str) -> None:
    logits = make_logits(5, 4, dtype=torch.float64).requires_grad_()
    sources = [make_logits(5, 4, dtype=torch.float64) for _ in range(2)]

    def loss(s: Tensor) -> Tensor:
        return pycdgkd.multi_source_kl(
            s, sources, temperature=1.7, reduction=reduction, direction=direction
        )

    assert torch.autograd.gradcheck(loss, (logits,))
