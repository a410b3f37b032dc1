from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import trial_split
from pycdgkd.errors import InputError
from pycdgkd.models.networks import VisualNet, build_visual
from pycdgkd.training import loop
from pycdgkd.training.config import OptimConfig, TrainConfig
from pycdgkd.training.inference import accuracy_and_loss, network_logits
from pycdgkd.training.loop import Fit
from pycdgkd.training.objective import CrossEntropy
from pycdgkd.training.recordings import Recordings
from pycdgkd.training.task import FitState, Task


@pytest.fixture
def task(cache: Path, tmp_path: Path) -> Task:
    opened = Cache.open(cache)
    return Task(
        role="control",
        title="control",
        folder=tmp_path / "control",
        data=Recordings.open(opened, TrainConfig(), torch.device("cpu")),
        split=trial_split(opened.samples, seed=0, fractions=(0.6, 0.2, 0.2)),
        optim=OptimConfig(epochs=2, batch_size=24, lr=1e-3, patience=2),
        seed=0,
        seed_role="student",
        identity={"role": "control"},
    )


def visual_net(*, dropout: bool = True) -> VisualNet:
    torch.manual_seed(0)
    net = build_visual("nano", img_size=24)
    for module in net.modules():
        if not dropout and isinstance(module, nn.Dropout | nn.MultiheadAttention):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)
    return net


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def scripted(
    monkeypatch: pytest.MonkeyPatch, outcomes: list[tuple[float, float]]
) -> list[dict[str, Tensor]]:
    """Give every validation its outcome; collect the weights that were validated."""
    seen: list[dict[str, Tensor]] = []
    following = iter(outcomes)

    def logits_of(net: nn.Module, *_: Any) -> Tensor:
        seen.append({name: value.clone() for name, value in net.state_dict().items()})
        return torch.zeros(1, 2)

    monkeypatch.setattr(loop, "network_logits", logits_of)
    monkeypatch.setattr(loop, "accuracy_and_loss", lambda *_: next(following))
    return seen


@pytest.mark.parametrize(
    ("outcomes", "epochs", "best"),
    [
        pytest.param([(0.5, 1), (0.7, 1), (0.6, 1), (0.6, 1), (0.9, 1)], 4, 2, id="patience"),
        pytest.param([(0.5, 1), (0.4, 1), (0.6, 1), (0.4, 1), (0.4, 1)], 5, 3, id="counts anew"),
        pytest.param([(0.5, 1), (0.6, 1), (0.7, 1), (0.8, 1), (0.9, 1), (1, 1)], 6, 6, id="limit"),
        pytest.param([(0.7, 3), (0.7, 1), (0.7, 2), (0.9, 1)], 3, 2, id="tie goes to lower loss"),
    ],
)
def test_patience_and_best_weights(
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[tuple[float, float]],
    epochs: int,
    best: int,
) -> None:
    seen = scripted(monkeypatch, outcomes)
    net = visual_net()
    optim = replace(task.optim, epochs=6, patience=2)
    state = Fit(net, CrossEntropy(), replace(task, optim=optim)).run()
    assert (state.epoch, state.best_epoch) == (epochs, best)
    assert state.best_accuracy == outcomes[best - 1][0]
    for name, value in net.state_dict().items():
        assert torch.equal(value, seen[best - 1][name]), name
    assert not torch.equal(net.state_dict()["head.1.weight"], seen[best - 2]["head.1.weight"])
    log = rows(task.folder / "log.csv")
    assert len(log) == epochs
    assert max(int(row["epoch"]) for row in log if row["best"] == "1") == best


def test_tie_keeps_the_better_loss_but_does_not_extend_patience() -> None:
    state = FitState()
    answers = []
    for accuracy, loss in [(0.5, 2.0), (0.5, 1.0), (0.5, 1.5), (0.6, 9.0), (0.4, 0.1)]:
        state.epoch += 1
        answers.append(state.judge(accuracy, loss))
    assert answers == [True, True, False, True, False]
    assert (state.best_epoch, state.improved_epoch) == (4, 4)


def test_logs_hold_what_was_trained(task: Task) -> None:
    net = visual_net()
    state = Fit(net, CrossEntropy(), task).run()
    steps, log = rows(task.folder / "steps.csv"), rows(task.folder / "log.csv")
    assert [int(row["step"]) for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [int(row["epoch"]) for row in steps] == [1, 1, 1, 2, 2, 2]
    for epoch in (1, 2):  # batches of 24, 24 and 24
        losses = [float(row["loss"]) for row in steps if int(row["epoch"]) == epoch]
        row = log[epoch - 1]
        assert float(row["train_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
        assert row["kl"] == ""
        assert float(row["learning_rate"]) == task.optim.lr
    logits = network_logits(net, task.data, task.split.val, 24)
    accuracy, loss = accuracy_and_loss(logits, task.data, task.split.val)
    best = log[state.best_epoch - 1]
    assert float(best["val_accuracy"]) == pytest.approx(accuracy, rel=1e-6)
    assert float(best["val_loss"]) == pytest.approx(loss, rel=1e-5)


def test_epoch_means_weigh_a_short_last_batch_by_its_size(task: Task) -> None:
    optim = replace(task.optim, batch_size=50, epochs=1)
    Fit(visual_net(), CrossEntropy(), replace(task, optim=optim)).run()
    first, second = (float(row["loss"]) for row in rows(task.folder / "steps.csv"))
    mean = float(rows(task.folder / "log.csv")[0]["train_loss"])
    assert mean == pytest.approx((50 * first + 22 * second) / 72, rel=1e-5)


def test_every_sample_is_seen_once_an_epoch_in_another_order(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    original = Recordings.batch

    def batch(data: Recordings, indices: Any) -> Any:
        read.append(indices.tolist())
        return original(data, indices)

    monkeypatch.setattr(Recordings, "batch", batch)
    scripted(monkeypatch, [(0.5, 1.0), (0.6, 1.0)])
    Fit(visual_net(), CrossEntropy(), task).run()
    first, second = ([i for part in epoch for i in part] for epoch in (read[:3], read[3:]))
    assert sorted(first) == sorted(second) == task.split.train.tolist()
    assert first != second
    assert first != sorted(first)


def test_micro_batches_give_the_gradient_of_the_batch(task: Task, tmp_path: Path) -> None:
    """Weights after one step of plain gradient descent; the networks have no dropout here."""
    nets = []
    for micro in (0, 7):
        net = visual_net(dropout=False)
        optim = replace(task.optim, micro_batch=micro)
        fit = Fit(net, CrossEntropy(), replace(task, optim=optim, folder=tmp_path / str(micro)))
        fit.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # type: ignore[assignment]  # Adam hides scale
        net.train()
        fit._step(1, torch.arange(24))
        nets.append(net)
    start = visual_net(dropout=False).state_dict()
    for name, whole in nets[0].state_dict().items():
        assert torch.allclose(whole, nets[1].state_dict()[name], atol=1e-6), name
    assert not torch.equal(nets[0].state_dict()["head.1.weight"], start["head.1.weight"])


def test_learning_rate_rises_and_stays(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = replace(task.optim, lr=0.01, warmup=4)
    fit = Fit(visual_net(), CrossEntropy(), replace(task, optim=optim))
    used: list[float] = []
    step = fit.optimizer.step

    def watched() -> None:
        used.append(fit.optimizer.param_groups[0]["lr"])
        step()

    monkeypatch.setattr(fit.optimizer, "step", watched)
    fit.run()
    assert used == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    logged = [float(row["learning_rate"]) for row in rows(task.folder / "log.csv")]
    assert logged == pytest.approx([0.0075, 0.01])


def test_divergence_is_told_and_not_saved(task: Task) -> None:
    net = visual_net()
    net.state_dict()["head.1.weight"].fill_(float("nan"))
    with pytest.raises(InputError, match=r"control diverged: a loss of step 1 .*smaller optim.lr"):
        Fit(net, CrossEntropy(), task).run()
    assert not (task.folder / "checkpoint.pt").exists()


def test_progress_tells_time_left(task: Task) -> None:
    said: list[str] = []
    Fit(visual_net(), CrossEntropy(), replace(task, progress=said.append)).run()
    assert said[0].startswith("control  epoch 1/2  loss ")
    assert "s left" in said[0]
    assert said[1].endswith("stops here")


def test_long_epochs_speak_up(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_SAY_EVERY", -1.0)
    said: list[str] = []
    optim = replace(task.optim, epochs=1)
    Fit(visual_net(), CrossEntropy(), replace(task, optim=optim, progress=said.append)).run()
    assert [line.split("  ")[1:3] for line in said[:2]] == [
        ["epoch 1/1", "step 1/3"],
        ["epoch 1/1", "step 2/3"],
    ]


def test_checkpoint_of_another_run_is_refused(task: Task) -> None:
    Fit(visual_net(), CrossEntropy(), task).run()
    other = replace(task, identity={"role": "control", "split_hash": "b" * 64})
    with pytest.raises(InputError, match="another split hash: None; expected bbbbbbbbbbbb; remedy"):
        Fit(visual_net(), CrossEntropy(), other)
