from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.methods import pmr
from pycdgkd.experiments.methods.pmr import PMRLoss, PMRSettings, log_closeness, pmr_loss
from pycdgkd.training.objective import CrossEntropy

from .breaking import check_resumes
from .conftest import LEARNING

B, D, K = 7, 5, 3


class Case:
    """Features of which the video's lie by their prototypes and the EEG's do not."""

    def __init__(self, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.labels = torch.arange(B) % K
        self.prototypes = [draw(K, D), draw(K, D)]
        self.video = (self.prototypes[0][self.labels] + 0.3 * draw(B, D)).requires_grad_()
        self.eeg = draw(B, D).requires_grad_()
        self.logits = draw(B, K).requires_grad_()

    def loss(self, weighting: str = "constant", alpha: float = 1.0) -> PMRLoss:
        return pmr_loss(
            self.logits,
            [self.video, self.eeg],
            self.labels,
            self.prototypes,
            torch.ones(K),
            alpha=alpha,
            weighting=weighting,
        )


def by_hand(
    features: np.ndarray, prototypes: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """Prototype loss and rate, sample by sample."""
    true = []
    for z, y in zip(features, labels, strict=True):
        closeness = np.exp([-math.sqrt(((z - c) ** 2).sum()) for c in prototypes])
        true.append(closeness[y] / closeness.sum())
    return float(-np.log(true).mean()), float(np.mean(true))


@pytest.mark.parametrize("weighting", ["constant", "ratio"])
def test_the_loss_is_that_of_the_equations(weighting: str) -> None:
    case = Case()
    result = case.loss(weighting, alpha=0.7)
    arrays = [z.detach().numpy() for z in (case.video, case.eeg)]
    pairs = zip(arrays, case.prototypes, strict=True)
    hand = [by_hand(z, c.numpy(), case.labels.numpy()) for z, c in pairs]
    losses, rates = zip(*hand, strict=True)
    assert rates[0] > rates[1]
    weight = 1.0 if weighting == "constant" else min(rates[0] / rates[1] - 1, 1.0)
    logits = case.logits.detach().numpy()
    true = logits[np.arange(B), case.labels] - np.log(np.exp(logits).sum(1))
    assert float(result.cross_entropy) == pytest.approx(-true.mean())
    assert result.prototype_losses.tolist() == pytest.approx(losses)
    assert result.rates.tolist() == pytest.approx(rates)
    assert result.weights.tolist() == pytest.approx([0.0, weight])
    assert float(result.loss.detach()) == pytest.approx(-true.mean() + 0.7 * weight * losses[1])


def test_gradients_reach_the_slower_modality_alone_and_cross_entropy_in_full() -> None:
    case = Case()
    case.loss().loss.backward()
    assert case.video.grad is not None
    assert case.eeg.grad is not None
    assert case.video.grad.abs().max() == 0
    assert case.eeg.grad.abs().max() > 0
    log_p = log_closeness(case.eeg, case.prototypes[1], torch.ones(K))
    alone = torch.autograd.grad(torch.nn.functional.nll_loss(log_p, case.labels), case.eeg)[0]
    torch.testing.assert_close(case.eeg.grad, alone)
    expected = (case.logits.detach().softmax(1) - torch.eye(K)[case.labels]) / B
    torch.testing.assert_close(case.logits.grad, expected)


def test_closeness_has_the_gradient_of_its_values() -> None:
    case = Case()
    assert torch.autograd.gradcheck(
        lambda z: log_closeness(z, case.prototypes[0], torch.ones(K)), (case.video,)
    )


def test_on_a_prototype_the_distance_has_gradient_zero() -> None:
    prototypes = torch.tensor([[1.0, 2.0], [4.0, 6.0]])
    features = torch.tensor([[1.0, 2.0]], requires_grad=True)
    log_closeness(features, prototypes, torch.ones(2))[0, 0].backward()
    # Only the other prototype, 5 away, pulls: p(1) times the unit vector away from it.
    other = math.exp(-5) / (1 + math.exp(-5))
    torch.testing.assert_close(features.grad, other * torch.tensor([[-0.6, -0.8]]))


def test_the_distance_has_its_square_root() -> None:
    prototypes = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    log_p = log_closeness(torch.zeros(1, 2), prototypes, torch.ones(2))
    assert float(log_p[0, 0] - log_p[0, 1]) == pytest.approx(5.0)


def test_absent_classes_take_no_part() -> None:
    case = Case()
    log_p = log_closeness(case.video, case.prototypes[0], torch.tensor([4, 0, 3]))
    assert (log_p[:, 1] == -math.inf).all()
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(B, dtype=torch.float64))


@pytest.mark.parametrize("weighting", pmr.WEIGHTINGS)
def test_equal_modalities_and_extreme_rates(weighting: str) -> None:
    def weights(*rates: float) -> list[float]:
        return pmr.slower_weights(torch.tensor(rates), weighting).tolist()

    assert weights(0.4, 0.4) == [0.0, 0.0]
    assert weights(0.0, 0.9) == [1.0, 0.0]
    assert weights(0.9, 0.0) == [0.0, 1.0]
    assert weights(0.8, 0.5)[1] == pytest.approx(1.0 if weighting == "constant" else 0.6)


@pytest.mark.parametrize("change", [{"alpha": -1.0}, {"momentum": 1.0}, {"weighting": "clip"}])
def test_settings_that_cannot_be_meant(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"pmr: {next(iter(change))}: expected .* remedy"):
        replace(PMRSettings(), **change)


def test_prototypes_are_smoothed_class_means_of_the_train_split(
    open_bench: Callable[..., Bench],
) -> None:
    bench = open_bench(pmr.METHOD)
    net = bench.multimodal_net()
    objective = pmr.PMR(PMRSettings(), net, bench)
    net.train()
    means = []
    for _ in range(2):
        objective.begin_epoch(net)
        assert net.training
        net.eval()
        with torch.no_grad():
            batch = bench.data.batch(bench.split.train)
            output = net(batch.video, batch.frame_mask, batch.eeg)
        net.train()
        means.append(torch.stack([output.video[batch.labels == k].mean(0) for k in range(2)]))
        with torch.no_grad():
            net.visual.project.weight.mul_(2.0)
    bank = objective._banks()[0]
    torch.testing.assert_close(bank.prototypes, 0.8 * means[1] + 0.2 * means[0])


def test_training_shows_the_weight_on_the_slower_modality(open_bench: Callable[..., Bench]) -> None:
    bench = open_bench(pmr.METHOD)
    bench.config = replace(bench.config, optim=replace(bench.config.optim, epochs=1))
    pmr.train(bench, PMRSettings(alpha=0.3))
    lines = (bench.out / "pmr" / "fusion" / "steps.csv").read_text().splitlines()
    names = lines[0].split(",")
    for line in lines[1:]:
        row = dict(zip(names, map(float, line.split(",")), strict=True))
        slower = "video" if row["rate_video"] < row["rate_eeg"] else "eeg"
        assert row[f"lambda_{slower}"] == pytest.approx(0.3)
        expected = row["cross_entropy"] + 0.3 * row[f"prototype_loss_{slower}"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_without_weight_it_is_plain_fusion(open_bench: Callable[..., Bench]) -> None:
    bench = open_bench(pmr.METHOD)
    bench.config = replace(bench.config, optim=replace(bench.config.optim, epochs=1))
    nets = [bench.multimodal_net(), bench.multimodal_net()]
    objectives = [pmr.PMR(PMRSettings(alpha=0.0), nets[0], bench), CrossEntropy()]
    for role, net, objective in zip("ab", nets, objectives, strict=True):
        bench.fit(role, net, objective, seed_role="teacher")
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_interrupted_trainings_go_on(open_bench: Callable[..., Bench], tmp_path: Path) -> None:
    bench = open_bench(pmr.METHOD, replace(LEARNING, optim=replace(LEARNING.optim, epochs=3)))
    check_resumes(bench, pmr.train, tmp_path)
