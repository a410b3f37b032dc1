from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.methods import ogm_ge
from pycdgkd.experiments.methods.ogm_ge import (
    OGMGE,
    OGMGESettings,
    alone_scores,
    coefficients,
    modulate,
)
from pycdgkd.models.networks import MultimodalNet
from pycdgkd.training.objective import CrossEntropy

from .breaking import check_resumes
from .conftest import LEARNING

CPU = torch.device("cpu")


def test_scores_are_those_of_the_head_with_one_modality_alone() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    video, eeg = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    labels = torch.tensor([0, 2, 1, 1, 0])
    before = torch.get_rng_state()
    scores = alone_scores(head, video, eeg, labels)
    assert torch.equal(torch.get_rng_state(), before)  # dropout of the training is not disturbed
    assert head.training
    assert not scores.requires_grad
    expected = []
    for columns, features in ((slice(0, 3), video), (slice(3, 7), eeg)):
        hidden = (features @ head[1].weight[:, columns].T + head[1].bias).relu()
        p = (hidden @ head[3].weight.T + head[3].bias).softmax(1)
        expected.append(sum(p[i, y] for i, y in enumerate(labels)))
    torch.testing.assert_close(scores, torch.stack(expected))


def test_coefficients_slow_the_modality_ahead() -> None:
    k = coefficients(torch.tensor([6.0, 3.0]), 0.5)
    assert k.tolist() == pytest.approx([1 - math.tanh(0.5 * 2.0), 1.0])
    k = coefficients(torch.tensor([3.0, 4.0]), 0.1)
    assert k.tolist() == pytest.approx([1.0, 1 - math.tanh(0.1 * 4 / 3)])
    assert coefficients(torch.tensor([2.0, 2.0]), 0.5).tolist() == [1.0, 1.0]
    assert coefficients(torch.tensor([2.0, 0.0]), 0.5).tolist() == [0.0, 1.0]
    assert coefficients(torch.tensor([0.0, 0.0]), 0.5).tolist() == [1.0, 1.0]


def test_noise_has_the_deviation_of_the_gradient_and_comes_from_its_generator() -> None:
    gradient = 3.0 * torch.randn(200, 200, generator=torch.Generator().manual_seed(1)) + 1.0
    k = torch.tensor(0.25)
    changed = modulate(gradient, k, torch.Generator().manual_seed(2))
    noise = changed - 0.25 * gradient
    assert float(noise.std()) == pytest.approx(float(gradient.std()), rel=0.02)
    assert abs(float(noise.mean())) < 0.05
    correlation = torch.corrcoef(torch.stack([noise.flatten(), gradient.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.03
    assert torch.equal(changed, modulate(gradient, k, torch.Generator().manual_seed(2)))
    torch.testing.assert_close(modulate(gradient, k, None), 0.25 * gradient)
    assert modulate(torch.ones(1), k, torch.Generator().manual_seed(2)).isfinite().all()


def step(net: MultimodalNet, objective: OGMGE, bench: Bench, parts: int = 1) -> list[torch.Tensor]:
    """Gradients of one step on the train split, batch statistics and dropout apart."""
    net.zero_grad()
    net.eval()
    objective.begin_step()
    for part in bench.split.train.reshape(parts, -1):
        loss, _ = objective(net, bench.data.batch(part), torch.arange(len(part)))
        (loss / parts).backward()
    plain = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    objective.adjust_gradients(net)
    return plain


def test_only_the_branch_ahead_is_slowed_and_never_the_head(
    open_bench: Callable[..., Bench],
) -> None:
    bench = open_bench(ogm_ge.METHOD)
    net = bench.multimodal_net()
    objective = OGMGE(OGMGESettings(noise=False), CPU, 0)
    objective.begin_epoch(net)
    plain = step(net, objective, bench)
    k_video, k_eeg = coefficients(objective.scores, 0.5).tolist()
    assert min(k_video, k_eeg) < 0.6
    assert max(k_video, k_eeg) == 1.0
    for (name, parameter), before in zip(net.named_parameters(), plain, strict=True):
        branch = name.split(".")[0]
        k = {"visual": k_video, "eeg": k_eeg, "head": 1.0}[branch]
        torch.testing.assert_close(parameter.grad, k * before)


def test_both_branches_get_noise_of_their_gradients_size(open_bench: Callable[..., Bench]) -> None:
    bench = open_bench(ogm_ge.METHOD)
    net = bench.multimodal_net()
    objective = OGMGE(OGMGESettings(), CPU, 0)
    objective.begin_epoch(net)
    plain = step(net, objective, bench)
    k = dict(zip(("visual", "eeg"), coefficients(objective.scores, 0.5), strict=True))
    for (name, parameter), before in zip(net.named_parameters(), plain, strict=True):
        branch = name.split(".")[0]
        assert parameter.grad is not None
        if branch == "head":
            assert torch.equal(parameter.grad, before)
        elif before.numel() > 1000:
            noise = parameter.grad - k[branch] * before
            assert float(noise.std()) == pytest.approx(float(before.std()) + 1e-8, rel=0.1)


def test_scores_are_sums_over_the_parts_of_a_batch(open_bench: Callable[..., Bench]) -> None:
    bench = open_bench(ogm_ge.METHOD)
    net = bench.multimodal_net()
    objective = OGMGE(OGMGESettings(), CPU, 0)
    step(net, objective, bench)
    whole = objective.scores
    step(net, objective, bench, parts=3)
    torch.testing.assert_close(objective.scores, whole)


def test_gradients_are_modulated_in_the_epochs_meant_for_it(
    open_bench: Callable[..., Bench],
) -> None:
    bench = open_bench(ogm_ge.METHOD)
    net = bench.multimodal_net()
    objective = OGMGE(OGMGESettings(first_epoch=1, last_epoch=2), CPU, 0)
    changed = []
    for _ in range(4):
        objective.begin_epoch(net)
        plain = step(net, objective, bench)
        after = [p.grad for p in net.parameters()]
        changed.append(not all(map(torch.equal, plain, after)))  # type: ignore[arg-type]
    assert changed == [False, True, True, False]


def test_a_saved_state_goes_on_with_the_same_noise(open_bench: Callable[..., Bench]) -> None:
    bench = open_bench(ogm_ge.METHOD)
    net = bench.multimodal_net()
    objective = OGMGE(OGMGESettings(), CPU, 0)
    objective.begin_epoch(net)
    step(net, objective, bench)
    state = objective.state_dict()
    other = OGMGE(OGMGESettings(), CPU, 1)
    other.load_state_dict(state)
    gradients = []
    for one in (objective, other):
        one.begin_epoch(net)
        step(net, one, bench)
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert other.epoch == objective.epoch == 1
    assert all(map(torch.equal, *gradients))


def test_without_strength_and_noise_it_is_plain_fusion(open_bench: Callable[..., Bench]) -> None:
    bench = open_bench(ogm_ge.METHOD)
    bench.config = replace(bench.config, optim=replace(bench.config.optim, epochs=1))
    nets = [bench.multimodal_net(), bench.multimodal_net()]
    objectives = [OGMGE(OGMGESettings(alpha=0.0, noise=False), CPU, 0), CrossEntropy()]
    for role, net, objective in zip("ab", nets, objectives, strict=True):
        bench.fit(role, net, objective, seed_role="teacher")
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_settings_that_cannot_be_meant() -> None:
    with pytest.raises(InputError, match=r"ogm-ge: alpha: expected .* got -1"):
        OGMGESettings(alpha=-1.0)
    with pytest.raises(InputError, match="0 <= first <= last; got 3 and 2"):
        OGMGESettings(first_epoch=3, last_epoch=2)


def test_interrupted_trainings_go_on(open_bench: Callable[..., Bench], tmp_path: Path) -> None:
    bench = open_bench(ogm_ge.METHOD, replace(LEARNING, optim=replace(LEARNING.optim, epochs=3)))
    check_resumes(bench, ogm_ge.train, tmp_path)
