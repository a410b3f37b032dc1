"""What can only be seen on a GPU: graphs, streams, waiting, repeated bits, very large tensors.

The op tests themselves run there with PYCDGKD_TEST_DEVICE=cuda; `make gpu-check` does both.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import pycdgkd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Step = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


class Batch:
    """Inputs that can be filled anew in place: two modalities, three sources."""

    def __init__(self, N: int = 128, K: int = 2, D: int = 512) -> None:
        self.labels = torch.randint(K, (N,))
        self.logits = torch.randn(N, K, requires_grad=True)
        self.features = [torch.randn(N, D, requires_grad=True) for _ in range(2)]
        self.prototypes = [torch.randn(K, D) / D**0.5 for _ in range(2)]
        self.sources = [torch.randn(N, K) for _ in range(3)]
        self.weights = torch.full((3,), 1 / 3)

    def refill(self) -> None:
        with torch.no_grad():
            for tensor in (self.logits, *self.features, *self.prototypes, *self.sources):
                tensor.normal_()
            self.labels.random_(0, self.logits.shape[1])
            self.weights.copy_((torch.rand(3) > 0.5).float())

    def steps(self) -> dict[str, Step]:
        """[loss, gradients...] of each loss."""
        b = self

        def step(loss: Callable[[], Tensor], *leaves: Tensor) -> Step:
            def run() -> list[Tensor]:
                value = loss()
                return [value.detach(), *torch.autograd.grad(value, leaves)]

            return run

        return {
            "teacher_loss": step(
                lambda: pycdgkd.teacher_loss(b.logits, b.features, b.labels, b.prototypes).loss,
                b.logits, *b.features,
            ),
            "teacher_loss of batch means": step(
                lambda: pycdgkd.teacher_loss(b.logits, b.features, b.labels).loss,
                b.logits, *b.features,
            ),
            "prototype_loss": step(
                lambda: pycdgkd.prototype_loss(b.features[0], b.prototypes[0], b.labels).loss,
                b.features[0],
            ),
            "distillation_loss": step(
                lambda: pycdgkd.distillation_loss(
                    b.logits, b.sources, b.labels, source_weights=b.weights
                ).loss,
                b.logits,
            ),
        }  # fmt: skip


NAMES = ("teacher_loss", "teacher_loss of batch means", "prototype_loss", "distillation_loss")
SHAPES = [pytest.param(128, 2, 512, id="paper"), pytest.param(300, 40, 33, id="many")]
CLUSTERS = pytest.param(3, 4400, 8, id="clusters")  # of blocks, for a row each
CHUNKS = pytest.param(300, 4400, 8, id="chunks")  # several for each of them


def capture(step: Step) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("N", "K", "D"), [*SHAPES, CHUNKS])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replays_on_changing_inputs(name: str, N: int, K: int, D: int) -> None:
    """1000 times the same bits as eager calls: the counters are zero again after each replay."""
    batch = Batch(N, K, D)
    step = batch.steps()[name]
    graph, results = capture(step)
    for _ in range(1000 if K < 1000 else 50):
        batch.refill()
        graph.replay()
        assert same(results, step())


@pytest.mark.parametrize(("N", "K", "D"), [*SHAPES, CLUSTERS])
@pytest.mark.parametrize("name", NAMES)
def test_the_host_never_waits(name: str, N: int, K: int, D: int) -> None:
    step = Batch(N, K, D).steps()[name]
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_no_new_memory_in_steady_state(name: str) -> None:
    step = Batch().steps()[name]
    for _ in range(3):
        step()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for _ in range(20):
        step()
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


@pytest.mark.parametrize(
    ("N", "K", "D"), [*SHAPES, CHUNKS, pytest.param(20000, 7, 512, id="blocks")]
)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_every_time(name: str, N: int, K: int, D: int) -> None:
    step = Batch(N, K, D).steps()[name]
    first = step()
    assert all(same(first, step()) for _ in range(100))


@pytest.mark.parametrize("name", NAMES)
def test_streams_do_not_disturb_one_another(name: str) -> None:
    batches = [Batch(2000) for _ in range(4)]
    expected = [batch.steps()[name]() for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for batch, stream in zip(batches, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(batch.steps()[name]())
        torch.cuda.synchronize()
        assert all(same(a, b) for a, b in zip(results, expected, strict=True))


def test_more_elements_than_32_bits_count() -> None:
    N, D = 2**21 + 5, 1024
    if torch.cuda.mem_get_info()[0] < 12 * N * D:
        pytest.skip("needs 26 GB of free memory")
    features = torch.zeros(N, D, requires_grad=True)
    with torch.no_grad():
        features[-3:] = torch.randn(3, D)
    prototypes, labels = torch.randn(2, D) / D**0.5, torch.randint(2, (N,))
    loss = pycdgkd.prototype_loss(features, prototypes, labels, reduction="none").loss
    grad = torch.autograd.grad(loss.sum(), features)[0]
    end = features[-3:].detach().requires_grad_()
    expected = pycdgkd.prototype_loss(end, prototypes, labels[-3:], reduction="none").loss
    torch.testing.assert_close(loss[-3:], expected)
    torch.testing.assert_close(grad[-3:], torch.autograd.grad(expected.sum(), end)[0])


def test_a_label_out_of_range_ends_the_kernel() -> None:
    """In a process of its own: no call on the device succeeds after it."""
    program = (
        "import torch, pycdgkd\n"
        "z, c = torch.randn(4, 8, device='cuda'), torch.randn(3, 8, device='cuda')\n"
        "pycdgkd.prototype_loss(z, c, torch.tensor([0, 1, 2, 3], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "CUDA" in done.stderr


def test_tensors_of_different_devices_are_refused() -> None:
    with pytest.raises((RuntimeError, ValueError), match="device"):
        pycdgkd.prototype_loss(
            torch.randn(4, 8), torch.randn(3, 8), torch.zeros(4, dtype=torch.int64, device="cpu")
        )
