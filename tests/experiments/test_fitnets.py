"""FitNets: the loss, the table of hints, the regressor in training, both ways to take the hint."""

from __future__ import annotations

import csv
import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_cache import QUICK
from torch import Tensor

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Method
from pycdgkd.experiments.methods import distilled
from pycdgkd.experiments.methods.fitnets import (
    METHOD,
    FitNetsSettings,
    build_hints,
    fitnets_loss,
    fused_features,
    train_fitnets,
)
from pycdgkd.models.networks import MultimodalNet
from pycdgkd.training.loop import Fit

OpenBench = Callable[[Method], Bench]
MOVED = "visual.project.weight"
TWO = replace(METHOD, settings=FitNetsSettings(stages="two", hint_share=0.67))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the teacher is trained once for all."""
    return tmp_path_factory.mktemp("taught")


@pytest.fixture
def quick_bench(open_bench: Callable[..., Bench], taught: Path, tmp_path: Path) -> OpenBench:
    """A bench whose teacher is trained already."""
    replace(open_bench(METHOD, QUICK), out=taught).teacher()
    shutil.copytree(taught, tmp_path, dirs_exist_ok=True)
    return lambda method: open_bench(method, QUICK)


def weights(bench: Bench, role: str) -> dict[str, Tensor]:
    return load_file(bench.out / bench.method / role / "model.safetensors")


def assert_equal_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("weight", [0.0, 0.5, 100 / 101, 1.0])
@pytest.mark.parametrize("K", [2, 5])
def test_loss_and_gradients_agree_with_the_equation(weight: float, K: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
    guess = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    hint, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, K - 1, 1])
    result = fitnets_loss(logits, labels, guess, hint, weight)
    p = logits.detach().exp() / logits.detach().exp().sum(1, keepdim=True)
    cross_entropy = -p[torch.arange(4), labels].log().sum() / 4
    error = sum((h - g) ** 2 for h, g in zip(hint.flatten(), guess.flatten(), strict=True)) / 12
    torch.testing.assert_close(result.cross_entropy, cross_entropy)
    torch.testing.assert_close(result.hint, error)
    torch.testing.assert_close(result.loss, (1 - weight) * cross_entropy + weight * error)
    result.loss.backward()
    torch.testing.assert_close(logits.grad, (1 - weight) * (p - torch.eye(K)[labels]) / 4)
    torch.testing.assert_close(guess.grad, weight * 2 * (guess.detach() - hint) / 12)


def test_hints_are_the_teachers_features_in_evaluation_mode(quick_bench: OpenBench) -> None:
    """The batch reads the rows of its samples, z_v first, then z_e."""
    bench = quick_bench(METHOD)
    student = bench.visual_net().eval()
    objective = build_hints(bench, student, 0.3)
    teacher = bench.teacher().load("teacher").eval()
    assert isinstance(teacher, MultimodalNet)
    positions = torch.tensor([40, 3, 17, 5])
    batch = bench.data.batch(bench.split.train[positions.numpy()])
    with torch.no_grad():
        z_v = teacher.visual(batch.video, batch.frame_mask)
        hint = torch.cat([z_v, teacher.eeg(batch.eeg)], dim=1)
        output = student(batch.video, batch.frame_mask)
        expected = fitnets_loss(
            output.logits, batch.labels, objective.regressor(output.video), hint, 0.3
        )
    assert objective.hints.shape == (len(bench.split.train), 128)
    again = fused_features(teacher.train(), bench.data, bench.split.train, 50)
    torch.testing.assert_close(again, objective.hints, rtol=1e-4, atol=1e-4)
    assert teacher.training
    assert not objective.hints.requires_grad
    loss, values = objective(student, batch, positions)
    assert loss.requires_grad
    assert not values.requires_grad
    torch.testing.assert_close(values, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_regressor_is_trained(quick_bench: OpenBench) -> None:
    """Beside the network, by the same optimiser; where it stands still, the guess stays poor."""
    errors = []
    for frozen in (False, True):
        bench = quick_bench(METHOD)
        bench.method = f"frozen-{frozen}"
        net = bench.visual_net()
        objective = build_hints(bench, net, 0.5)
        before = objective.regressor.weight.detach().clone()
        objective.regressor.requires_grad_(not frozen)
        bench.fit("student", net, objective)
        assert torch.equal(before, objective.regressor.weight) == frozen
        errors.append(float(rows(bench.out / bench.method / "student" / "log.csv")[-1]["hint"]))
    assert errors[0] < 0.9 * errors[1]


def test_without_weight_the_hint_changes_nothing(quick_bench: OpenBench) -> None:
    """Bit for bit the student without distillation: same start, batches and dropout."""
    alone = quick_bench(distilled.ALONE)
    distilled.ALONE.train(alone, alone.settings)
    settings = FitNetsSettings(hint_weight=0.0)
    bench = quick_bench(replace(METHOD, settings=settings))
    train_fitnets(bench, settings)
    assert_equal_bits(weights(bench, "student"), weights(alone, "student"))


def test_pretraining_is_by_the_hint_alone(open_bench: Callable[..., Bench]) -> None:
    """So many epochs, whatever validation says; the encoder moves, the classifier does not."""
    optim = replace(QUICK.optim, patience=1, weight_decay=0.1)
    bench = open_bench(TWO, replace(QUICK, optim=optim))
    start = {name: value.clone() for name, value in bench.visual_net().state_dict().items()}
    classifier = train_fitnets(bench, bench.settings)
    folder = bench.out / "fitnets" / "hinted"
    log = rows(folder / "log.csv")
    assert len(log) == 2  # 0.67 of 3
    assert all(row["train_loss"] == row["hint"] for row in log)
    assert classifier.notes[-1].startswith("2 epochs of pre-training by hints, ")
    assert classifier.seconds > sum(float(row["seconds"]) for row in log)
    hinted = weights(bench, "hinted")
    head = {name for name in hinted if name.startswith("head.")}
    assert_equal_bits({n: hinted[n] for n in head}, {n: start[n] for n in head})
    assert not torch.equal(hinted[MOVED], start[MOVED])


def test_the_last_weights_of_pretraining_start_the_second_stage(
    quick_bench: OpenBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether validation accuracy rises or falls with every epoch of it."""
    starts: dict[str, dict[str, Tensor]] = {}
    fit = Bench.fit

    def spy(self: Bench, role: str, net: Any, objective: Any, **options: Any) -> Any:
        start = {name: value.clone() for name, value in net.state_dict().items()}
        starts[f"{self.method} {role}"] = start
        return fit(self, role, net, objective, **options)

    quick_bench(TWO).teacher()
    monkeypatch.setattr(Bench, "fit", spy)
    for name, change in (("rising", 0.01), ("falling", -0.01)):
        bench = quick_bench(TWO)
        bench.method = name
        accuracies = itertools.count(0.5, change)
        monkeypatch.setattr(
            "pycdgkd.training.loop.accuracy_and_loss",
            lambda *_, accuracies=accuracies: (next(accuracies), 1.0),
        )
        train_fitnets(bench, bench.settings)
        assert_equal_bits(starts[f"{name} student"], weights(bench, "hinted"))
    assert_equal_bits(starts["rising student"], starts["falling student"])
    assert not torch.equal(*(starts[f"rising {role}"][MOVED] for role in ("hinted", "student")))


@pytest.mark.parametrize(
    ("method", "epoch"), [(METHOD, 2), (TWO, 2), (TWO, 4)], ids=["one", "hinted", "second"]
)
def test_interrupted_and_resumed_it_ends_with_the_same_bits(
    quick_bench: OpenBench, method: Method, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, again = quick_bench(method), quick_bench(method)
    again.method = "again"
    train_fitnets(bench, bench.settings)
    left, whole_epoch = itertools.count(epoch - 1, -1), Fit._epoch

    def interrupted(self: Fit) -> None:
        if next(left) == 0:
            raise KeyboardInterrupt
        whole_epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_fitnets(again, again.settings)
    train_fitnets(again, again.settings)
    assert_equal_bits(weights(again, "student"), weights(bench, "student"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": "three"}, "fitnets.stages: expected one of one, two; got 'three'"),
        ({"hint_weight": 50.0}, "hint_weight: expected a number from 0 to below 1; got 50.0"),
        ({"hint_weight": 1.0}, "fitnets.hint_weight"),
        ({"hint_weight": float("nan")}, "fitnets.hint_weight"),
        ({"hint_share": 0.0}, "fitnets.hint_share: expected a number above 0, at most 1; got 0.0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FitNetsSettings(**values)
