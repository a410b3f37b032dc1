"""torch.library.opcheck on every registered op, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scenarios import FEW, MANY, K, N, inputs
from torch import Tensor
from torch.library import opcheck

OPS = torch.ops.pycdgkd


Call = tuple[str, Any, tuple[Any, ...]]


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


def prototype_calls(K: int) -> Iterator[Call]:
    """The ops whose prototypes may be many: they return other things then."""
    s, z1, z2, c1, c2, y, *_ = inputs(K=K)
    counts = torch.arange(K) % 4
    S, A, B, C, E = leaves_of(s, z1, z2, c1, c2)
    one, rows = torch.tensor(-1.5), torch.randn(N)
    options = (1.0, 1, -100)
    for reduction in range(3):
        call = (A, C, y, counts, 1.0, reduction, -100, True, True)
        yield f"prototype_loss_{reduction}", OPS.prototype_loss, call
    yield "prototype_loss_features", OPS.prototype_loss, (A, c1, y, None, *options, True, False)
    yield "prototype_loss_prototypes", OPS.prototype_loss, (z1, C, y, None, *options, False, True)
    yield "prototype_loss_no_grad", OPS.prototype_loss, (z1, c1, y, None, *options, False, False)
    for grad, reduction, flags in (
        (one, 1, (True, True)),
        (rows, 0, (True, False)),
        (rows, 0, (True, True)),
        (one, 2, (False, True)),
    ):
        needs = (z1, c1, y, counts, 1.0, reduction, -100, *flags)
        saved = OPS.prototype_loss(*needs)[2]
        name = f"prototype_loss_backward_{reduction}_{flags}"
        yield name, OPS.prototype_loss_backward, (grad, saved, *needs)
    call = ([z1, z2], [c1, c2], y, counts, 1.0, -100)
    yield "convergence_rates", OPS.convergence_rates, call
    for given, taking_part in (([C, E], counts), ([c1, c2], None), ([], None)):
        call = (
            S,
            [A, B],
            given,
            y,
            taking_part,
            0.5,
            1.0,
            -100,
            True,
            bool(given) and given[0] is C,
        )
        yield f"teacher_loss_{len(given)}_{taking_part is None}", OPS.teacher_loss, call
    call = (s, [z1, z2], [], y, None, 0.5, 1.0, -100, False, False)
    yield "teacher_loss_no_grad", OPS.teacher_loss, call
    for need_prototypes, need_features in ((True, [1, 1]), (True, [0, 1]), (False, [1, 0])):
        call = (s, [z1, z2], [c1, c2], y, counts, 0.5, 1.0, -100, True, need_prototypes)
        saved = OPS.teacher_loss(*call)[5]
        call = (one, saved, s, [z1, z2], y, counts, 1.0, -100, need_features, need_prototypes)
        yield (
            f"teacher_loss_backward_{need_prototypes}_{need_features}",
            OPS.teacher_loss_backward,
            call,
        )


def other_calls() -> Iterator[Call]:
    s, z1, z2, c1, _, y, t1, t2 = inputs()
    counts, weights = torch.tensor([3, 0, 2, 1]), torch.tensor([0.0, 1.0])
    one, rows, unit_grad = torch.tensor(-1.5), torch.randn(N), torch.randn(N, K)
    S, A, B = leaves_of(s, z1, z2)
    yield "class_prototypes", OPS.class_prototypes, ([A, B], y, K, -100)
    yield "class_prototypes_backward", OPS.class_prototypes_backward, ([c1], [z1], y, counts, -100)
    yield "modality_weights", OPS.modality_weights, (torch.rand(3),)
    for reduction in range(3):
        call = (S, [t1, t2], weights, 2.0, reduction % 2, reduction, True)
        yield f"multi_source_kl_{reduction}", OPS.multi_source_kl, call
    yield "multi_source_kl_backward", OPS.multi_source_kl_backward, (rows, unit_grad, s)
    call = (S, [t1, t2], y, None, 0.5, 2.0, 0, 2.0, -100, True)
    yield "distillation_loss", OPS.distillation_loss, call
    yield "distillation_loss_backward", OPS.distillation_loss_backward, (one, unit_grad, s)


CALLS = {name: (op, call) for name, op, call in other_calls()}
for size in (K, FEW, MANY):
    CALLS |= {f"{name}-{size}": (op, call) for name, op, call in prototype_calls(size)}


@pytest.mark.parametrize("name", CALLS)
# opcheck looks at the .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# torch's own fake-tensor machinery still uses torch.jit.script, which newer releases deprecate.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_opcheck(name: str) -> None:
    """Schema, fake tensors, autograd registration, ahead-of-time dispatch with symbolic shapes."""
    op, call = CALLS[name]
    opcheck(op.default, call)
