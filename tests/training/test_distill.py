from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file

from pycdgkd import reference
from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import Split, cross_fit, trial_split
from pycdgkd.errors import InputError
from pycdgkd.models.networks import MultimodalNet, VisualNet
from pycdgkd.training.chain import Chain
from pycdgkd.training.checkpoint import load_network
from pycdgkd.training.config import DistillConfig, TrainConfig
from pycdgkd.training.distill import Distillation
from pycdgkd.training.inference import forward, network_logits
from pycdgkd.training.recordings import Recordings
from pycdgkd.training.run import train

Run: TypeAlias = tuple[Path, dict[str, Any]]


def chain_of(run: Run, cache: Path, config: TrainConfig) -> Chain:
    data = Recordings.open(Cache.open(cache), config, torch.device("cpu"))
    return Chain(config, run[0], data, Split.load(run[0] / "split.json"))


@pytest.fixture
def chain(finished: Run, cache: Path, quick: TrainConfig) -> Chain:
    return chain_of(finished, cache, quick)


def test_source_logits_equal_freshly_computed_ones(chain: Chain) -> None:
    for role in ("teacher", "assistant_1"):
        table = chain.frozen_logits(role)
        net, _ = load_network(chain.out / role)
        train_split = chain.split.train
        assert table.shape == (len(train_split), 2)
        for row in (0, 17, len(train_split) - 1):
            with torch.no_grad():
                fresh = forward(net, chain.data.batch(train_split[row : row + 1])).logits
            assert torch.allclose(table[row : row + 1], fresh, atol=1e-5)
        assert not table.requires_grad


def test_batch_reads_the_rows_of_its_samples(chain: Chain) -> None:
    """The loss of a batch in any order equals Eq. 9 with the sources run on that batch."""
    names = ("teacher", "assistant_1")
    config = DistillConfig(kd_weight=0.4, temperature=3.0, strategy="all")
    tables = [chain.frozen_logits(name) for name in names]
    objective = Distillation(config, names, tables, seed=0)
    student = chain.build("student").eval()
    positions = torch.tensor([40, 3, 71, 12, 5])
    batch = chain.data.batch(chain.split.train[positions.numpy()])
    objective.begin_step()
    loss, values = objective(student, batch, positions)
    with torch.no_grad():
        sources = [
            forward(load_network(chain.out / name)[0], batch).logits.double() for name in names
        ]
        logits = forward(student, batch).logits.double()
    expected = reference.distillation_loss(
        logits, sources, batch.labels, kd_weight=0.4, temperature=3.0
    )
    assert values[:3].tolist() == pytest.approx([value.item() for value in expected], rel=1e-4)
    assert values[3:].tolist() == [0.5, 0.5]
    assert loss.requires_grad
    assert not values.requires_grad


def test_sources_stay_frozen_and_are_not_run_during_training(
    cache: Path, quick: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source runs over the train split once; its saved weights never change."""
    written: dict[Path, bytes] = {}
    runs: list[str] = []
    original = Chain.frozen_logits

    def frozen_logits(chain: Chain, role: str) -> torch.Tensor:
        if role not in chain.source_logits:
            runs.append(role)
            path = chain.out / role / "model.safetensors"
            written[path] = path.read_bytes()
        return original(chain, role)

    monkeypatch.setattr(Chain, "frozen_logits", frozen_logits)
    config = replace(quick, optim=replace(quick.optim, epochs=2))
    train(cache, tmp_path / "run", config)
    assert runs == ["teacher", "assistant_1"]
    assert all(path.read_bytes() == content for path, content in written.items())


@pytest.mark.parametrize("strategy", ["subset", "all", "drop_one", "drop_one_sum", "bernoulli_sum"])
def test_weights_of_the_strategies(strategy: str) -> None:
    tables = [torch.zeros(4, 2) for _ in range(3)]
    objective = Distillation(DistillConfig(strategy=strategy), ["a", "b", "c"], tables, seed=1)
    drawn = []
    for _ in range(200):
        objective.begin_step()
        drawn.append(tuple(objective.weights.tolist()))
    seen = set(drawn)
    if strategy == "all":
        assert next(iter(seen)) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
        assert len(seen) == 1
    elif strategy.startswith("drop_one"):
        weight = 1.0 if strategy == "drop_one_sum" else 0.5
        assert seen == {(0.0, weight, weight), (weight, 0.0, weight), (weight, weight, 0.0)}
    elif strategy == "subset":
        assert len(seen) == 7
        assert all(sum(weights) == pytest.approx(1) for weights in seen)
    else:
        assert len(seen) == 8
        assert set().union(*seen) == {0.0, 1.0}


def test_draws_have_a_generator_of_their_own_that_resumes() -> None:
    def draws(objective: Distillation, count: int) -> list[list[float]]:
        drawn = []
        for _ in range(count):
            objective.begin_step()
            drawn.append(objective.weights.tolist())
        return drawn

    tables = [torch.zeros(4, 2) for _ in range(3)]
    first = Distillation(DistillConfig(), ["a", "b", "c"], tables, seed=1)
    begun = draws(first, 5)
    state = first.state_dict()
    rest = draws(first, 20)
    torch.rand(3)
    second = Distillation(DistillConfig(), ["a", "b", "c"], tables, seed=2)
    second.load_state_dict(state)
    assert draws(second, 20) == rest
    assert draws(Distillation(DistillConfig(), ["a", "b", "c"], tables, seed=1), 5) == begun


def test_strategy_none_makes_student_and_control_the_same(
    cache: Path, quick: TrainConfig, tmp_path: Path
) -> None:
    """They share initial weights, batch order and dropout; without sources nothing is left."""
    config = replace(
        quick,
        distill=replace(quick.distill, strategy="none"),
        optim=replace(quick.optim, epochs=2),
    )
    results = train(cache, tmp_path / "run", config)
    student = load_file(tmp_path / "run" / "student" / "model.safetensors")
    control = load_file(tmp_path / "run" / "control" / "model.safetensors")
    assert all(torch.equal(student[name], control[name]) for name in student)
    assert results["networks"]["student"]["sources"] == []
    assert results["comparison"]["student_minus_control"]["value"] == 0.0


def test_distillation_changes_the_student(finished: Run, chain: Chain) -> None:
    student = load_file(finished[0] / "student" / "model.safetensors")
    control = load_file(finished[0] / "control" / "model.safetensors")
    assert any(not torch.equal(student[name], control[name]) for name in student)
    first, second = chain.build("student"), chain.build("control")
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_dense_guidance_and_simplified_networks(cache: Path, quick: TrainConfig) -> None:
    config = replace(quick, assistants=2)
    opened = Cache.open(cache)
    data = Recordings.open(opened, TrainConfig(), torch.device("cpu"))
    dense = Chain(config, cache, data, trial_split(opened.samples, seed=0))
    assert [dense.sources(role) for role in config.roles] == [
        (),
        ("teacher",),
        ("teacher", "assistant_1"),
        ("teacher", "assistant_1", "assistant_2"),
        (),
    ]
    nets = [dense.build(role) for role in config.roles]
    assert [type(net) for net in nets] == [MultimodalNet] * 3 + [VisualNet] * 2
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] == sizes[4]


def test_kl_is_logged_with_the_drawn_sources(finished: Run) -> None:
    with (finished[0] / "student" / "steps.csv").open(newline="") as file:
        steps = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    drawn = {(step["weight_teacher"], step["weight_assistant_1"]) for step in steps}
    assert drawn <= {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}
    assert len(drawn) > 1
    for step in steps:
        total = 0.5 * step["cross_entropy"] + 0.5 * step["kl"]
        assert step["loss"] == pytest.approx(total, rel=1e-4)
        assert step["kl"] > 0


def test_source_of_another_split_is_refused(cache: Path, quick: TrainConfig, finished: Run) -> None:
    chain = chain_of(finished, cache, quick)
    other = replace(chain.split, hash="f" * 64)
    with pytest.raises(
        InputError, match=r"trained with another split hash: .* expected ffffffffffff"
    ):
        Chain(quick, finished[0], chain.data, other).frozen_logits("teacher")


def test_out_of_fold_guidance_comes_from_networks_that_never_saw_the_sample(
    cache: Path, quick: TrainConfig, tmp_path: Path
) -> None:
    """Each row is what the fold's own network, trained without the row's trial, says of it."""
    distill = replace(quick.distill, guidance="out-of-fold", folds=2)
    config = replace(quick, distill=distill, optim=replace(quick.optim, epochs=1))
    data = Recordings.open(Cache.open(cache), config, torch.device("cpu"))
    split = trial_split(data.cache.samples, seed=0, fractions=quick.split.fractions)
    chain = Chain(config, tmp_path, data, split)
    table = chain.frozen_logits("assistant_1")
    assert table.shape == (len(split.train), 2)
    assert torch.isfinite(table).all()
    hashes = set()
    for fold, (own, left) in enumerate(cross_fit(split, data.cache.samples, 2), start=1):
        folder = tmp_path / "out_of_fold" / f"fold_{fold:02d}"
        assert sorted(path.name for path in folder.iterdir()) == ["assistant_1", "teacher"]
        net, meta = load_network(folder / "assistant_1")
        assert meta["split_hash"] == own.hash
        hashes.add(own.hash)
        expected = network_logits(net, data, split.train[left], 16)
        torch.testing.assert_close(table[left], expected)
    assert len(hashes | {split.hash}) == 3
    # What was trained once is not trained again, and the run itself has no such network.
    assert torch.equal(Chain(config, tmp_path, data, split).frozen_logits("assistant_1"), table)
    assert not (tmp_path / "assistant_1").exists()
