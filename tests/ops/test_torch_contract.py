"""What torch expects of an op, for all ops alike: schemas, graphs, memory, modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import assert_same_bits, make_logits
from scenarios import CASES, LOSSES, MANY, WIDTHS, N, inputs, run, with_grad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pycdgkd
from pycdgkd.ops.registration import centred_size, stays_on_device

OPS = torch.ops.pycdgkd
ALL = pytest.mark.parametrize(("name", "K"), CASES)


@ALL
def test_inputs_are_left_as_they_were(name: str, K: int) -> None:
    loss, positions = LOSSES[name]
    leaves = with_grad(inputs(K=K), positions)
    versions, copies = [t._version for t in leaves], [t.detach().clone() for t in leaves]
    value = loss(leaves)
    value.backward()
    assert [t._version for t in leaves] == versions
    assert_same_bits([t.detach() for t in leaves], copies)


@ALL
def test_backward_twice_adds_the_same(name: str, K: int) -> None:
    loss, positions = LOSSES[name]
    leaves = with_grad(inputs(K=K), positions)
    value = loss(leaves)
    wanted = [leaves[i] for i in positions]
    copies = []
    for keep in (True, True, False):
        grads = torch.autograd.grad(value, wanted, retain_graph=keep)
        copies.append([grad.clone() for grad in grads])
        for grad in grads:  # belongs to the caller: what becomes of it is no matter of the graph
            if 0 not in grad.stride():  # zeros of a modality that weighs nothing
                grad.fill_(torch.nan)
    assert_same_bits(copies[0], copies[1])
    assert_same_bits(copies[0], copies[2])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, wanted)


@ALL
@pytest.mark.parametrize("keep", [True, False])
def test_second_derivatives_are_refused(name: str, K: int, keep: bool) -> None:
    loss, positions = LOSSES[name]
    leaves = with_grad(inputs(torch.float64, K), positions)
    wanted = [leaves[i] for i in positions]
    grads = torch.autograd.grad(loss(leaves), wanted, create_graph=True, retain_graph=keep)
    plain = torch.autograd.grad(loss(leaves), wanted)
    assert_same_bits([g.detach() for g in grads], plain)
    message = r"pycdgkd\.\w+_backward: has no derivative; second derivatives .* not implemented"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(sum(g.sum() for g in grads), wanted)


def saved_tensors(call: Callable[[], Any]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    return saved


@ALL
def test_nothing_is_saved_where_no_gradient_is_wanted(name: str, K: int) -> None:
    loss, positions = LOSSES[name]
    leaves = with_grad(inputs(K=K), positions)
    with torch.no_grad():
        assert not saved_tensors(lambda: loss(leaves))
        quiet = loss(leaves)
    assert not quiet.requires_grad
    assert not saved_tensors(lambda: loss(inputs(K=K)))
    with torch.inference_mode():
        inference = loss(inputs(K=K))
    assert_same_bits([quiet, inference], [run(name, inputs(K=K))[0]] * 2)


def left_for_backward(name: str, K: int) -> int:
    """Elements made by the forward ops for the backward ops.

    Never (N, K) of a prototype loss of many classes, and never (N, D) of one of few.
    """
    if name == "class_prototypes":
        return 0
    if name == "teacher_loss" and K != MANY:  # gradients at once
        return N * (K + sum(WIDTHS))
    if name.startswith("teacher_loss"):
        statistics = 4 + 3 * len(WIDTHS)
        padded_classes = (K + 15) // 16 * 16
        centred = sum((1 + K) * 16 + padded_classes for _ in WIDTHS)  # rows of whole vectors
        return statistics + centred + (1 if K == MANY else 1 + len(WIDTHS)) * N * K
    if name.startswith("prototype_loss") and K == MANY:
        return 0 if name.endswith("rows") else (N + K) * WIDTHS[0]
    return N * K


class Outputs(TorchDispatchMode):
    """Remembers what the ops of this library return."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "pycdgkd":
            self.tensors += [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result


@ALL
def test_no_gradient_is_made_where_none_is_wanted(name: str, K: int) -> None:
    """Without a graph nothing is formed for a backward pass; with one what that needs, no more."""
    loss, positions = LOSSES[name]
    sizes = []
    for wanted in (False, True):
        with Outputs() as outputs, torch.set_grad_enabled(wanted):
            loss(with_grad(inputs(K=K), positions))
        sizes.append(sum(t.numel() for t in outputs.tensors))
    assert sizes[1] == sizes[0] + left_for_backward(name, K)
    assert sizes[0] <= 2 * N + 2 * K * sum(WIDTHS)


@ALL
def test_only_the_inputs_are_saved_at_their_size(name: str, K: int) -> None:
    """Beside the inputs themselves only what the backward pass needs is kept."""
    loss, positions = LOSSES[name]
    leaves = with_grad(inputs(K=K), positions)
    own = {t.untyped_storage().data_ptr() for t in leaves}
    saved = saved_tensors(lambda: loss(leaves))
    extra = {t.untyped_storage().data_ptr(): t for t in saved}
    sizes = [t.untyped_storage().nbytes() for p, t in extra.items() if p not in own]
    means = K * WIDTHS[0] if name == "class_prototypes" else 0  # kept by the scenario's square()
    few = name.startswith("prototype_loss") and K != MANY
    centred = centred_size(WIDTHS[0], K) if few and stays_on_device(leaves[0]) else 0
    statistics_and_counts = 8 * (2 * K + 16)
    assert sum(sizes) <= 4 * (left_for_backward(name, K) + means + centred) + statistics_and_counts


@pytest.mark.parametrize("K", [4, MANY])
def test_outputs_of_the_raw_ops_are_empty_without_need_grad(K: int) -> None:
    s, z, _, c, _, y, t, _ = inputs(K=K)
    assert OPS.prototype_loss(z, c, y, None, 1.0, 1, -100, False, False)[2] == []
    for given in ([c], []):
        call = (s, [z], given, y, None, 0.5, 1.0, -100, False, False)
        assert OPS.teacher_loss(*call)[5] == []
    assert OPS.multi_source_kl(s, [t], None, 1.0, 0, 1, False)[1].numel() == 0
    assert OPS.distillation_loss(s, [t], y, None, 0.5, 1.0, 0, 0.0, -100, False)[3].numel() == 0


@ALL
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(name: str, K: int, autocast_dtype: torch.dtype) -> None:
    before = run(name, inputs(K=K))
    with torch.autocast("cpu", dtype=autocast_dtype):
        during = run(name, inputs(K=K))
    assert_same_bits(before, during)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Fills uninitialised memory with NaN, among other things."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@ALL
@pytest.mark.usefixtures("deterministic")
def test_every_output_is_written(name: str, K: int) -> None:
    results = run(name, inputs(K=K))
    torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in results)
    assert_same_bits(results, run(name, inputs(K=K)))


@ALL
def test_checkpointing(name: str, K: int) -> None:
    loss, positions = LOSSES[name]
    leaves = with_grad(inputs(K=K), positions)
    value = torch.utils.checkpoint.checkpoint(lambda: loss(leaves), use_reentrant=False)
    grads = torch.autograd.grad(value, [leaves[i] for i in positions])
    assert_same_bits([value.detach(), *grads], run(name, inputs(K=K)))


def test_functorch_refuses() -> None:
    logits, sources = make_logits(4, 3), [make_logits(4, 3)]
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda s: pycdgkd.multi_source_kl(s, sources))(logits)


@ALL
def test_low_precision_inputs_get_gradients_of_their_own_type(name: str, K: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = inputs(dtype, K)
        value, *grads = run(name, x)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert [g.dtype for g in grads] == [dtype] * len(grads)
