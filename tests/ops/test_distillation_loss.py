from __future__ import annotations

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
    make_labels,
    make_logits,
)
from torch import Tensor

import pycdgkd
from pycdgkd import reference


def compare(
    logits: Tensor, sources: list[Tensor] | Tensor, labels: Tensor, **options: Any
) -> pycdgkd.DistillationLoss:
    dtype = logits.dtype
    exact = double_leaf(logits)
    expected = reference.distillation_loss(exact, [t.double() for t in sources], labels, **options)
    fused = logits.detach().requires_grad_()
    result = pycdgkd.distillation_loss(fused, sources, labels, **options)
    for ours, theirs in zip(result, expected, strict=True):
        assert_value(ours, theirs, dtype)
    assert not result.cross_entropy.requires_grad
    assert not result.kl.requires_grad
    expected[0].backward()
    result.loss.backward()
    assert exact.grad is not None
    assert_kl_grad(fused.grad, exact.grad, dtype)
    return result


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "K", "S"), [(1, 2, 1), (2, 3, 2), (15, 1, 3), (16, 5, 8), (17, 31, 2), (129, 2, 3)]
)
def test_matches_reference(dtype: torch.dtype, N: int, K: int, S: int, direction: str) -> None:
    sources = [make_logits(N, K, dtype=dtype) for _ in range(S)]
    compare(make_logits(N, K, dtype=dtype), sources, make_labels(N, K), direction=direction)


@pytest.mark.parametrize("kd_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("temperature_power", [0, 1, 2, 0.5])
def test_options(kd_weight: float, temperature: float, temperature_power: float) -> None:
    compare(
        make_logits(33, 6),
        torch.stack([make_logits(33, 6) for _ in range(3)]),
        make_labels(33, 6),
        kd_weight=kd_weight,
        temperature=temperature,
        temperature_power=temperature_power,
        source_weights=torch.tensor([0.0, 1.0, 1.0]),
    )


def test_defaults_are_those_of_the_paper() -> None:
    logits, sources, labels = make_logits(9, 2), [make_logits(9, 2)], make_labels(9, 2)
    loss, cross_entropy, kl = pycdgkd.distillation_loss(logits, sources, labels)
    torch.testing.assert_close(loss, 0.5 * cross_entropy + 0.5 * kl)
    torch.testing.assert_close(kl, pycdgkd.multi_source_kl(logits, sources, temperature=2.0))


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype: torch.dtype, layout: str) -> None:
    view = (LAYOUTS | {"expanded": expanded})[layout]
    sources = [view(make_logits(33, 5, dtype=dtype)), make_logits(33, 5, dtype=torch.float16)]
    compare(view(make_logits(33, 5, dtype=dtype)), sources, make_labels(33, 5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 200])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_labels_and_ignored_rows(dtype: torch.dtype, ignore_index: int, direction: str) -> None:
    """An ignored row takes part in neither term, whatever it holds."""
    logits, labels = make_logits(20, 5), make_labels(20, 5)
    sources = [make_logits(20, 5) for _ in range(2)]
    labels[labels == 2] = 3
    if dtype != torch.uint8 or ignore_index > 0:
        labels[[0, 7, 16, 19]] = ignore_index
    labels = labels.to(dtype)
    options: dict[str, Any] = {"ignore_index": ignore_index, "direction": direction}
    result = compare(logits, sources, labels, **options)
    compare(logits, sources, labels.repeat_interleave(2)[1::2], **options)
    ignored = labels == ignore_index
    logits[ignored], sources[0][ignored] = torch.nan, torch.inf
    fused = logits.requires_grad_()
    again = pycdgkd.distillation_loss(fused, sources, labels, **options)
    assert [x.item() for x in again] == [x.item() for x in result]
    (grad,) = torch.autograd.grad(again.loss, fused)
    assert torch.equal(grad[ignored], torch.zeros(int(ignored.sum()), 5))
    assert grad.isfinite().all()


@pytest.mark.parametrize("labels", [torch.zeros(0, dtype=torch.int64), torch.full((5,), -100)])
def test_no_row_takes_part(labels: Tensor) -> None:
    """As F.cross_entropy has it: a mean over nothing is NaN, its gradient zero."""
    logits = torch.randn(len(labels), 3, requires_grad=True)
    result = pycdgkd.distillation_loss(logits, [torch.randn(len(labels), 3)], labels)
    assert all(value.isnan() for value in result)
    (grad,) = torch.autograd.grad(result.loss, logits)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("sources", [[], [torch.full((17, 4), torch.nan)]])
def test_no_active_source_leaves_the_cross_entropy(sources: list[Tensor]) -> None:
    logits, labels = make_logits(17, 4).requires_grad_(), make_labels(17, 4)
    result = pycdgkd.distillation_loss(
        logits, sources, labels, source_weights=torch.zeros(len(sources))
    )
    assert result.kl.item() == 0.0
    exact = double_leaf(logits)
    expected = torch.nn.functional.cross_entropy(exact, labels)
    assert_value(result.cross_entropy, expected, torch.float32)
    (grad,) = torch.autograd.grad(result.loss, logits)
    assert_kl_grad(grad, 0.5 * torch.autograd.grad(expected, exact)[0], torch.float32)


def test_weight_zero_leaves_out_an_infinite_divergence() -> None:
    logits, labels = make_logits(17, 3).requires_grad_(), make_labels(17, 3)
    source = torch.tensor([0.0, 1.0, -torch.inf]).expand(17, 3)
    result = pycdgkd.distillation_loss(logits, [source], labels, kd_weight=0.0)
    assert result.kl.item() == torch.inf
    assert torch.equal(result.loss, result.cross_entropy)
    (grad,) = torch.autograd.grad(result.loss, logits)
    assert grad.isfinite().all()
    assert pycdgkd.distillation_loss(logits, [source], labels).loss.item() == torch.inf


def test_excluded_and_huge_logits_in_the_cross_entropy() -> None:
    logits = torch.tensor(
        [[1e4, -1e4, 0.0], [-torch.inf, 0.0, 1.0], [0.0, -torch.inf, 0.0]], requires_grad=True
    )
    labels = torch.tensor([0, 1, 1])
    rows = [
        pycdgkd.distillation_loss(logits[i : i + 1], [], labels[i : i + 1], kd_weight=0.0)
        for i in range(3)
    ]
    assert rows[0].loss.item() == 0.0
    torch.testing.assert_close(rows[1].loss, torch.tensor(1.0).exp().log1p())
    assert rows[2].loss.item() == torch.inf
    grads = [torch.autograd.grad(row.loss, logits)[0] for row in rows]
    torch.testing.assert_close(grads[2][2], torch.tensor([0.5, -1.0, 0.5]))
    torch.testing.assert_close(grads[1][1], torch.tensor([0.0, -0.7310586, 0.7310586]))


def test_sure_rows_keep_a_relatively_exact_cross_entropy() -> None:
    logits = torch.tensor([[30.0, 0.0, 1.0]], requires_grad=True)
    result = pycdgkd.distillation_loss(logits, [], torch.tensor([0]), kd_weight=0.0)
    p = torch.tensor([0.0, -30.0, -29.0], dtype=torch.float64).exp()
    expected = p[1] + p[2]
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(result.loss, logits)
    exact = torch.stack([-expected, p[1], p[2]])
    torch.testing.assert_close(grad[0].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grad_output", [0.0, -2.5, 2.0**16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_outputs(dtype: torch.dtype, grad_output: float) -> None:
    logits, labels = make_logits(18, 4, dtype=dtype), make_labels(18, 4)
    sources = [make_logits(18, 4, dtype=dtype)]
    fused, exact = logits.clone().requires_grad_(), double_leaf(logits)
    (pycdgkd.distillation_loss(fused, sources, labels).loss * grad_output).backward()
    expected = reference.distillation_loss(exact, [t.double() for t in sources], labels)[0]
    (expected * grad_output).backward()
    assert exact.grad is not None
    assert_kl_grad(fused.grad, exact.grad, dtype)


@pytest.mark.parametrize("K", [2, 5, 64])
def test_an_infinite_cross_entropy_of_weight_0_takes_no_part(K: int) -> None:
    logits, labels, sources = make_logits(6, K), make_labels(6, 2), [make_logits(6, K)]
    logits[0, 0], labels[0] = -torch.inf, 0
    loss, cross_entropy, kl = pycdgkd.distillation_loss(logits, sources, labels, kd_weight=1.0)
    assert cross_entropy == torch.inf
    assert loss.isfinite()
    assert loss == kl


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("kd_weight", [0.0, 0.5, 1.0])
def test_gradcheck(direction: str, kd_weight: float) -> None:
    logits = make_logits(5, 4, dtype=torch.float64).requires_grad_()
    sources = [make_logits(5, 4, dtype=torch.float64) for _ in range(2)]
    labels = torch.tensor([0, 3, -100, 1, 1])

    def loss(s: Tensor) -> Tensor:
        return pycdgkd.distillation_loss(
            s, sources, labels, kd_weight=kd_weight, temperature_power=2, direction=direction
        ).loss

    assert torch.autograd.gradcheck(loss, (logits,))
