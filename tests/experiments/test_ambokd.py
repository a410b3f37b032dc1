"""AMBOKD: what the peers teach one another, and how fast each of them may learn."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.methods import ambokd
from pycdgkd.experiments.methods.ambokd import (
    PEERS,
    AMBOKDSettings,
    AttentionFusion,
    MutualLearning,
    guidance,
    peer_losses,
    peer_net,
    rate_factors,
)

from .breaking import check_resumes
from .conftest import QUICK

SETTINGS = AMBOKDSettings()
LR = 1e-4  # the authors', at which the rule is as they have it
CPU = torch.device("cpu")


@pytest.fixture
def bench(open_bench: Callable[..., Bench]) -> Bench:
    return open_bench(ambokd.METHOD)


def test_losses_are_the_equation() -> None:
    torch.manual_seed(0)
    spread = torch.tensor([0.5, 2.0, 6.0], dtype=torch.float64).view(3, 1, 1)
    logits = (spread * torch.randn(3, 5, 4, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, 3, 1, 2, 1])
    found, cross_entropies = peer_losses(list(logits), labels, SETTINGS)
    single = [-own.log_softmax(1)[torch.arange(5), labels].mean() for own in logits]
    soft = (logits / 4).softmax(2)
    expected = []
    for m in range(3):
        loss = single[m]
        for n in {0, 1, 2} - {m}:
            fixed, share = soft[n].detach(), (single[m] / single[n]).detach().clamp(0.1, 10)
            loss = loss + share * 16 * (fixed * (fixed / soft[m]).log()).sum(1).mean()
        expected.append(loss)
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(cross_entropies, torch.stack(single))
    assert not cross_entropies.requires_grad
    for m in range(3):
        (gradient,) = torch.autograd.grad(found[m], logits, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected[m], logits, retain_graph=True)
        torch.testing.assert_close(gradient, wanted)
        assert not gradient[[n for n in range(3) if n != m]].any()  # none to those it learns from


def test_peers_ahead_are_listened_to() -> None:
    weights = guidance(torch.tensor([1.0, 0.5, 0.01]), SETTINGS.limit)
    torch.testing.assert_close(
        weights, torch.tensor([[1.0, 2.0, 10.0], [0.5, 1.0, 10.0], [0.1, 0.1, 1.0]])
    )
    assert guidance(torch.zeros(3), SETTINGS.limit).isfinite().all()


def test_rate_factors_are_the_equation() -> None:
    first, present = torch.tensor([1.0, 2.0, 0.8]), torch.tensor([0.6, 1.5, 0.2])
    slow, middle, fast = 0.4, 0.25, 0.75  # (L0 - L) / L0
    expected = [
        ((middle + fast) / 2 / slow) ** 3,
        ((slow + fast) / 2 / middle) ** 3,  # the visual peer: EEG's and the fusion's, each once
        ((slow + middle) / 2 / fast) ** 3,
    ]
    assert expected[0] > 1 > expected[2] > 0.0
    factors = rate_factors(first, present, SETTINGS, LR)
    torch.testing.assert_close(factors, torch.tensor(expected).clamp(0.1, 10))
    # All at the limit of R.
    worse = rate_factors(first, torch.tensor([3.0, 3.0, 3.0]), SETTINGS, LR)
    torch.testing.assert_close(worse, torch.ones(3))
    apart = rate_factors(torch.ones(3), torch.tensor([0.0, 0.0, 2.0]), SETTINGS, LR)
    torch.testing.assert_close(apart, torch.tensor([0.55**3, 0.55**3, 10.0]))


@pytest.mark.parametrize(
    ("lr", "highest", "most"),
    [
        (1e-4, 1e-3, 10.0),  # the authors': the bound is their own limit
        (5e-4, 1e-3, 2.0),
        (2e-3, 1e-3, 1.0),  # above the bound itself nobody is slowed for it
        (5e-4, math.inf, 10.0),
    ],
)
def test_no_factor_raises_a_rate_above_the_highest(lr: float, highest: float, most: float) -> None:
    settings = replace(SETTINGS, highest=highest)
    factors = rate_factors(torch.ones(3), torch.tensor([0.0, 0.0, 2.0]), settings, lr)
    torch.testing.assert_close(factors, torch.tensor([0.55**3, 0.55**3, most]))


def test_scales_follow_the_losses_of_the_step(bench: Bench) -> None:
    net, objective = peer_net(bench), MutualLearning(SETTINGS, CPU, LR)
    order = itertools.cycle([slice(0, 16), slice(16, 40), slice(40, 50)])

    def one_step(parts: int) -> np.ndarray:
        """Cross-entropy of each peer, by what the objective reports."""
        objective.begin_step()
        total, count = np.zeros(len(PEERS)), 0
        for _ in range(parts):
            batch = bench.data.batch(bench.split.train[next(order)])
            _, values = objective(net, batch, torch.arange(len(batch.labels)))
            _, visual, eeg, fusion = values.tolist()
            total += np.array([eeg, visual, fusion]) * len(batch.labels)
            count += len(batch.labels)
        return np.array([*total, count])

    objective.begin_epoch(net)
    sums = np.zeros(4)
    for parts in (1, 2):
        sums += one_step(parts)
        assert objective.scales() == (1.0, 1.0, 1.0)
    first = sums[:3] / sums[3]
    state, objective = objective.state_dict(), MutualLearning(SETTINGS, CPU, LR)
    objective.load_state_dict(state)  # resumed
    objective.begin_epoch(net)
    with torch.no_grad():  # the EEG peer fares better, so that the factors differ
        net.eeg.head[-1].weight *= 3.0
    for parts in (1, 3):
        *now, count = one_step(parts)
        r = np.clip((first - np.array(now) / count) / first, 0.1, 1)
        others = np.array([r[1] + r[2], r[0] + r[2], r[0] + r[1]]) / 2
        np.testing.assert_allclose(
            objective.scales(), np.clip((others / r) ** 3, 0.1, 10), rtol=1e-4
        )


def test_attention_is_the_equation() -> None:
    torch.manual_seed(0)
    fusion = AttentionFusion((5, 6), 3, token=8).double().eval()
    features = [torch.randn(4, width, dtype=torch.float64) for width in (5, 6)]
    tokens = [embed(x) for embed, x in zip(fusion.embed, features, strict=True)]
    parts = [fusion.qkv(token).chunk(3, dim=1) for token in tokens]  # query, key, value
    mixed = []
    for query, _, _ in parts:
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = [(query[:, head] * key[:, head]).sum(1) / 2 for _, key, _ in parts]
            shares = torch.stack(scores).softmax(0)[:, :, None]
            heads.append(sum(s * part[2][:, head] for s, part in zip(shares, parts, strict=True)))
        mixed.append(torch.cat(heads, dim=1))
    expected = fusion.classify(torch.cat(mixed, dim=1))
    torch.testing.assert_close(fusion(features), expected)
    fusion.train()
    assert (fusion(features) != fusion(features)).any()  # attention drops half


def test_gradients_of_the_fusion_reach_the_encoders(bench: Bench) -> None:
    net = peer_net(bench)
    batch = bench.data.batch(bench.split.train[:8])
    *_, fused = net.peers(batch.video, batch.frame_mask, batch.eeg)
    F.cross_entropy(fused, batch.labels).backward()
    for encoder in (net.eeg.eeg, net.visual.visual):
        assert all(p.grad is not None and p.grad.any() for p in encoder.project.parameters())
    assert all(p.grad is None for p in net.visual.head.parameters())


def test_one_optimiser_takes_the_steps_of_three(bench: Bench) -> None:
    batch = bench.data.batch(bench.split.train[:8])
    net = peer_net(bench).double().eval()
    batch = batch._replace(eeg=batch.eeg.double())
    twin = copy.deepcopy(net)
    objective, rates = MutualLearning(SETTINGS, CPU, LR), (1e-3, 5e-3, 2e-3)
    groups = objective.parameter_groups(net)
    assert len({p for group in groups for p in group}) == len(list(net.parameters()))
    one = torch.optim.Adam([{"params": g, "lr": lr} for g, lr in zip(groups, rates, strict=True)])
    three = [
        torch.optim.Adam(group, lr=lr)
        for group, lr in zip(objective.parameter_groups(twin), rates, strict=True)
    ]
    for _ in range(2):
        one.zero_grad()
        objective(net, batch, torch.arange(8))[0].backward()
        one.step()
        twin.zero_grad()
        logits = twin.peers(batch.video, batch.frame_mask, batch.eeg)
        for loss in peer_losses(logits, batch.labels, SETTINGS)[0]:
            loss.backward(retain_graph=True)
        for optimiser in three:
            optimiser.step()
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("limit", 0.5), ("slowest", 0.0), ("power", -1.0), ("highest", 0.0)],
)
def test_settings_that_cannot_be_meant(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"ambokd.{name}"):
        replace(SETTINGS, **{name: value})  # type: ignore[arg-type]  # on purpose


def test_resumed_training_has_the_bits_of_an_unbroken_one(bench: Bench, tmp_path: Path) -> None:
    check_resumes(replace(bench, config=QUICK), ambokd.train, tmp_path)
