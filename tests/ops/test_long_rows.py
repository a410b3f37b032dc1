"""Rows that the kernels cut into pieces: kept up to 65536 classes, computed twice beyond."""

from __future__ import annotations

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

SIZES = [64, 65, 1024, 1025, 5000, 65536, 65537, 70001]
INF = torch.inf


def compare(logits: Tensor, sources: list[Tensor], labels: Tensor, **options: object) -> None:
    exact = double_leaf(logits)
    expected = reference.distillation_loss(exact, [t.double() for t in sources], labels, **options)
    fused = logits.clone().requires_grad_()
    result = pycdgkd.distillation_loss(fused, sources, labels, **options)
    for ours, theirs in zip(result, expected, strict=True):
        assert_value(ours, theirs, logits.dtype)
    expected[0].backward()
    result.loss.backward()
    assert exact.grad is not None
    assert_kl_grad(fused.grad, exact.grad, logits.dtype)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("K", SIZES)
def test_matches_reference(K: int, temperature: float, direction: str) -> None:
    labels = torch.tensor([0, K - 1, min(K - 1, 1024), -100, min(K - 1, 1019)])
    sources = [make_logits(5, K), make_logits(5, K, dtype=torch.bfloat16)]
    compare(make_logits(5, K), sources, labels, temperature=temperature, direction=direction)


# Rows of one type, all of their 16-byte vectors aligned.
VECTORS = pytest.mark.parametrize("K", [40, 120, 1000, 2048, 4096, 32000])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize(
    ("S", "temperature"),  # two of more than three sources are inactive
    [(1, 2.0), (3, 2.0), (3, 1.0), (5, 3.0), (6, 2.0), (8, 1.0), (9, 2.0)],
)
@TYPES
@VECTORS
def test_whole_vectors(
    K: int, dtype: torch.dtype, S: int, temperature: float, direction: str
) -> None:
    labels = torch.tensor([0, K - 1, -100, K // 2, min(K - 1, 1019), 5, 6])
    weights = torch.tensor([0.0, 0.7, 0.3, 0.0, 0.5][:S] + [0.25] * max(S - 5, 0))
    weights[0] += float(S == 1)
    compare(
        make_logits(7, K, dtype=dtype),
        [make_logits(7, K, dtype=dtype) for _ in range(S)],
        labels,
        source_weights=weights,
        temperature=temperature,
        direction=direction,
    )


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize(("noise", "offset"), [(1e-1, 0.0), (1e-3, 0.0), (1e-3, 30.0)])
@TYPES
@pytest.mark.parametrize("K", [1000, 4096])
def test_whole_vectors_all_but_equal(
    K: int, dtype: torch.dtype, noise: float, offset: float, direction: str
) -> None:
    """There a divergence from sums of exponentials would be all rounding."""
    logits = make_logits(6, K, dtype=dtype)
    sources = [(logits + noise * make_logits(6, K) + shift).to(dtype) for shift in (0.0, offset)]
    labels = torch.tensor([-100, 1, 2, 3, 4, 5])
    compare(logits, sources, labels, direction=direction, kd_weight=1.0)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1000, 4096])
def test_whole_vectors_with_infinite_logits(K: int, dtype: torch.dtype, direction: str) -> None:
    """Classes masked in both; one masked in the source alone; a row without any; a NaN."""
    logits, source = make_logits(6, K, dtype=dtype), make_logits(6, K, dtype=dtype)
    logits[0, : K // 2] = source[0, : K // 2] = -INF
    (source if direction == "forward" else logits)[1, 3] = -INF
    (logits if direction == "forward" else source)[2, 3] = -INF
    logits[3], source[4] = -INF, -INF
    logits[5, 7] = torch.nan
    rows = pycdgkd.multi_source_kl(
        logits, [source], temperature=1.0, direction=direction, reduction="none"
    )
    first, second = (logits, source) if direction == "reverse" else (source, logits)
    log_p, log_q = (x.double().log_softmax(1) for x in (first, second))
    p = log_p.exp()
    expected = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1)
    torch.testing.assert_close(rows.double(), expected, rtol=3e-6, atol=0, equal_nan=True)
    assert rows[:2].isfinite().all()
    assert rows[2] == INF
    assert rows[3:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("K", [1500, 66000])
def test_other_types(K: int, dtype: torch.dtype) -> None:
    logits, sources = make_logits(3, K, dtype=dtype), [make_logits(3, K, dtype=dtype)]
    compare(logits, sources, torch.tensor([5, K // 2, K - 2]))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("K", SIZES[3:])
def test_the_largest_logit_may_lie_in_any_piece(K: int, direction: str) -> None:
    """Each piece's sums are relative to the maximum so far, which jumps by 60 here."""
    logits, source = make_logits(4, K), make_logits(4, K)
    for row, place in enumerate([0, K // 2, K - 1]):
        logits[row, place] += 60.0
        source[row, place] += 59.0
    logits[3] += torch.linspace(-40.0, 40.0, K)
    source[3] += torch.linspace(-40.0, 40.0, K)
    labels = torch.tensor([0, K // 2, K - 1, K - 1])
    compare(logits, [source], labels, direction=direction)


@pytest.mark.parametrize("K", [2500, 70001])
def test_pieces_without_any_class(K: int) -> None:
    """Whole pieces of -inf before, between and after the others are as good as absent."""
    kept = torch.zeros(K, dtype=torch.bool)
    kept[1200:1300] = kept[2200:2300] = True
    logits, source = make_logits(2, K), make_logits(2, K)
    labels = torch.tensor([3, 150])
    places = kept.nonzero().flatten()
    short = logits[:, kept].clone().requires_grad_()
    expected = pycdgkd.distillation_loss(short, [source[:, kept]], labels)
    expected.loss.backward()
    logits[:, ~kept], source[:, ~kept] = -INF, -INF
    leaf = logits.requires_grad_()
    result = pycdgkd.distillation_loss(leaf, [source], places[labels])
    result.loss.backward()
    assert leaf.grad is not None
    assert short.grad is not None
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=0)
    torch.testing.assert_close(leaf.grad[:, kept], short.grad, rtol=1e-5, atol=1e-8)
    assert torch.equal(leaf.grad[:, ~kept], torch.zeros(2, int((~kept).sum())))


@pytest.mark.parametrize("K", [1500, 70001])
def test_bad_rows_stay_bad_and_alone(K: int) -> None:
    logits, source = make_logits(5, K), make_logits(5, K)
    good = pycdgkd.multi_source_kl(logits, [source], reduction="none")
    logits[0, 0], logits[1, K - 1], logits[2] = torch.nan, INF, -INF
    source[3, K // 2] = torch.nan
    rows = pycdgkd.multi_source_kl(logits, [source], reduction="none")
    assert rows[:4].isnan().all()
    assert torch.equal(rows[4], good[4])


@pytest.mark.parametrize("K", [40, 3000])
def test_rows_far_apart_in_memory(K: int) -> None:
    big = torch.full((5 * 300, K + 5), torch.nan)
    logits = big[::300, 3 : 3 + K]
    logits.copy_(make_logits(5, K))
    sources = [make_logits(5, K), make_logits(K, 5).t()]
    compare(logits, sources, torch.arange(5))


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded", "one column"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(1, 65), (37, 100), (83, 65), (130, 1030)])
def test_any_strides(N: int, K: int, dtype: torch.dtype, layout: str) -> None:
    """Transposed rows are copied 64 at a time, in tiles of 16 by 16: neither divides all sizes."""
    view = (
        LAYOUTS | {"expanded": expanded, "one column": lambda x: x[:, :1].expand(-1, x.shape[1])}
    )[layout]
    sources = [view(make_logits(N, K, dtype=dtype)), make_logits(N, K, dtype=dtype)]
    compare(view(make_logits(N, K, dtype=dtype)), sources, torch.arange(N) % K)


@pytest.mark.parametrize("K", [70001, 2**20 + 3])
def test_transposed_rows_too_long_to_be_copied_together(K: int) -> None:
    N = 18 if K < 2**20 else 2
    logits, source, labels = make_logits(K, N), make_logits(K, N), torch.arange(N)
    straight = pycdgkd.distillation_loss(logits.t().contiguous(), [source.t().contiguous()], labels)
    across = pycdgkd.distillation_loss(logits.t(), [source.t()], labels)
    for ours, theirs in zip(across, straight, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
@pytest.mark.parametrize("K", [2, 32, 63, 64, 1000])
def test_a_source_without_the_students_best_class(K: int, kd_weight: float) -> None:
    logits, source = torch.zeros(3, K), torch.zeros(3, K)
    logits[0, 0], source[0, 0] = 5.0, -INF
    rows = pycdgkd.multi_source_kl(logits, [source], reduction="none")
    assert rows.tolist() == [INF, 0.0, 0.0]
    labels = torch.tensor([0, 1, 1])
    loss, cross_entropy, kl = pycdgkd.distillation_loss(
        logits, [source], labels, kd_weight=kd_weight
    )
    assert kl == INF
    assert loss == (INF if kd_weight else cross_entropy)
