"""The epoch loop that trains every network, with early stopping, logs and exact resumption."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pycdgkd.errors import InputError
from pycdgkd.models.networks import Network

from .checkpoint import load_state, save_state
from .environment import derive_seed, describe, duration
from .inference import accuracy_and_loss, network_logits
from .logs import CsvLog
from .objective import Objective
from .task import FitState, Task, check_identity

LOG_COLUMNS = (
    *("epoch", "seconds", "train_loss", "cross_entropy", "kl"),
    *("val_loss", "val_accuracy", "best", "learning_rate"),
)
_SAY_EVERY = 15.0  # seconds between lines inside a long epoch


class Fit:
    """One network in training. ``run`` trains to the end and leaves the best weights in ``net``.

    After every epoch everything that the next one depends on is written to checkpoint.pt; a fresh
    ``Fit`` on the same folder takes up from there and ends with the same bits.
    """

    def __init__(self, net: Network, objective: Objective, task: Task) -> None:
        self.net, self.objective, self.task = net, objective, task
        optim = task.optim
        groups = [{"params": group} for group in objective.parameter_groups(net)]
        self.optimizer = torch.optim.Adam(groups, lr=optim.lr, weight_decay=optim.weight_decay)
        self.order = torch.Generator().manual_seed(derive_seed(task.seed, task.seed_role, "order"))
        torch.manual_seed(derive_seed(task.seed, task.seed_role, "dropout"))
        self.state = FitState()
        self.best: dict[str, Tensor] = {}
        self._epochs_here = 0
        self._seconds_here = 0.0
        task.folder.mkdir(parents=True, exist_ok=True)
        stored = load_state(task.folder)
        self.log, self.steps = self._open_logs({} if stored is None else stored["logs"])
        if stored is not None:
            self._restore(stored)

    def run(self) -> FitState:
        """Train until patience or epochs run out."""
        while not self._done():
            self._epoch()
        self.net.load_state_dict(self.best)
        return self.state

    def finish(self) -> None:
        """Mark the training as finished; the optimiser's state is no longer kept."""
        self.state.finished = True
        save_state(self.task.folder, self._header())

    def _done(self) -> bool:
        state, optim = self.state, self.task.optim
        return state.epoch >= optim.epochs or state.epoch - state.improved_epoch >= optim.patience

    def _open_logs(self, sizes: Mapping[str, int]) -> tuple[CsvLog, CsvLog]:
        extra = [
            name
            for name in self.objective.columns
            if name not in ("loss", "cross_entropy", "kl") and not name.startswith("weight_")
        ]
        folder = self.task.folder
        log = CsvLog(folder / "log.csv", [*LOG_COLUMNS, *extra], sizes.get("log"))
        steps = ("step", "epoch", *self.objective.columns)
        return log, CsvLog(folder / "steps.csv", steps, sizes.get("steps"))

    def _epoch(self) -> None:
        started = time.monotonic()
        self.objective.begin_epoch(self.net)
        self.net.train()
        size = self.task.optim.batch_size
        order = torch.randperm(len(self.task.split.train), generator=self.order)
        batches = torch.split(order, size)
        said = started
        values = []
        for number, positions in enumerate(batches, start=1):
            values.append(self._step(self.state.step + number, positions))
            if time.monotonic() - said > _SAY_EVERY and number < len(batches):
                said = time.monotonic()
                left = duration((said - started) / number * (len(batches) - number))
                self.task.say(
                    f"epoch {self.state.epoch + 1}/{self.task.optim.epochs}  "
                    f"step {number}/{len(batches)}  {left} left in this epoch"
                )
        table = torch.stack(values).double().cpu()  # (steps, columns): the epoch's one wait
        self._check_finite(table)
        self._close_epoch(table, torch.tensor([len(b) for b in batches]).double(), started)

    def _step(self, step: int, positions: Tensor) -> Tensor:
        """One optimiser step; returns the values of the columns, on the device."""
        data, train = self.task.data, self.task.split.train
        self.objective.begin_step()
        self.optimizer.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for part in torch.split(positions, self.task.optim.part_size):
            batch = data.batch(train[part.numpy()])
            loss, values = self.objective(self.net, batch, part)
            share = len(part) / len(positions)
            (loss * share).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            total = values * share if total is None else total + values * share
        self.objective.adjust_gradients(self.net)
        for group, scale in zip(self.optimizer.param_groups, self.objective.scales(), strict=True):
            group["lr"] = scale * self.task.optim.lr_at(step)
        self.optimizer.step()
        assert total is not None, "a batch has at least one sample"
        return total

    def _check_finite(self, table: Tensor) -> None:
        bad = (~torch.isfinite(table).all(1)).nonzero()
        if len(bad):
            raise InputError(
                f"training of {self.task.role} diverged: a loss of step "
                f"{self.state.step + int(bad[0]) + 1} is not finite; remedy: a smaller optim.lr"
            )

    def _close_epoch(self, table: Tensor, sizes: Tensor, started: float) -> None:
        """Validate, log and save the epoch whose steps are in ``table``."""
        task, state = self.task, self.state
        logits = network_logits(self.net, task.data, task.split.val, task.optim.part_size)
        accuracy, loss = accuracy_and_loss(logits, task.data, task.split.val)
        state.epoch += 1
        best = state.judge(accuracy, loss)
        if best or task.keep_last:
            self.best = {k: v.detach().cpu().clone() for k, v in self.net.state_dict().items()}
        means = (table * sizes[:, None]).sum(0) / sizes.sum()
        named = dict(zip(self.objective.columns, means.tolist(), strict=True))
        seconds = time.monotonic() - started
        state.seconds += seconds
        self._log_steps(table)
        state.step += len(table)
        outcome = {"val_loss": loss, "val_accuracy": accuracy, "seconds": seconds}
        self._log_epoch({**named, **outcome}, best)
        self._save()
        self._epochs_here += 1
        self._seconds_here += seconds
        self._say_epoch(named, accuracy)

    def _log_steps(self, table: Tensor) -> None:
        """One row a step; ``state.step`` is still that of the epoch before."""
        rows = []
        for step, values in enumerate(table.tolist(), start=self.state.step + 1):
            texts = (f"{value:.7g}" for value in values)
            named = dict(zip(self.objective.columns, texts, strict=True))
            rows.append({"step": step, "epoch": self.state.epoch, **named})
        self.steps.append(rows)

    def _log_epoch(self, values: Mapping[str, float], best: bool) -> None:
        """One row for the epoch just finished, with the learning rate of its last step."""
        row: dict[str, object] = {name: f"{value:.7g}" for name, value in values.items()}
        row["train_loss"] = row["loss"]
        row["learning_rate"] = f"{self.task.optim.lr_at(self.state.step):.7g}"
        self.log.append([{**row, "epoch": self.state.epoch, "best": int(best)}])

    def _say_epoch(self, means: Mapping[str, float], accuracy: float) -> None:
        state, optim = self.state, self.task.optim
        left = self._seconds_here / self._epochs_here * (optim.epochs - state.epoch)
        pieces = [
            f"epoch {state.epoch}/{optim.epochs}",
            f"loss {means['loss']:.3f}",
            f"val {accuracy:.3f} (best {state.best_accuracy:.3f}, epoch {state.best_epoch})",
        ]
        for name in ("rate", "lambda"):
            if f"{name}_video" in means:
                video, eeg = means[f"{name}_video"], means[f"{name}_eeg"]
                pieces.append(f"{name} video {video:.2f} eeg {eeg:.2f}")
        stopping = "stops here" if self._done() else f"at most {duration(left)} left"
        self.task.say("  ".join([*pieces, stopping]))

    def _header(self) -> dict[str, Any]:
        return {
            "identity": self.task.identity,
            "environment": describe(self.task.data.device),
            "fit": asdict(self.state),
            "logs": {"log": self.log.size, "steps": self.steps.size},
        }

    def _save(self) -> None:
        device = self.task.data.device
        generators = {"order": self.order.get_state(), "cpu": torch.get_rng_state()}
        if device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(device)
        state = {
            **self._header(),
            "generators": generators,
            "best": self.best,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
        }
        save_state(self.task.folder, state)

    def _restore(self, stored: Mapping[str, Any]) -> None:
        check_identity(stored["identity"], self.task.identity, self.task.folder)
        self.state = FitState(**stored["fit"])
        self.best = stored["best"]
        self.net.load_state_dict(stored["net"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.objective.load_state_dict(stored["objective"])
        self.order.set_state(stored["generators"]["order"])
        torch.set_rng_state(stored["generators"]["cpu"])
        if "cuda" in stored["generators"] and self.task.data.device.type == "cuda":
            torch.cuda.set_rng_state(stored["generators"]["cuda"], self.task.data.device)
        self._note_environment(stored["environment"])
        self.task.say(f"resumed after epoch {self.state.epoch}/{self.task.optim.epochs}")

    def _note_environment(self, before: Mapping[str, str]) -> None:
        now = describe(self.task.data.device)
        changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
        if changed:
            self.state.notes.append(
                f"{self.task.role} was resumed after epoch {self.state.epoch} in another "
                f"environment ({', '.join(changed)}): its bits may differ from an unbroken run"
            )
