"""temporal_conv against torch's convolution, LeakyReLU and mean pooling in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases import DTYPES, TOLERANCE, assert_same_bits
from test_determinism import run_with_isa
from torch import Tensor
from torch.library import opcheck

import pycdgkd

OP = torch.ops.pycdgkd.temporal_conv
BACKWARD = torch.ops.pycdgkd.temporal_conv_backward
SLOPE = 0.01
# B, C, L, T, k, pool: tiles of 8, 4 and 1 kernels, whole and partial vectors of results, samples
# that no result uses, kernels longer than a tile of places.
SIZES = [
    (2, 3, 100, 5, 16, 8),
    (2, 5, 512, 15, 64, 8),
    (3, 28, 131, 8, 32, 8),
    (2, 3, 41, 9, 7, 3),
    (1, 1, 9, 1, 1, 4),
    (2, 2, 33, 3, 33, 1),
    (1, 7, 700, 2, 5, 2),
    (2, 9, 77, 17, 11, 61),
]


def make(B: int, C: int, L: int, T: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((B, C, L), (T, k), (T,))
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def expected(eeg: Tensor, weight: Tensor, bias: Tensor, pool: int, slope: float) -> Tensor:
    out = F.conv2d(eeg[:, None], weight[:, None, None], bias)
    return F.avg_pool2d(F.leaky_relu(out, slope), (1, pool))


def assert_near(actual: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest element, and to each one's rounding to its storage."""
    assert actual.dtype == dtype
    assert actual.shape == want.shape
    limit = TOLERANCE[dtype].value * want.abs().max() + TOLERANCE[dtype].storage * want.abs()
    tiny = 2**-24 if dtype == torch.float16 else 0.0
    assert ((actual.double() - want).abs() <= limit + tiny).all()


def check(
    pieces: list[Tensor], pool: int, slope: float, layout: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Value and all gradients, with a gradient of the result laid out by ``layout``."""
    dtype = pieces[0].dtype
    wide = [x.detach().double().requires_grad_() for x in pieces]
    ours, want = OP(*pieces, pool, slope), expected(*wide, pool, slope)
    assert_near(ours, want, dtype)
    grad = torch.randn_like(ours)
    given = layout(grad) if layout else grad
    actual = torch.autograd.grad(ours, pieces, given)
    for x, y in zip(actual, torch.autograd.grad(want, wide, grad.double()), strict=True):
        assert_near(x, y, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_is_convolution_leaky_relu_mean(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    *shape, pool = sizes
    check(make(*shape, dtype), pool, SLOPE)


@pytest.mark.parametrize("slope", [0.0, 1.0, 1.5, -0.5])
def test_any_slope(slope: float) -> None:
    check(make(2, 3, 100, 5, 16, torch.float64), 8, slope)


def test_every_number_of_kernels_places_and_results() -> None:
    for T in range(1, 20):
        check(make(1, 2, 40 + T, T, 3, torch.float64), 4, SLOPE)
    for k in range(1, 14):
        check(make(1, 2, 57, 3, k, torch.float64), 5, SLOPE)
    for L in range(10, 90):
        check(make(1, 1, L, 2, 4, torch.float64), 2, SLOPE)


def channels_last(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def narrowed(x: Tensor) -> Tensor:
    """A piece of something larger, as the gradient of a concatenation is."""
    return torch.cat([torch.full_like(x, torch.nan), x, x], dim=-1).narrow(
        -1, x.shape[-1], x.shape[-1]
    )


@pytest.mark.parametrize("layout", [channels_last, narrowed])
def test_strides(layout: Callable[[Tensor], Tensor]) -> None:
    eeg, weight, bias = (x.detach() for x in make(3, 4, 100, 5, 16, torch.float32))
    pieces = [layout(eeg), layout(weight), bias.repeat_interleave(2)[::2]]
    assert not pieces[0].is_contiguous()
    check([x.requires_grad_() for x in pieces], 8, SLOPE, layout)


def test_expanded_gradient() -> None:
    eeg, weight, bias = make(2, 3, 60, 2, 9, torch.float64)
    grads = torch.autograd.grad(OP(eeg, weight, bias, 4, SLOPE).sum(), [eeg, weight, bias])
    wants = torch.autograd.grad(expected(eeg, weight, bias, 4, SLOPE).sum(), [eeg, weight, bias])
    torch.testing.assert_close(grads, wants, rtol=1e-12, atol=1e-12)


def test_what_no_result_uses_is_not_read() -> None:
    eeg, weight, bias = (x.detach() for x in make(1, 2, 31, 3, 8, torch.float32))
    used = (31 - 8 + 1) // 5 * 5 + 8 - 1
    eeg[..., used:] = torch.nan
    pieces = [x.requires_grad_() for x in (eeg, weight, bias)]
    out = OP(*pieces, 5, SLOPE)
    grads = torch.autograd.grad(out.sum(), pieces)
    assert all(x.isfinite().all() for x in (out, *grads))
    assert (grads[0][..., used:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 40), (3, 0, 40)])
def test_empty(shape: tuple[int, ...]) -> None:
    _, weight, bias = make(1, 1, 1, 5, 8, torch.float32)
    eeg = torch.empty(shape, requires_grad=True)
    out = OP(eeg, weight, bias, 4, SLOPE)
    assert out.shape == (shape[0], 5, shape[1], 8)
    grads = torch.autograd.grad(out.sum(), [eeg, weight, bias])
    assert grads[0].shape == shape
    assert all((g == 0).all() for g in grads)


def test_gradcheck() -> None:
    pieces = make(2, 2, 14, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: OP(*x, 3, 0.1), pieces)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_each_gradient_alone(wanted: tuple[int, ...]) -> None:
    pieces = make(2, 3, 60, 5, 9, torch.float64)
    everything = torch.autograd.grad(OP(*pieces, 4, SLOPE).square().sum(), pieces)
    chosen = [x if i in wanted else x.detach() for i, x in enumerate(pieces)]
    leaves = [pieces[i] for i in wanted]
    some = torch.autograd.grad(OP(*chosen, 4, SLOPE).square().sum(), leaves)
    assert_same_bits(some, [everything[i] for i in wanted])


def test_second_derivatives_are_refused() -> None:
    pieces = make(1, 2, 30, 2, 4, torch.float64)
    out = OP(*pieces, 4, SLOPE).square().sum()
    (grad,) = torch.autograd.grad(out, pieces[1:2], create_graph=True)
    with pytest.raises(RuntimeError, match="temporal_conv_backward: has no derivative"):
        grad.sum().backward()


def test_autocast_leaves_the_precision() -> None:
    pieces = make(2, 3, 60, 5, 9, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = OP(*pieces, 4, SLOPE)
    assert_same_bits([out], [OP(*pieces, 4, SLOPE)])


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("need_eeg", [False, True])
def test_opcheck(need_eeg: bool) -> None:
    eeg, weight, bias = make(2, 3, 60, 5, 9, torch.float32)
    opcheck(OP.default, (eeg.requires_grad_(need_eeg), weight, bias, 4, SLOPE))
    detached = [x.detach() for x in (eeg, weight, bias)]
    grad = torch.randn(OP(*detached, 4, SLOPE).shape)
    opcheck(BACKWARD.default, (grad, *detached, 4, SLOPE, need_eeg))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_matches_eager(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: OP(*x, 4, SLOPE) * 2, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for L in (60, 75):
        pieces = make(2, 3, L, 5, 9, torch.float32)
        results = []
        for function in (lambda *x: OP(*x, 4, SLOPE) * 2, compiled):
            out = function(*pieces)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), pieces)])
        assert_same_bits(*results)


def outcome(dtype: torch.dtype, chans: int = 28) -> list[Tensor]:
    torch.manual_seed(0)
    results: list[Tensor] = []
    for T, k in ((8, 32), (3, 5)):
        pieces = make(40, chans, 140, T, k, dtype)
        out = OP(*pieces, 8, SLOPE)
        results += [out.detach(), *torch.autograd.grad(out.square().sum(), pieces)]
    return results


def test_same_bits_for_every_thread_count() -> None:
    """40 x 28 rows are 35 blocks of two times 16 rows."""
    outcomes = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        outcomes.append(outcome(torch.float32))
    for other in outcomes[1:]:
        assert_same_bits(outcomes[0], other)


ISA_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_temporal_conv import outcome
import pycdgkd
assert pycdgkd.ops.build_info()["isa_active"] == sys.argv[2]
torch.save([*outcome(torch.float32, 3), *outcome(torch.float64, 3)], sys.argv[3])
"""


def test_instruction_sets_agree(tmp_path: Path) -> None:
    outcomes = {}
    for isa in pycdgkd.ops.build_info()["isa_levels"].split(","):
        path = tmp_path / f"{isa}.pt"
        done = run_with_isa(isa, ISA_SCRIPT, str(Path(__file__).parent), isa, str(path))
        if "cannot run here" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        outcomes[isa] = torch.load(path, weights_only=True)
    for isa, results in outcomes.items():
        for ours, base in zip(results, outcomes["baseline"], strict=True):
            limit = 1e-13 if base.dtype == torch.float64 else 3e-6
            assert (ours - base).abs().max() <= limit * base.abs().max(), isa
    if len(outcomes) == 1:
        pytest.skip("this processor runs the baseline kernels only")


GOOD: dict[str, Any] = {
    "eeg": torch.zeros(2, 3, 20),
    "weight": torch.zeros(4, 5),
    "bias": torch.zeros(4),
    "pool": 2,
    "slope": SLOPE,
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"eeg": torch.zeros(3, 20)}, "eeg: expected shape (B, C, L), got float32 of shape (3, 20)"),
    (
        {"eeg": torch.zeros(2, 3, 20, dtype=torch.int64)},
        "eeg: expected float32, float64, bfloat16 or float16, got int64 of shape (2, 3, 20)",
    ),
    ({"weight": torch.zeros(4)}, "weight: expected shape (T, k), got float32 of shape (4)"),
    ({"bias": torch.zeros(5)}, "bias: expected shape (4,), got float32 of shape (5)"),
    (
        {"weight": torch.zeros(4, 5, dtype=torch.float64)},
        "weight: expected no float64 beside arguments of lower precision, "
        "got float64 of shape (4, 5)",
    ),
    ({"weight": torch.zeros(4, 0)}, "kernel length: expected at least 1, got 0"),
    ({"pool": 0}, "pool: expected at least 1, got 0"),
    (
        {"weight": torch.zeros(4, 21)},
        "eeg: expected at least k + pool - 1 = 22 samples, got float32 of shape (2, 3, 20)",
    ),
    (
        {"pool": 17},
        "eeg: expected at least k + pool - 1 = 21 samples, got float32 of shape (2, 3, 20)",
    ),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_wrong_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"pycdgkd.temporal_conv: {message}")):
        OP(**(GOOD | changed))
    backward = {"grad": torch.zeros(2, 4, 3, 8), **GOOD, **changed, "need_eeg": True}
    with pytest.raises(RuntimeError, match=re.escape(f"pycdgkd.temporal_conv_backward: {message}")):
        BACKWARD(**backward)


def test_wrong_gradient() -> None:
    with pytest.raises(RuntimeError, match="grad: expected the shape of the result, got float32"):
        BACKWARD(torch.zeros(2, 4, 3, 7), *GOOD.values(), False)
