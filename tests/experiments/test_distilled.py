"""DGKD: its loss is the released code's equation, on the settings that it has by default."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycdgkd.experiments.methods.distilled import DGKD
from pycdgkd.models.networks import Network, VisualOutput
from pycdgkd.training.distill import Distillation
from pycdgkd.training.recordings import Batch

N, K, T = 6, 3, 5.0


class GivenLogits(Network):
    """A network whose logits are its parameters."""

    inputs = ("video",)

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, video: Tensor) -> VisualOutput:
        return VisualOutput(self.logits, video)


def drawn(count: int) -> Tensor:
    return 3.0 * torch.randn(count, N, K, dtype=torch.float64)


def one_step(objective: Distillation, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in the logits."""
    net = GivenLogits(logits.clone())
    nothing = torch.zeros(N, 0)
    objective.begin_step()
    loss, _ = objective(net, Batch(nothing, nothing, nothing, labels), torch.arange(N))
    loss.backward()
    assert net.logits.grad is not None
    return loss.detach(), net.logits.grad


@pytest.mark.parametrize("count", [1, 2, 3])
def test_dgkd_sums_over_all_sources_but_the_dropped_one(count: int) -> None:
    torch.manual_seed(count)
    sources, logits, labels = drawn(count), drawn(1)[0], torch.tensor([0, 1, 2, 2, 1, 0])
    names = ["teacher", "assistant_1", "assistant_2"][:count]
    objective = Distillation(DGKD.settings.distill, names, list(sources), seed=0)

    def equation(dropped: int | None) -> tuple[Tensor, Tensor]:
        own = logits.clone().requires_grad_()
        kept = [sources[j] for j in range(count) if j != dropped]
        kl = sum(F.kl_div((own / T).log_softmax(1), (source / T).softmax(1), reduction="batchmean")
                 for source in kept)  # fmt: skip
        loss = 0.5 * F.cross_entropy(own, labels) + 0.5 * T**2 * kl
        (gradient,) = torch.autograd.grad(loss, own)
        return loss.detach(), gradient

    seen = set()
    for _ in range(30):
        loss, gradient = one_step(objective, logits, labels)
        # A single source is never dropped.
        gone = [j for j, weight in enumerate(objective.weights.tolist()) if weight == 0]
        assert len(gone) == (count > 1)
        dropped = gone[0] if gone else None
        expected, expected_gradient = equation(dropped)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
        seen.add(dropped)
    assert seen == (set(range(count)) if count > 1 else {None})
