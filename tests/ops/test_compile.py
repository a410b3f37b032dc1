"""torch.compile without graph breaks gives the numbers of eager mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
import torch._functorch.config
import torch._inductor.config
from cases import assert_same_bits, make_logits
from scenarios import LOSSES, MANY, inputs, with_grad
from scenarios import K as FEW
from torch import Tensor

import pycdgkd

# torch's own tracing machinery uses parts of torch that it deprecates itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No graph of before: the caches on disk do not notice that an op of this name has changed."""
    torch._dynamo.reset()
    no_graphs = torch._inductor.config.patch(fx_graph_cache=False)
    with no_graphs, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def compare(name: str, K: int = FEW, **options: object) -> None:
    loss, positions = LOSSES[name]
    compiled = torch.compile(lambda *x: loss(list(x)), fullgraph=True, **options)
    results = []
    for function in (lambda *x: loss(list(x)), compiled):
        leaves = with_grad(inputs(K=K), positions)
        value = function(*leaves)
        grads = torch.autograd.grad(value, [leaves[i] for i in positions])
        results.append([value.detach(), *grads])
    assert_same_bits(results[0][1:], results[1][1:])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_matches_eager(name: str, dynamic: bool) -> None:
    compare(name, backend="aot_eager", dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [name for name in LOSSES if "proto" in name or "teach" in name])
def test_many_classes_match_eager(name: str, dynamic: bool) -> None:
    compare(name, MANY, backend="aot_eager", dynamic=dynamic)


@pytest.mark.parametrize("name", ["teacher_loss_batch_means", "distillation_loss"])
def test_matches_eager_with_inductor(name: str) -> None:
    compare(name, backend="inductor")


def test_low_precision_gradients_keep_their_type() -> None:
    labels = torch.arange(8) % 3

    def loss(s: Tensor, z: Tensor, c: Tensor) -> Tensor:
        return pycdgkd.teacher_loss(s, [z], labels, [c], detach_prototypes=False).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = [torch.randn(8, 3), torch.randn(8, 5), torch.randn(3, 5)]
    results = []
    for function in (loss, compiled):
        leaves = [t.bfloat16().requires_grad_() for t in tensors]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    assert [g.dtype for g in results[1]] == [torch.bfloat16] * 3
    assert_same_bits(*results)


def test_one_graph_serves_changing_batch_sizes() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = torch.compile(
        lambda s, t, y: pycdgkd.distillation_loss(s, [t], y).loss,
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    compiled_graphs = set()
    for N in (5, 17, 130):
        logits, source = make_logits(N, 4).requires_grad_(), make_logits(N, 4)
        labels = torch.arange(N) % 4
        compiled, eager = (
            f(logits, source, labels)
            for f in (loss, lambda s, t, y: pycdgkd.distillation_loss(s, [t], y).loss)
        )
        assert_same_bits(torch.autograd.grad(compiled, logits), torch.autograd.grad(eager, logits))
        compiled_graphs.add(counter.frame_count)
    assert len(compiled_graphs) == 1


def test_ops_without_gradient() -> None:
    def rates(*x: Tensor) -> Tensor:
        found = pycdgkd.convergence_rates([*x[1:3]], [*x[3:5]], x[5])
        return pycdgkd.modality_weights(found) + found

    leaves = with_grad(inputs(), (1, 2, 3, 4))
    compiled = torch.compile(rates, fullgraph=True, backend="aot_eager")(*leaves)
    assert_same_bits([compiled], [rates(*leaves)])
    assert not compiled.requires_grad


def test_no_grad_inside_a_graph() -> None:
    x = with_grad(inputs(), (0,))
    compiled = torch.compile(
        lambda s, t: pycdgkd.multi_source_kl(s, [t]), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        value = compiled(x[0], x[6])
    assert not value.requires_grad
    assert_same_bits([value], [pycdgkd.multi_source_kl(x[0].detach(), [x[6]])])
