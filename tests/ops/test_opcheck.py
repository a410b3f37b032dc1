"""torch.library.opcheck on every registered op, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scenarios import K, N, inputs
from torch.library import opcheck

OPS = torch.ops.pycdgkd


def raw_calls() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    s, z1, z2, c1, c2, y, t1, t2 = inputs()
    counts, grads = torch.tensor([3, 0, 2, 1]), {"requires_grad": True}
    leaves = [x.clone().requires_grad_(**grads) for x in (s, z1, z2, c1, c2)]
    one, two = torch.tensor(-1.5), torch.tensor(2.0, dtype=torch.float64)
    rows, residual, weights = torch.randn(N), torch.randn(N, K), torch.tensor([0.0, 1.0])
    S, A, B, C, E = leaves
    yield "class_prototypes", OPS.class_prototypes, ([A, B], y, K, -100)
    yield "class_prototypes_backward", OPS.class_prototypes_backward, ([c1], [z1], y, counts, -100)
    for reduction in range(3):
        call = (A, C, y, counts, 1.0, reduction, -100, True)
        yield f"prototype_loss_{reduction}", OPS.prototype_loss, call
    yield "prototype_loss_no_grad", OPS.prototype_loss, (z1, c1, y, None, 1.0, 1, -100, False)
    for grad, flags in ((one, (True, True)), (rows, (True, False)), (one, (False, True))):
        call = (grad, two, residual, z1, c1, counts, *flags)
        yield f"prototype_loss_backward_{flags}", OPS.prototype_loss_backward, call
    yield "convergence_rates", OPS.convergence_rates, ([z1, z2], [c1, c2], y, None, 1.0, -100)
    yield "modality_weights", OPS.modality_weights, (torch.rand(3),)
    call = (S, [A, B], [C, E], y, counts, 0.5, 1.0, -100, True)
    yield "teacher_loss", OPS.teacher_loss, call
    call = (s, [z1, z2], [c1, c2], y, None, 0.5, 1.0, -100, False)
    yield "teacher_loss_no_grad", OPS.teacher_loss, call
    saved = (torch.ones(3).double(), torch.randn(2, N, K), residual)
    for need in (True, False):
        call = (one, *saved, s, [z1, z2], [c1, c2], None, need)
        yield f"teacher_loss_backward_{need}", OPS.teacher_loss_backward, call
    for reduction in range(3):
        call = (S, [t1, t2], weights, 2.0, reduction % 2, reduction, True)
        yield f"multi_source_kl_{reduction}", OPS.multi_source_kl, call
    yield "multi_source_kl_backward", OPS.multi_source_kl_backward, (rows, residual, s)
    call = (S, [t1, t2], y, None, 0.5, 2.0, 0, 2.0, -100, True)
    yield "distillation_loss", OPS.distillation_loss, call
    yield "distillation_loss_backward", OPS.distillation_loss_backward, (one, residual, s)


CALLS = {name: (op, call) for name, op, call in raw_calls()}


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
