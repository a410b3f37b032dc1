"""The divergence where the textbook forms give noise, NaN or negative values."""

from __future__ import annotations

import math

import pytest
import torch
from cases import make_logits
from torch import Tensor

import pycdgkd
from pycdgkd import reference

DIRECTIONS = ("reverse", "forward")
INF = math.inf


def exact_kl(logits: Tensor, source: Tensor, temperature: float, direction: str) -> Tensor:
    """Rows of KL as sum p (e^x - 1 - x), x = log q - log p: in float64, exact for tiny KL too."""
    a, b = (logits, source) if direction == "reverse" else (source, logits)
    log_p, log_q = ((t.double() / temperature).log_softmax(-1) for t in (a, b))
    x = log_q - log_p
    p, q = log_p.exp(), log_q.exp()
    return torch.where(x.abs() < 1, p * (torch.expm1(x) - x), q - p - p * x).sum(-1)


def exact_grad(logits: Tensor, source: Tensor, temperature: float, direction: str) -> Tensor:
    leaf = logits.double().requires_grad_()
    loss = reference.multi_source_kl(
        leaf, [source.double()], temperature=temperature, direction=direction, reduction="sum"
    )
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("K", [2, 7, 1000, 1001])
def test_close_and_far_apart(offset: float, noise: float, K: int, direction: str) -> None:
    """Each row, and the student's logits shifted by a constant, which means nothing to a softmax.

    Naive sums are wrong 100-fold at 1e-9, and s - t loses all digits to a shift of 1e4. What is
    left is the square of float32's rounding in the value, and in the gradient a millionth of the
    batch's largest row.
    """
    source = make_logits(64, K)
    logits = (source + noise * torch.randn(64, K) + offset).requires_grad_()
    rows = pycdgkd.multi_source_kl(logits, [source], direction=direction, reduction="none")
    expected = exact_kl(logits.detach(), source, 1.0, direction)
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.double(), expected, rtol=2e-5, atol=2e-14)
    (grad,) = torch.autograd.grad(rows.sum(), logits)
    exact = exact_grad(logits.detach(), source, 1.0, direction)
    norms = exact.norm(dim=1)
    assert ((grad - exact).norm(dim=1) <= 3e-6 * norms + 1e-6 * norms.max()).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_temperatures_and_large_logits(size: float, temperature: float, direction: str) -> None:
    """F.kl_div(log q, softmax(s / T)) at T = 0.05 gives NaN gradients: the student underflows."""
    logits = make_logits(64, 5, scale=size).requires_grad_()
    source = make_logits(64, 5, scale=size)
    rows = pycdgkd.multi_source_kl(
        logits, [source], temperature=temperature, direction=direction, reduction="none"
    )
    expected = exact_kl(logits.detach(), source, temperature, direction)
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.double(), expected, rtol=2e-5, atol=1e-30)
    (grad,) = torch.autograd.grad(rows.sum(), logits)
    assert grad.isfinite().all()
    exact = exact_grad(logits.detach(), source, temperature, direction)
    # A class of probability p moves by p (1 + |s - t| / T) ulps of exp: absolute, not relative.
    # Where every p is 0 or 1 but for a rounding, what is lost of slopes of size / T^2 comes on top.
    rounding = 1e-14 * size / temperature**2
    assert (grad - exact).abs().max() <= 2e-4 * exact.abs().max() + rounding


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equal_logits_give_exactly_zero(dtype: torch.dtype, direction: str) -> None:
    for logits in (make_logits(33, 9, dtype=dtype), torch.full((33, 9), 7.0, dtype=dtype)):
        leaf = logits.clone().requires_grad_()
        loss = pycdgkd.multi_source_kl(leaf, [logits, logits.clone()], direction=direction)
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_constant_shift_gives_nearly_nothing(direction: str) -> None:
    logits = make_logits(33, 9)
    loss = pycdgkd.multi_source_kl(logits, [logits + 64.0], direction=direction)
    assert 0 <= loss.item() < 1e-9  # logits + 64 is rounded to 2^-18


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_classes_equal(direction: str) -> None:
    logits = torch.full((3, 4), -1e4, requires_grad=True)
    source = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0], [1.0, 0.0, 0.0, 0.0]])
    rows = pycdgkd.multi_source_kl(logits, [source], direction=direction, reduction="none")
    assert rows[:2].tolist() == [0.0, 0.0]
    expected = exact_kl(logits.detach(), source, 1.0, direction)
    torch.testing.assert_close(rows[2].double(), expected[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("student", "source", "direction", "expected"),
    [
        # excluded by the student alone: no mass to weigh with, or mass that meets none
        ([0.0, 1.0, -INF], [0.0, 1.0, 2.0], "reverse", None),
        ([0.0, 1.0, -INF], [0.0, 1.0, 2.0], "forward", INF),
        # by the source alone
        ([0.0, 1.0, 2.0], [0.0, 1.0, -INF], "reverse", INF),
        ([0.0, 1.0, 2.0], [0.0, 1.0, -INF], "forward", None),
        # by both
        ([0.0, 1.0, -INF], [1.0, 0.0, -INF], "reverse", None),
        ([0.0, 1.0, -INF], [1.0, 0.0, -INF], "forward", None),
        ([-INF, 1.0, -INF], [-INF, 0.0, -INF], "reverse", 0.0),
        ([-INF, 1.0, -INF], [-INF, 0.0, -INF], "forward", 0.0),
    ],
)
def test_excluded_classes(
    student: list[float], source: list[float], direction: str, expected: float | None
) -> None:
    """0 log 0 is 0; +inf only where mass meets none. Eager torch gives NaN in most of these."""
    p, q = (torch.tensor(t, dtype=torch.float64).softmax(0) for t in (student, source))
    a, b = (p, q) if direction == "reverse" else (q, p)
    if expected is None:
        kept = a > 0
        expected = float((a[kept] * (a[kept] / b[kept]).log()).sum())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = torch.tensor([student] * 17, dtype=dtype).requires_grad_()
        sources = [torch.tensor([source] * 17, dtype=dtype)]
        rows = pycdgkd.multi_source_kl(logits, sources, direction=direction, reduction="none")
        torch.testing.assert_close(
            rows.double(), torch.full((17,), expected, dtype=torch.float64), rtol=1e-6, atol=0
        )
        if math.isfinite(expected):
            (grad,) = torch.autograd.grad(rows.sum(), logits)
            assert grad.isfinite().all()
            assert torch.equal(grad[:, p == 0], torch.zeros_like(grad[:, p == 0])) or (
                direction == "forward"
            )
            assert grad.double().sum().abs() <= 1e-2 * grad.abs().sum() + 1e-30


def test_forward_gradient_is_finite_even_where_the_value_is_infinite() -> None:
    """(1/T)(p - q) needs no logarithm."""
    logits = torch.tensor([[0.0, 1.0, -INF]], requires_grad=True)
    source = torch.tensor([[0.0, 1.0, 2.0]])
    loss = pycdgkd.multi_source_kl(logits, [source], direction="forward")
    assert loss.item() == INF
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, logits.detach().softmax(1) - source.softmax(1))


def test_a_bad_row_leaves_its_neighbours_alone() -> None:
    """Sixteen rows share one vector loop."""
    logits, source = make_logits(33, 4), make_logits(33, 4)
    good = pycdgkd.multi_source_kl(logits, [source], reduction="none")
    logits[5], source[20] = torch.nan, torch.tensor([torch.nan, INF, -INF, 0.0])
    rows = pycdgkd.multi_source_kl(logits.requires_grad_(), [source], reduction="none")
    fine = torch.ones(33, dtype=torch.bool)
    fine[[5, 20]] = False
    assert rows[~fine].isnan().all()
    assert torch.equal(rows[fine], good[fine])
    (grad,) = torch.autograd.grad(rows.sum(), logits)
    assert grad[fine].isfinite().all()


@pytest.mark.parametrize("K", [32001, 131072])
def test_vocabulary_sizes(K: int) -> None:
    logits, sources = make_logits(2, K).requires_grad_(), [make_logits(2, K) for _ in range(2)]
    for direction in DIRECTIONS:
        rows = pycdgkd.multi_source_kl(logits, sources, direction=direction, reduction="none")
        expected = sum(exact_kl(logits.detach(), t, 1.0, direction) for t in sources) / 2
        torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(rows.sum(), logits)
        exact = sum(exact_grad(logits.detach(), t, 1.0, direction) for t in sources) / 2
        assert (grad - exact).norm() <= 2e-6 * exact.norm()
