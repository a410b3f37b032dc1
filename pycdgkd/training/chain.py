"""The chain of networks: teacher, assistants level by level, student, and the control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pycdgkd.data.splits import Split, cross_fit
from pycdgkd.models.networks import MultimodalNet, Network, VisualNet, load_frame_encoder_weights

from .checkpoint import build_network, load_network, save_network
from .config import TrainConfig, config_values
from .distill import Distillation
from .environment import Progress, derive_seed
from .inference import network_logits
from .loop import Fit
from .objective import CrossEntropy, Objective
from .recordings import Indices, Recordings, eeg_statistics
from .task import FitState, Task, check_identity, finished_state
from .teacher import Rebalancing

# Where a run may be resumed on another machine without becoming another experiment.
NO_PART_OF_IDENTITY = ("device", "threads")


@dataclass
class Chain:
    """One run in training.

    out: its folder. trained: folders of networks that were trained elsewhere, by role.
    source_logits: frozen outputs, filled on demand.
    """

    config: TrainConfig
    out: Path
    data: Recordings
    split: Split
    progress: Progress = None
    trained: Mapping[str, Path] = field(default_factory=dict)
    source_logits: dict[str, Tensor] = field(default_factory=dict)

    def train(self) -> dict[str, FitState]:
        """Train what is not yet trained; the end state of every network in order."""
        return {role: self.train_network(role) for role in self.config.roles}

    def folder(self, role: str) -> Path:
        """Where a network lies."""
        return self.trained.get(role, self.out / role)

    def load(self, role: str) -> Network:
        """A trained network of this run, in evaluation mode on the run's device."""
        net, meta = load_network(self.folder(role))
        check_identity(meta, self.meta(role), self.folder(role))
        return net.to(self.data.device)

    def sources(self, role: str) -> tuple[str, ...]:
        """Networks that ``role`` learns from: all before it; none for teacher and control."""
        strategy, place = self.config.distill.strategy, self.config.roles.index(role)
        if role == "control" or strategy == "none":
            return ()
        return self.config.roles[max(place - 1, 0) if strategy == "previous" else 0 : place]

    def level(self, role: str) -> int | None:
        """Level of the EEG encoder (0 is the teacher's), or None for video alone."""
        if role in ("student", "control"):
            return None
        return self.config.roles.index(role)

    def identity(self, role: str) -> dict[str, Any]:
        """What a checkpoint must have in common with this run to be used by it."""
        values = config_values(self.config)
        settings = {k: str(v) for k, v in values.items() if k not in NO_PART_OF_IDENTITY}
        hashes = {"split_hash": self.split.hash, "cache_hash": self.data.cache.hash}
        return {"role": role, **hashes, "configuration": settings}

    def meta(self, role: str) -> dict[str, Any]:
        """Header of the weights: enough to rebuild the network and feed it a video."""
        cache, config = self.data.cache, self.config
        frames = cache.video.shape
        return {
            "role": role,
            "preset": config.preset,
            "level": self.level(role),
            "num_classes": self.data.num_classes,
            "classes": list(self.data.classes),
            "n_chans": cache.eeg.shape[1],
            "n_times": cache.eeg.shape[2],
            "sfreq": cache.sfreq,
            "channels": list(cache.channels),
            "frames": frames[1],
            "img_size": frames[3],
            "backbone": config.backbone,
            "label": config.label,
            "thresholds": list(config.thresholds),
            "seed": config.seed,
            "split_hash": self.split.hash,
            "cache_hash": cache.hash,
            **_video_parameters(cache.manifest["parameters"]),
        }

    def build(self, role: str) -> MultimodalNet | VisualNet:
        """A network with its initial weights, which depend on the seed and the role alone."""
        torch.manual_seed(derive_seed(self.config.seed, _seed_role(role), "weights"))
        net = build_network(self.meta(role))
        if self.config.encoder_weights:
            load_frame_encoder_weights(net, self.config.encoder_weights)
        if isinstance(net, MultimodalNet):
            net.eeg.set_statistics(*eeg_statistics(self.data.cache, self.split.train))
        return net.to(self.data.device)

    def frozen_logits(self, role: str) -> Tensor:
        """Logits (n, K) on the train split that a source of this name guides with."""
        if role not in self.source_logits:
            outside = self.config.distill.guidance == "out-of-fold"
            self.source_logits[role] = (
                self._out_of_fold_logits(role) if outside else self._logits(role, self.split.train)
            )
        return self.source_logits[role]

    def _logits(self, role: str, indices: Indices) -> Tensor:
        net = self.load(role).requires_grad_(False)
        return network_logits(net, self.data, indices, self.config.optim.part_size)

    def _out_of_fold_logits(self, role: str) -> Tensor:
        """Each sample's logits from a network that never saw its trial, nor did its sources."""
        distill = self.config.distill
        config = replace(self.config, distill=replace(distill, guidance="in-sample"))
        logits = None
        fitted = cross_fit(self.split, self.data.cache.samples, distill.folds)
        for fold, (split, places) in enumerate(fitted, start=1):
            out = self.out / "out_of_fold" / f"fold_{fold:02d}"
            inner = Chain(config, out, self.data, split, _prefixed(self.progress, f"fold {fold} "))
            for name in config.roles[: config.roles.index(role) + 1]:
                inner.train_network(name)
            mine = inner._logits(role, self.split.train[places])
            if logits is None:
                logits = mine.new_empty(len(self.split.train), mine.shape[1])
            logits[places] = mine
        assert logits is not None, "there are two folds at least"
        return logits

    def train_network(self, role: str) -> FitState:
        """Train one network, unless it is trained; its sources must be."""
        task = self._task(role)
        done = finished_state(task.folder, task.identity)
        if done is not None:
            task.say(f"already trained, validation accuracy {done.best_accuracy:.3f}")
            return done
        net = self.build(role)
        parameters = sum(p.numel() for p in net.parameters())
        task.say(f"training {parameters:,} parameters, {self._means(role)}")
        fit = Fit(net, self._objective(role, net), task)
        state = fit.run()
        save_network(task.folder, net, self.meta(role))
        fit.finish()
        return state

    def _task(self, role: str) -> Task:
        number = self.config.roles.index(role) + 1
        return Task(
            role=role,
            title=f"[{number}/{len(self.config.roles)}] {role}",
            folder=self.out / role,
            data=self.data,
            split=self.split,
            optim=self.config.optim,
            seed=self.config.seed,
            seed_role=_seed_role(role),
            identity=self.identity(role),
            progress=self.progress,
        )

    def _means(self, role: str) -> str:
        names = self.sources(role)
        if names:
            return f"learning from {', '.join(names)}"
        rebalanced = role == "teacher" and self.config.teacher.proto_weight > 0
        return "with rebalancing" if rebalanced else "by cross-entropy alone"

    def _objective(self, role: str, net: Network) -> Objective:
        config, size = self.config, self.config.optim.part_size
        names = self.sources(role)
        if names:
            seed = derive_seed(config.seed, role, "sources")
            logits = [self.frozen_logits(name) for name in names]
            return Distillation(config.distill, names, logits, seed)
        if role == "teacher" and config.teacher.proto_weight > 0:
            assert isinstance(net, MultimodalNet), "the teacher sees both modalities"
            return Rebalancing(config.teacher, net, self.data, self.split.train, size)
        return CrossEntropy()


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return None if progress is None else lambda line: progress(prefix + line)


def _seed_role(role: str) -> str:
    """The control shares weights, batch order and dropout with the student it is compared to."""
    return "student" if role == "control" else role


def _video_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    names = ("faces", "min_face", "margin", "fps", "frame_stride", "window", "stride")
    return {name: parameters[name] for name in names}
