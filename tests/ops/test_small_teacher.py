"""``teacher_loss`` of a small batch, whose gradients the forward pass makes at once.

On a device one cluster of blocks does everything (csrc/cuda/teacher_cluster.cuh); what its shared
memory does not hold goes by several launches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    LAYOUTS,
    TOLERANCE,
    assert_grad,
    assert_same_bits,
    double_leaf,
    expanded,
    leaf,
    make_features,
    make_labels,
    make_logits,
)
from test_teacher_loss import compare, problem
from torch import Tensor

import pycdgkd
from pycdgkd import reference
from pycdgkd.ops.registration import SMALL_FEATURES, SMALL_MODALITIES, SMALL_ROWS, stays_on_device
from pycdgkd.ops.teacher import _teacher_loss_fake

OPS = torch.ops.pycdgkd
# lambda is the difference of two rates over one of them: where they differ by a percent, rounding
# counts a hundred times.
NEAR_RATES = 1e-5
GIVEN = pytest.mark.parametrize("given", [True, False])
device_only = pytest.mark.skipif(
    not stays_on_device(torch.empty(0)), reason="what only the ops of a device have"
)


def forward(
    logits: Tensor, features: list[Tensor], labels: Tensor, prototypes: list[Tensor] | None = None
) -> tuple[Any, ...]:
    """The raw op, told to leave what a backward pass wants."""
    arguments = (logits, features, prototypes or [], labels, None, 0.5, 1.0, -100, True, False)
    outputs: tuple[Any, ...] = OPS.teacher_loss(*arguments)
    expected = _teacher_loss_fake(*arguments)
    for ours, shape in zip(outputs[5], expected[5], strict=True):
        assert (ours.shape, ours.dtype) == (shape.shape, shape.dtype)
    return outputs


def is_made_at_once(logits: Tensor, features: list[Tensor], labels: Tensor) -> bool:
    left: list[Tensor] = forward(logits, features, labels)[5]
    return [x.shape for x in left] == [logits.shape, *(z.shape for z in features)]


@GIVEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", range(1, 33))
def test_every_number_of_classes(K: int, dtype: torch.dtype, given: bool) -> None:
    logits, features, labels, prototypes = problem(41, K, (5, 130), dtype)
    tolerance = NEAR_RATES if dtype == torch.float32 else None
    chosen = prototypes if given else None
    compare(logits, features, labels, chosen, tolerance=tolerance, scale=0.5, proto_weight=0.7)


@GIVEN
@pytest.mark.parametrize("M", range(1, SMALL_MODALITIES + 1))
@pytest.mark.parametrize("K", [2, 5])
def test_every_number_of_modalities(K: int, M: int, given: bool) -> None:
    widths = (17, 3, 64, 1, 33, 8, 12, 130)[:M]
    logits, features, labels, prototypes = problem(38, K, widths)  # no two rates within 1.9 %
    compare(logits, features, labels, prototypes if given else None)


@GIVEN
@pytest.mark.parametrize(
    ("N", "K", "widths"),
    [
        (1, 2, (1,)),
        (3, 2, (1030,)),
        (5, 3, (4, 2)),
        (64, 2, (1024,)),
        (128, 2, (512, 512)),
        (127, 2, (255, 33)),
        (255, 32, (16, 24, 8, 1)),
        (512, 7, (12, 9)),
        (1024, 2, (16,)),
        (1024, 3, (7,)),
        (9, 2, (0, 4)),
    ],
)
def test_every_size(N: int, K: int, widths: tuple[int, ...], given: bool) -> None:
    logits, features, labels, prototypes = problem(N, K, widths)
    assert is_made_at_once(logits, features, labels)
    compare(logits, features, labels, prototypes if given else None)


@device_only
def test_limits() -> None:
    """Shapes and types alone decide, as the shape function says."""

    def at_once(N: int, widths: list[int], K: int = 2, dtype: torch.dtype = torch.float32) -> bool:
        features = [torch.randn(N, D).to(dtype) for D in widths]
        return is_made_at_once(torch.randn(N, K).to(dtype), features, make_labels(N, K))

    rows = SMALL_ROWS // 2
    assert at_once(rows, [3, 4])
    assert not at_once(rows + 1, [3, 4])
    assert at_once(2, [SMALL_FEATURES // 2])
    assert not at_once(2, [SMALL_FEATURES // 2 + 1])
    assert at_once(4, [3] * SMALL_MODALITIES)
    assert not at_once(4, [3] * (SMALL_MODALITIES + 1))
    assert at_once(4, [3], K=32)
    assert not at_once(4, [3], K=33)
    assert not at_once(4, [3], dtype=torch.bfloat16)
    assert at_once(0, [3])


@GIVEN
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("D", [64, 31])
def test_any_strides(layout: str, D: int, given: bool) -> None:
    view = (LAYOUTS | {"expanded": expanded})[layout]
    logits, features, labels, prototypes = problem(33, 2, (D, 9))
    compare(
        view(logits),
        [view(z) for z in features],
        labels,
        [LAYOUTS["transposed"](c) for c in prototypes] if given else None,
        scale=0.5,
        tolerance=NEAR_RATES if layout == "expanded" else None,
    )


@GIVEN
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_rows_that_do_not_begin_at_a_vector(shift: int, given: bool) -> None:
    """Whole vectors apart, but the first is not aligned."""
    logits, features, labels, prototypes = problem(33, 2, (64, 32))
    views = []
    for z in features:
        memory = torch.full((z.numel() + 8,), torch.nan)
        views.append(memory[shift : shift + z.numel()].view_as(z).copy_(z))
    compare(logits, views, labels, prototypes if given else None)


@pytest.mark.parametrize("K", [2, 5, 32])
@pytest.mark.parametrize("name", ["ignored", "absent", "inactive", "one class", "none"])
@GIVEN
def test_classes_that_take_no_part(name: str, K: int, given: bool) -> None:
    logits, features, labels, prototypes = problem(60, K, (9, 20))
    counts = None
    if name == "ignored":
        labels[::3] = -100
    elif name == "absent":
        labels[labels == 1] = 0
    elif name == "one class":
        labels[:] = 1
    elif name == "none":
        labels[:] = -100
    elif not given:
        pytest.skip("only given prototypes have counts")
    else:
        counts = torch.arange(K).roll(1)  # the class after the first
    chosen = prototypes if given else None
    result = compare(logits, features, labels, chosen, class_counts=counts, tolerance=NEAR_RATES)
    if name == "one class" and not given:
        assert result.convergence_rates.tolist() == [60.0, 60.0]


@GIVEN
def test_the_fastest_modality_gets_no_gradient(given: bool) -> None:
    """lambda 0: zeros, exactly, beside a modality that gets one."""
    logits, _, labels, prototypes = problem(64, 2, (16, 16))
    features = [
        leaf(make_features(c, labels, noise=noise))
        for c, noise in zip(prototypes, (0.1, 3.0), strict=True)
    ]
    result = pycdgkd.teacher_loss(logits, features, labels, prototypes if given else None, scale=4)
    assert result.modality_weights[0] == 0
    assert result.modality_weights[1] > 0
    grads = torch.autograd.grad(result.loss, features)
    assert not grads[0].any()
    assert grads[1].any()


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("where", ["logits", "features", "prototypes"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spreads_as_far_as_elsewhere(value: float, where: str, K: int) -> None:
    """As where the prototypes have a gradient too, which goes by several launches."""
    logits, features, labels, prototypes = problem(12, K, (8, 5))
    {"logits": logits, "features": features[0], "prototypes": prototypes[0]}[where][1, 1] = value
    found = []
    for detach in (True, False):
        leaves = [leaf(x) for x in (logits, *features)]
        given = [leaf(c) for c in prototypes]
        result = pycdgkd.teacher_loss(
            leaves[0], leaves[1:], labels, given, detach_prototypes=detach
        )
        found.append([*result, *torch.autograd.grad(result.loss, leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


@GIVEN
def test_same_bits_every_time(given: bool) -> None:
    logits, features, labels, prototypes = problem(127, 3, (100, 9))
    first, second = (forward(logits, features, labels, prototypes if given else []) for _ in "ab")
    assert_same_bits(first[:5], second[:5])
    assert_same_bits(first[5], second[5])


def test_the_same_without_a_gradient() -> None:
    logits, features, labels, prototypes = problem(50, 4, (30, 9))
    for given in (prototypes, None):
        alone = pycdgkd.teacher_loss(logits, features, labels, given)
        leaves = [leaf(z) for z in features]
        assert_same_bits(
            [x.detach() for x in pycdgkd.teacher_loss(logits, leaves, labels, given)], alone
        )


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_of_the_gradient(dtype: torch.dtype, keep: bool, factor: float) -> None:
    """Taken over, or of a graph that is kept, or of logits in a type that is not the gradient's."""
    logits, features, labels, prototypes = problem(48, 2, (64, 7))
    logits = logits.to(dtype)
    exact = [double_leaf(x) for x in (logits, *features)]
    wanted = [leaf(x) for x in (logits, *features)]
    expected = reference.teacher_loss(exact[0], exact[1:], labels, [c.double() for c in prototypes])
    loss = pycdgkd.teacher_loss(wanted[0], wanted[1:], labels, prototypes).loss
    passes = 2 if keep else 1
    for n in range(passes):
        (loss * factor).backward(retain_graph=n + 1 < passes)
    (expected[0] * factor * passes).backward()
    for ours, theirs in zip(wanted, exact, strict=True):
        assert theirs.grad is not None
        # Each pass is rounded, and so is their sum.
        tolerance = NEAR_RATES + 2 * TOLERANCE[ours.dtype].storage * keep
        assert_grad(ours.grad, theirs.grad, ours.dtype, tolerance)


def test_frozen_modalities_get_none() -> None:
    logits, features, labels, prototypes = problem(48, 2, (64, 7))
    both = [leaf(z) for z in features]
    expected = torch.autograd.grad(
        3 * pycdgkd.teacher_loss(logits, both, labels, prototypes).loss, both
    )
    for frozen in (0, 1):
        leaves = [leaf(z) for z in features]
        leaves[frozen].requires_grad_(False)
        (3 * pycdgkd.teacher_loss(logits, leaves, labels, prototypes).loss).backward()
        assert leaves[frozen].grad is None
        assert_same_bits([leaves[1 - frozen].grad], [expected[1 - frozen]])


@device_only
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 17])
def test_scaling_in_place(count: int, dtype: torch.dtype, factor: float) -> None:
    units = [torch.randn(5 + n, 33, dtype=dtype) for n in range(count)]
    expected = [factor * unit for unit in units]
    OPS.scale_unit_grads_(units, torch.tensor(factor, dtype=dtype))
    assert_same_bits(units, expected)


@device_only
@pytest.mark.parametrize(
    ("unit", "grad_loss", "message"),
    [
        (torch.randn(3), torch.tensor(1.0), r"unit_grads\[1\]: expected shape \(N, K\)"),
        (torch.randn(3, 4).t(), torch.tensor(1.0), r"unit_grads\[1\]: expected what the forward"),
        (torch.randn(3, 4).half(), torch.tensor(1.0), r"unit_grads\[1\]: expected what the forw"),
        (torch.randn(3, 4).double(), torch.tensor(1.0), r"unit_grads\[1\]: expected no float64"),
        (torch.randn(3, 4), torch.ones(3), "grad_loss: expected a scalar"),
    ],
)
def test_what_scaling_refuses(unit: Tensor, grad_loss: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"pycdgkd\.scale_unit_grads_: {message}"):
        OPS.scale_unit_grads_([make_logits(3, 4), unit], grad_loss)


def test_counts_beside_batch_means_are_not_read() -> None:
    """The public function refuses them."""
    logits, features, labels = make_logits(6, 3), [make_logits(6, 4)], make_labels(6, 3)
    losses = [
        OPS.teacher_loss(logits, features, [], labels, counts, 0.5, 1.0, -100, True, False)[2]
        for counts in (None, torch.tensor([0, 1, 1]))
    ]
    assert_same_bits(losses[:1], losses[1:])
