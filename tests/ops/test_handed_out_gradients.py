"""A gradient that the forward pass made is handed out itself where nobody else can want it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_bits, make_labels, make_logits
from scenarios import CASES, LOSSES, MANY, Inputs, inputs, run, with_grad
from test_torch_contract import Outputs
from torch import Tensor

import pycdgkd
from pycdgkd.ops.registration import stays_on_device

ALL = pytest.mark.parametrize(("name", "K"), CASES)


def graph(name: str, x: Inputs) -> tuple[Tensor, list[Tensor]]:
    """A loss with its graph and the tensors that it is differentiable in."""
    loss, positions = LOSSES[name]
    leaves = with_grad(x, positions)
    return loss(leaves), [leaves[i] for i in positions]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, other, _: pycdgkd.multi_source_kl(x, [other]),
        lambda x, other, y: pycdgkd.distillation_loss(x, [other], y).loss,
        lambda x, other, y: pycdgkd.prototype_loss(x, other, y).loss,
    ],
    ids=["multi_source_kl", "distillation_loss", "prototype_loss"],
)
def test_copied_only_where_the_graph_is_kept(loss: Callable[..., Tensor], keep: bool) -> None:
    x, other = make_logits(MANY, MANY).requires_grad_(), make_logits(MANY, MANY)
    with Outputs() as made:
        value = loss(x, other, make_labels(MANY, MANY))
        left = {t.data_ptr() for t in made.tensors}
        (grad,) = torch.autograd.grad(value, x, retain_graph=keep)
    assert (grad.data_ptr() in left) is not keep


@ALL
def test_factors(name: str, K: int) -> None:
    """Powers of two multiply exactly, whichever way the gradient takes."""
    value, *grads = run(name, inputs(K=K))
    for factor in (1.0, 2.0, -0.5, 2.0**16, 0.0):
        loss, wanted = graph(name, inputs(K=K))
        assert_same_bits([loss.detach()], [value])
        kept = torch.autograd.grad(loss * factor, wanted, retain_graph=True)
        final = torch.autograd.grad(loss, wanted, torch.tensor(factor))
        for found in (kept, final):
            assert_same_bits(found, [grad * factor for grad in grads])


@ALL
def test_loss_scaling_keeps_what_float16_would_lose(name: str, K: int) -> None:
    """Gradients are rounded to the inputs' type after the factor, not before."""
    if name == "teacher_loss_batch_means":
        pytest.skip("autograd adds two gradients in float16")
    halves = inputs(torch.float16, K)
    exact = [x.float() if x.is_floating_point() else x for x in halves]
    found, expected = [], []
    for x, grads in ((halves, found), (exact, expected)):
        loss, wanted = graph(name, x)
        grads += torch.autograd.grad(loss * 2.0**16, wanted)
    rounded = [grad.half() for grad in expected]
    if not stays_on_device(halves[0]):
        assert_same_bits(found, rounded)
    for ours, theirs in zip(found, rounded, strict=True):  # a device sums 16-bit rows otherwise
        torch.testing.assert_close(ours, theirs, rtol=2**-10, atol=0)


@ALL
def test_gradients_add_up_in_the_leaves(name: str, K: int) -> None:
    """What is handed out becomes .grad, which the next pass and its owner change in place."""
    _, *grads = run(name, inputs(K=K))
    loss, wanted = graph(name, inputs(K=K))
    loss.backward(retain_graph=True)
    assert_same_bits([leaf.grad for leaf in wanted], grads)
    for leaf in wanted:
        leaf.grad.mul_(2)
    loss.backward()
    assert_same_bits([leaf.grad for leaf in wanted], [2 * grad + grad for grad in grads])
    positions = LOSSES[name][1]
    leaves = with_grad(inputs(K=K), positions)
    for _ in range(3):
        LOSSES[name][0](leaves).backward()
    assert_same_bits([leaves[i].grad for i in positions], [g + g + g for g in grads])


@ALL
def test_hooks(name: str, K: int) -> None:
    _, *grads = run(name, inputs(K=K))
    loss, wanted = graph(name, inputs(K=K))
    seen: dict[int, Tensor] = {}

    def halve(index: int) -> Callable[[Tensor], Tensor]:
        return lambda grad: seen.setdefault(index, grad.clone()) / 2

    loss.register_hook(lambda grad: 4 * grad)
    for index, leaf in enumerate(wanted):
        leaf.register_hook(halve(index))
    found = torch.autograd.grad(loss, wanted)
    assert_same_bits([seen[index] for index in range(len(wanted))], [4 * grad for grad in grads])
    assert_same_bits(found, [2 * grad for grad in grads])


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is undefined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(*_: Any) -> None:
        return None


@ALL
def test_undefined_gradients(name: str, K: int) -> None:
    loss, wanted = graph(name, inputs(K=K))
    grads = torch.autograd.grad(NoGradient.apply(loss), wanted, allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


@ALL
def test_saved_tensors_may_be_moved(name: str, K: int) -> None:
    """As save_on_cpu does: what comes back is another tensor."""
    expected = run(name, inputs(K=K))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert_same_bits(run(name, inputs(K=K)), expected)


@pytest.mark.parametrize("K", [4, MANY])
def test_batches_of_gradients(K: int) -> None:
    """As jacobian(vectorize=True) asks for them: no value of a batch can be looked at."""
    logits, source = make_logits(5, K).requires_grad_(), make_logits(5, K)
    factors = torch.tensor([1.0, 0.5, 2.0])
    loss = pycdgkd.distillation_loss(logits, [source], make_labels(5, K)).loss
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (found,) = torch.autograd.grad(loss, logits, factors, is_grads_batched=True)
    assert_same_bits([found], [factors[:, None, None] * one])
