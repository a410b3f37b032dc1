from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

from pycdgkd import reference
from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import trial_split
from pycdgkd.models.networks import MultimodalNet
from pycdgkd.training.chain import Chain
from pycdgkd.training.config import TeacherConfig, TrainConfig
from pycdgkd.training.inference import evaluating
from pycdgkd.training.recordings import Recordings
from pycdgkd.training.run import train
from pycdgkd.training.teacher import Rebalancing

Run: TypeAlias = tuple[Path, dict[str, Any]]


@pytest.fixture
def chain(cache: Path, quick: TrainConfig, tmp_path: Path) -> Chain:
    opened = Cache.open(cache)
    data = Recordings.open(opened, TrainConfig(), torch.device("cpu"))
    split = trial_split(opened.samples, seed=0, fractions=quick.split.fractions)
    return Chain(quick, tmp_path, data, split)


def setup(chain: Chain, config: TeacherConfig) -> tuple[MultimodalNet, Rebalancing]:
    net = chain.build("teacher")
    assert isinstance(net, MultimodalNet)
    return net, Rebalancing(config, net, chain.data, chain.split.train, 16)


def features_of_train(chain: Chain, net: MultimodalNet) -> tuple[list[torch.Tensor], torch.Tensor]:
    with evaluating(net):
        batch = chain.data.batch(chain.split.train)
        output = net(batch.video, batch.frame_mask, batch.eeg)
    return [output.video, output.eeg], batch.labels


def test_prototypes_are_class_means_of_the_train_split_in_evaluation_mode(chain: Chain) -> None:
    net, objective = setup(chain, TeacherConfig())
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    objective.begin_epoch(net)
    features, labels = features_of_train(chain, net)
    for bank, z in zip(objective._banks(), features, strict=True):
        expected, counts = reference.class_prototypes(z.double(), labels, 2)
        assert torch.allclose(bank.prototypes.double(), expected, atol=1e-5)
        assert bank.counts.tolist() == counts.tolist() == chain.data.class_sizes(chain.split.train)
    assert net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), f"{name}: the pass must leave the network alone"


def test_only_train_samples_are_read(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    net, objective = setup(chain, TeacherConfig())
    read: list[int] = []
    original = Recordings.batch

    def batch(data: Recordings, indices: Any) -> Any:
        read.extend(indices.tolist())
        return original(data, indices)

    monkeypatch.setattr(Recordings, "batch", batch)
    objective.begin_epoch(net)
    assert read == chain.split.train.tolist()


def test_prototypes_are_smoothed_by_momentum(chain: Chain) -> None:
    net, objective = setup(chain, TeacherConfig(momentum=0.2))
    objective.begin_epoch(net)
    old = [bank.prototypes.clone() for bank in objective._banks()]
    with torch.no_grad():
        net.visual.project.bias.add_(1.0)
    objective.begin_epoch(net)
    moved = objective._banks()[0].prototypes - old[0]
    assert torch.allclose(moved, torch.full_like(moved, 0.8), atol=1e-5)
    assert torch.allclose(objective._banks()[1].prototypes, old[1], atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_loss_and_weights_are_those_of_the_equations(chain: Chain, scale: float) -> None:
    net, objective = setup(chain, TeacherConfig(proto_weight=0.3, scale=scale))
    objective.begin_epoch(net)
    net.eval()
    batch = chain.data.batch(chain.split.train[:10])
    loss, values = objective(net, batch, torch.arange(10))
    output = net(batch.video, batch.frame_mask, batch.eeg)
    expected = reference.teacher_loss(
        output.logits.double(),
        [output.video.double(), output.eeg.double()],
        batch.labels,
        [bank.prototypes.double() for bank in objective._banks()],
        proto_weight=0.3,
        scale=scale,
    )
    total, cross_entropy, prototype_losses, rates, weights = expected
    parts = [total[None], cross_entropy[None], prototype_losses, rates / 10, weights]
    assert torch.allclose(values.double(), torch.cat(parts).detach(), rtol=2e-4, atol=2e-5)
    assert loss.item() == pytest.approx(total.item(), rel=2e-4)
    assert not values.requires_grad


def test_gradient_reaches_the_slower_modality_through_its_prototype_loss(chain: Chain) -> None:
    net, objective = setup(chain, TeacherConfig(proto_weight=1.0))
    objective.begin_epoch(net)
    loss, values = objective(net, chain.data.batch(chain.split.train[:16]), torch.arange(16))
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    named = dict(zip(objective.columns, values.tolist(), strict=True))
    slow, fast = (
        (net.visual, net.eeg) if named["rate_video"] < named["rate_eeg"] else (net.eeg, net.visual)
    )
    strongest = [
        0.0 if net.project.weight.grad is None else float(net.project.weight.grad.abs().max())
        for net in (slow, fast)
    ]
    assert strongest[0] > 0
    assert strongest[1] == 0


def test_steps_log_obeys_equation_6(finished: Run) -> None:
    """At each step the faster modality has weight 0 and the slower clip(ratio - 1, 0, 1)."""
    with (finished[0] / "teacher" / "steps.csv").open(newline="") as file:
        steps = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert len(steps) == 15
    for step in steps:
        video, eeg = step["rate_video"], step["rate_eeg"]
        assert 0 < video <= 1
        assert 0 < eeg <= 1
        expected = np.clip([max(video, eeg) / video - 1, max(video, eeg) / eeg - 1], 0, 1)
        assert [step["lambda_video"], step["lambda_eeg"]] == pytest.approx(expected, abs=2e-5)
        rebalancing = (
            step["lambda_video"] * step["prototype_loss_video"]
            + step["lambda_eeg"] * step["prototype_loss_eeg"]
        )
        total = 0.5 * step["cross_entropy"] + 0.5 * rebalancing
        assert step["loss"] == pytest.approx(total, rel=1e-3, abs=1e-5)
    assert any(step["lambda_video"] + step["lambda_eeg"] > 0 for step in steps)


def test_without_prototype_weight_no_prototypes_are_computed(
    cache: Path, quick: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rebalancing, "begin_epoch", lambda *_: pytest.fail("prototype pass"))
    config = replace(
        quick,
        assistants=0,
        teacher=replace(quick.teacher, proto_weight=0.0),
        optim=replace(quick.optim, epochs=1),
    )
    train(cache, tmp_path / "run", config)
    header = (tmp_path / "run" / "teacher" / "steps.csv").read_text().splitlines()[0]
    assert header == "step,epoch,loss,cross_entropy"
