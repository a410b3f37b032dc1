"""The ground that all methods of one label, seed and split stand on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycdgkd.data.splits import Split
from pycdgkd.errors import InputError, require
from pycdgkd.files import write_atomically
from pycdgkd.models.networks import EEGNet, MultimodalNet, Network, VisualNet, build_eeg
from pycdgkd.training.chain import Chain
from pycdgkd.training.checkpoint import WEIGHTS
from pycdgkd.training.config import DistillConfig, TrainConfig
from pycdgkd.training.environment import Progress, derive_seed
from pycdgkd.training.inference import network_logits
from pycdgkd.training.loop import Fit
from pycdgkd.training.objective import Objective
from pycdgkd.training.recordings import Batch, Indices, Recordings, eeg_statistics
from pycdgkd.training.task import FitState, Task, finished_state

from .method import Classifier


class Sealed(Recordings):
    """Recordings whose test samples nobody gets: they are used once, by the evaluation.

    labels: -1 for every test sample.
    """

    @classmethod
    def of(cls, data: Recordings, test: Indices) -> Sealed:
        """The same recordings without their test samples."""
        labels = data.labels.copy()
        labels[test] = -1
        return cls(data.cache, labels, data.classes, data.device)

    def batch(self, indices: Indices) -> Batch:
        """The samples of these cache indices; ``InputError`` when a test sample is among them."""
        if (self.labels[indices] < 0).any():
            raise InputError(
                "leakage: a method asked for samples of the test split; expected those of train "
                "and validation alone; remedy: mend the method"
            )
        return super().batch(indices)


@dataclass
class Bench:
    """Data, split, schedule and shared networks of one label, seed and fold.

    method, settings: whose turn it is. data, split: without test samples. out: folder of this
    label, seed and fold. All methods build their networks from the same seed and role, so that
    equal ones start from equal weights and see equal batches.
    """

    config: TrainConfig
    data: Recordings
    split: Split
    out: Path
    method: str
    settings: Any
    progress: Progress = None

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        data: Recordings,
        split: Split,
        out: Path,
        method: str,
        settings: Any,
        progress: Progress = None,
    ) -> Bench:
        """Seal the test split away."""
        nothing = np.zeros(0, dtype=np.int64)
        sealed = Sealed.of(data, split.test)
        return cls(config, sealed, replace(split, test=nothing), out, method, settings, progress)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.data.num_classes

    def chain(self, config: TrainConfig, name: str) -> Chain:
        """Networks of a configuration (teacher, assistants, student, ...) in folder ``name``.

        Methods that name the same configuration and folder share what is trained there.
        """
        return Chain(config, self.out / name, self.data, self.split, self.progress)

    def teacher(self) -> Chain:
        """The chain whose rebalanced teacher all students learn from; trained on first use."""
        chain = self.chain(replace(self.config, assistants=0), "shared")
        chain.train_network("teacher")
        return chain

    def distilled(self, distill: DistillConfig, assistants: int) -> Classifier:
        """Assistants and student trained by Eq. 9 with these settings, from the shared teacher."""
        config = replace(self.config, distill=distill, assistants=assistants)
        chain = self.chain(config, self.method)
        chain.trained = {"teacher": self.teacher().folder("teacher")}
        roles = [role for role in config.roles if role.startswith("assistant")]
        spent = sum(chain.train_network(role).seconds for role in roles)
        state = chain.train_network("student")
        return self.classifier(chain.load("student"), state, spent=spent)

    def visual_net(self) -> VisualNet:
        """A student with initial weights, the same for every method of a seed."""
        net = self.chain(self.config, "shared").build("student")
        assert isinstance(net, VisualNet), "students see video alone"
        return net

    def multimodal_net(self, level: int = 0) -> MultimodalNet:
        """A teacher (level 0) or assistant with initial weights, the same for every method."""
        role = "teacher" if level == 0 else f"assistant_{level}"
        net = self.chain(replace(self.config, assistants=max(level, 1)), "shared").build(role)
        assert isinstance(net, MultimodalNet), "teachers and assistants see both modalities"
        return net

    def eeg_net(self) -> EEGNet:
        """The teacher's EEG branch and a classifier with initial weights."""
        self.seed("eeg")
        cache = self.data.cache
        net = build_eeg(
            self.config.preset,
            num_classes=self.num_classes,
            n_chans=cache.eeg.shape[1],
            n_times=cache.eeg.shape[2],
            sfreq=cache.sfreq,
        )
        net.eeg.set_statistics(*eeg_statistics(cache, self.split.train))
        return net.to(self.data.device)

    def seed(self, role: str) -> int:
        """Seed torch's generators for the weights of a role; returns the seed."""
        seed = derive_seed(self.config.seed, role, "weights")
        torch.manual_seed(seed)
        return seed

    def fit(
        self,
        role: str,
        net: Network,
        objective: Objective,
        *,
        seed_role: str = "student",
        epochs: int | None = None,
    ) -> FitState:
        """Train ``net`` with the schedule that all methods share; leaves the best weights in it.

        The best epoch is that of the highest validation accuracy. Interrupted trainings go on,
        finished ones are loaded. role: a name within the method. seed_role: whose batch order and
        dropout it shares. epochs: for pre-training, which validation accuracy cannot judge: train
        exactly so many and leave the last weights.
        """
        optim = self.config.optim
        if epochs is not None:
            optim = replace(optim, epochs=epochs, patience=epochs)
        folder = self.out / self.method / role
        identity = {
            "method": self.method,
            "settings": {name: str(value) for name, value in asdict(self.settings).items()},
            **self.chain(self.config, "shared").identity(role),
        }
        task = Task(
            role=role,
            title=f"{self.method} {role}",
            folder=folder,
            data=self.data,
            split=self.split,
            optim=optim,
            seed=self.config.seed,
            seed_role=seed_role,
            identity=identity,
            progress=self.progress,
            keep_last=epochs is not None,
        )
        done = finished_state(folder, identity)
        safetensors = require("safetensors.torch", "train")
        if done is not None:
            net.load_state_dict(safetensors.load_file(folder / WEIGHTS))
            return done
        fit = Fit(net, objective, task)
        state = fit.run()
        tensors = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
        content = safetensors.save(tensors)
        write_atomically(folder / WEIGHTS, lambda path: path.write_bytes(content))
        fit.finish()
        return state

    def classifier(
        self, net: Network, state: FitState, *notes: str, spent: float = 0.0
    ) -> Classifier:
        """What ``fit`` left, as a method returns it; spent: seconds on what it learned from."""
        return Classifier(
            logits=lambda data, indices: self.logits(net, data, indices),
            parameters=sum(p.numel() for p in net.parameters()),
            seconds=state.seconds + spent,
            epochs=state.epoch,
            val_accuracy=state.best_accuracy,
            notes=[*state.notes, *notes],
        )

    def logits(self, net: Network, data: Recordings, indices: Indices) -> Tensor:
        """Logits (n, K) of a network in evaluation mode, on the CPU."""
        return network_logits(net, data, indices, self.config.optim.part_size).cpu()
