"""A lab on recordings: recipes become the networks of ``pycdgkd train``, trained by its loop."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pycdgkd.data.splits import Indices, cross_fit, trial_keys
from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.controlled.lab import Recipe, linear_probe, nearest_prototype
from pycdgkd.experiments.controlled.study import MODALITIES
from pycdgkd.experiments.controlled.training import Eq9, share_right
from pycdgkd.models.networks import MultimodalNet, Network
from pycdgkd.training.config import DistillConfig, SplitConfig, TeacherConfig, TrainConfig
from pycdgkd.training.distill import Distillation
from pycdgkd.training.environment import derive_seed
from pycdgkd.training.inference import evaluating, forward
from pycdgkd.training.objective import CrossEntropy, Objective
from pycdgkd.training.recordings import Recordings
from pycdgkd.training.run import split_of
from pycdgkd.training.teacher import Rebalancing

from .study import RecordedCondition, RecordedStudy, record_study


@dataclass(frozen=True)
class Trained:
    """A network with its best weights. folder: where the loop left its logs."""

    net: Network
    folder: Path


@dataclass
class RecordedLab:
    """Trains recipes on one recorded study, each once; ``Lab`` for recordings.

    bench: data without test samples, split, schedule and initial weights. data: all samples.
    test: the cache's indices (n,) of the test samples.
    """

    study: RecordedStudy
    bench: Bench
    data: Recordings
    test: Indices
    shelf: dict[Recipe, Trained] = field(default_factory=dict)
    others: dict[tuple[int, int], RecordedLab] = field(default_factory=dict)

    @classmethod
    def open(cls, study: RecordedStudy, config: TrainConfig, seed: int, out: Path) -> RecordedLab:
        """A lab whose split, weights, batch orders and drawn sources are of this seed.

        config: how its networks are trained; its own seed and split are replaced. out: folder of
        checkpoints and logs.
        """
        split = SplitConfig(fractions=study.condition.fractions, seed=seed)
        config = replace(config, seed=seed, split=split)
        data = Recordings.open(study.cache, config, torch.device("cpu"))
        drawn = split_of(data, config)
        drawn.check(study.cache.samples)
        bench = Bench.open(config, data, drawn, out, "lab", config.distill)
        return cls(study, bench, data, drawn.test)

    @property
    def condition(self) -> RecordedCondition:
        """Of the study."""
        return self.study.condition

    @property
    def trainings(self) -> int:
        """How many networks were trained."""
        return len(self.shelf) + sum(lab.trainings for lab in self.others.values())

    def network(self, recipe: Recipe) -> Trained:
        """The recipe's network, trained on first use."""
        if recipe not in self.shelf:
            self.shelf[recipe] = self._train(recipe)
        return self.shelf[recipe]

    def teaching(self, recipe: Recipe, folds: int) -> Tensor:
        """Logits (n, K) with which a source teaches the train split."""
        bench = self.bench
        if not folds:
            return bench.logits(self.network(recipe).net, bench.data, bench.split.train)
        logits = torch.empty(len(bench.split.train), bench.num_classes)
        fitted = cross_fit(bench.split, self.study.cache.samples, folds)
        for fold, (split, places) in enumerate(fitted):
            key = (folds, fold)
            if key not in self.others:
                out = bench.out / f"fold_{fold + 1}_of_{folds}"
                self.others[key] = replace(
                    self, bench=replace(bench, split=split, out=out), shelf={}, others={}
                )
            net = self.others[key].network(recipe).net
            logits[places] = bench.logits(net, bench.data, bench.split.train[places])
        return logits

    def measure(self, recipe: Recipe) -> dict[str, float]:
        """Test accuracy on true classes, what its branches are worth, lambda over all steps."""
        trained, data, train = self.network(recipe), self.data, self.bench.split.train
        truth = torch.from_numpy(self.study.truth[self.test])
        told = torch.from_numpy(data.labels[train])
        fitted, asked = (self._outputs(trained.net, indices) for indices in (train, self.test))
        values = {"accuracy": share_right(asked["logits"], truth)}
        for name in recipe.sees:
            known, new = fitted[name], asked[name]
            values[f"probe_{name}"] = linear_probe(known, told, new, truth)
            values[f"nearest_{name}"] = nearest_prototype(known, told, new, truth)
        return {**values, **_lambdas(trained.folder)}

    def ground(self) -> dict[str, float]:
        """What the law that drew the study allows on its test, sizes, share of wrong labels."""
        train, val = self.bench.split.train, self.bench.split.val
        return {
            "oracle video": self.study.oracle_accuracy(self.test, ("video",)),
            "oracle EEG": self.study.oracle_accuracy(self.test, ("eeg",)),
            "oracle both": self.study.oracle_accuracy(self.test),
            **{
                f"{name} trials": float(len(set(trial_keys(self.study.cache.samples, part))))
                for name, part in (("train", train), ("val", val), ("test", self.test))
            },
            "wrong labels": float((self.data.labels[train] != self.study.truth[train]).mean()),
        }

    def _train(self, recipe: Recipe) -> Trained:
        bench, role = self.bench, _role(recipe)
        # Sources first: they too take a place on the shelf.
        sources = [self.teaching(source, recipe.folds) for source in recipe.sources]
        name = f"network_{len(self.shelf) + 1:02d}"
        net = self._build(recipe)
        objective = self._objective(recipe, net, sources)
        bench.fit(name, net, objective, seed_role=role)
        return Trained(net, bench.out / bench.method / name)

    def _build(self, recipe: Recipe) -> Network:
        if recipe.sees == MODALITIES:
            return self.bench.multimodal_net(recipe.level)
        return self.bench.visual_net() if recipe.sees == ("video",) else self.bench.eeg_net()

    def _objective(self, recipe: Recipe, net: Network, sources: list[Tensor]) -> Objective:
        bench = self.bench
        if sources:
            names = [_role(source) for source in recipe.sources]
            seed = derive_seed(bench.config.seed, _role(recipe), "sources")
            return Distillation(_settings(recipe.guidance), names, sources, seed)
        if recipe.prototypes == "none":
            return CrossEntropy()
        if (recipe.prototypes, recipe.weights) != ("dataset", "step"):
            raise InputError(
                "the training of recordings has prototypes of the dataset and weights by step "
                f"alone; got {recipe.prototypes} and {recipe.weights}; remedy: study features"
            )
        assert isinstance(net, MultimodalNet), "prototypes are for both modalities"
        size = bench.config.optim.part_size
        return Rebalancing(TeacherConfig(), net, bench.data, bench.split.train, size)

    def _outputs(self, net: Network, indices: Indices) -> dict[str, Tensor]:
        """Logits (n, K) and features (n, D) by modality, in evaluation mode."""
        size = self.bench.config.optim.part_size
        with evaluating(net):
            parts: list[Any] = [
                forward(net, batch) for _, batch in self.data.batches(indices, size)
            ]
        return {
            name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0]._fields
        }


@contextmanager
def recorded_lab(
    condition: RecordedCondition, seed: int, config: TrainConfig
) -> Iterator[RecordedLab]:
    """Record and prepare a study in a temporary folder, which goes with all that is in it."""
    with TemporaryDirectory(prefix="pycdgkd-") as folder:
        study = record_study(condition, seed, Path(folder))
        yield RecordedLab.open(study, config, seed, Path(folder) / "networks")


def _role(recipe: Recipe) -> str:
    """The chain's name for it: networks of one role start equal and see equal batches."""
    if recipe.sees != MODALITIES:
        return "student" if recipe.sees == ("video",) else "teacher"
    return f"assistant_{recipe.level}" if recipe.level else "teacher"


def _settings(guidance: Eq9) -> DistillConfig:
    return DistillConfig(
        kd_weight=guidance.kd_weight,
        temperature=guidance.temperature,
        direction=guidance.direction,
        strategy=guidance.strategy,
    )


def _lambdas(folder: Path) -> dict[str, float]:
    """Mean of each modality's weight over all steps; nothing where there are no weights."""
    with (folder / "steps.csv").open(newline="", encoding="utf-8") as file:
        steps = list(csv.DictReader(file))
    columns = [f"lambda_{name}" for name in MODALITIES if f"lambda_{name}" in steps[0]]
    return {name: sum(float(step[name]) for step in steps) / len(steps) for name in columns}
