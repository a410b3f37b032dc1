"""Seeded inputs, memory layouts and the one table of tolerances of the op tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pycdgkd.ops.registration import stays_on_device

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Tolerance(NamedTuple):
    value: float  # results, which are in arithmetic precision whatever the inputs are stored in
    grad: float  # gradients, relative to the largest element
    storage: float  # rounding of one gradient element to the input's dtype


# The comparison is always with float64 autograd on the very same (rounded) inputs, so that for the
# 16-bit types only the rounding of the stored gradient is left.
TOLERANCE = {
    torch.float64: Tolerance(1e-10, 1e-10, 0.0),
    torch.float32: Tolerance(3e-6, 3e-6, 0.0),
    torch.bfloat16: Tolerance(3e-6, 3e-6, 2**-8),
    torch.float16: Tolerance(3e-6, 3e-6, 2**-10),
}
FAR_TOLERANCE = 2e-5  # float32 features with a common offset of norm 1000 (the contract: 2e-4)
HALF_TINY = 2**-25  # half of float16's smallest step

Layout = Callable[[Tensor], Tensor]


def _sliced(x: Tensor) -> Tensor:
    big = torch.full((x.shape[0] + 1, x.shape[1] + 3), torch.nan, dtype=x.dtype)
    view = big[1:, 2 : 2 + x.shape[1]]
    view.copy_(x)
    return view


def _strided(x: Tensor) -> Tensor:
    big = torch.full((2 * x.shape[0], 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    big[::2, ::2] = x
    return big[::2, ::2]


# Views with the same values; what lies between them is NaN.
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": _sliced,
    "strided": _strided,
}


def expanded(x: Tensor) -> Tensor:
    """Every row is the first one: stride 0."""
    return x[:1].expand(x.shape[0], -1)


def expanded_columns(x: Tensor) -> Tensor:
    """Every column is the first one."""
    return x[:, :1].expand(-1, x.shape[1])


def _normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Drawn on the CPU whatever device is tested, so that every device gets the same numbers."""
    drawn = torch.randn(*shape, dtype=dtype, device="cpu")
    return drawn.to(torch.get_default_device(), torch.float64)


def make_labels(N: int, K: int, *, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(K, (N,), device="cpu").to(torch.get_default_device(), dtype)


def make_prototypes(
    K: int, D: int, *, dtype: torch.dtype = torch.float32, offset: float = 0.0, spread: float = 1.5
) -> Tensor:
    """(K, D) with mutual distances around `spread`, a common offset of the given norm."""
    direction = torch.ones(D, dtype=torch.float64) * offset / D**0.5
    return (_normal(K, D) * spread / (2 * D) ** 0.5 + direction).to(dtype)


def make_features(prototypes: Tensor, labels: Tensor, *, noise: float = 1.0) -> Tensor:
    """(N, D) rows around the prototypes of their classes; out-of-range labels take the first."""
    classes = labels.long()
    classes = torch.where((classes >= 0) & (classes < len(prototypes)), classes, 0)
    D = prototypes.shape[1]
    rows = prototypes.double()[classes]
    return (rows + noise * _normal(len(labels), D, dtype=torch.float32) / D**0.5).to(
        prototypes.dtype
    )


def make_logits(
    N: int, K: int, *, dtype: torch.dtype = torch.float32, scale: float = 2.0
) -> Tensor:
    return (scale * _normal(N, K)).to(dtype)


def leaf(x: Tensor, layout: Layout | None = None) -> Tensor:
    x = x.detach()
    return (layout(x) if layout is not None else x.clone()).requires_grad_()


def double_leaf(x: Tensor) -> Tensor:
    return x.detach().double().clone().requires_grad_()


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_value(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> None:
    """A result of the ops in arithmetic dtype, relative to the largest expected element."""
    assert actual.dtype == arithmetic(dtype)
    assert actual.shape == expected.shape
    _assert_near(actual, expected, TOLERANCE[dtype].value if tolerance is None else tolerance)


def assert_grad(
    actual: Tensor | None,
    expected: Tensor,
    dtype: torch.dtype,
    tolerance: float | None = None,
    roundings: int = 1,
) -> None:
    """A gradient in the dtype of its input, rounded to it so many times."""
    assert actual is not None
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    limit = TOLERANCE[dtype]
    storage = roundings * limit.storage
    _assert_near(actual, expected, limit.grad if tolerance is None else tolerance, storage)


def assert_kl_grad(
    actual: Tensor | None, expected: Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> None:
    """Of a KL loss: devices write a bfloat16 gradient before the loss's own factor is known."""
    twice = actual is not None and dtype == torch.bfloat16 and stays_on_device(actual)
    assert_grad(actual, expected, dtype, tolerance, roundings=2 if twice else 1)


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.nan_to_num(nan=1.25e30), b.nan_to_num(nan=1.25e30))


def _assert_near(actual: Tensor, expected: Tensor, relative: float, storage: float = 0.0) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.equal(actual.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite])
    finite = expected.isfinite()
    actual, expected = actual[finite], expected[finite]
    if expected.numel() == 0:
        return
    tiny = HALF_TINY if storage == TOLERANCE[torch.float16].storage else 0.0
    allowed = relative * expected.abs().max() + storage * expected.abs() + tiny + 1e-37
    excess = ((actual - expected).abs() / allowed).max().item()
    assert excess <= 1.0, f"error is {excess:.3g} times the allowed {relative:.1e}"
