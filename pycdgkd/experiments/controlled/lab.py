"""Recipes for networks, and a lab that trains each of them once on one study."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pycdgkd.training.environment import derive_seed

from .nets import Net, build_net
from .study import (
    MODALITIES,
    NUM_CLASSES,
    Condition,
    Study,
    draw_study,
    oracle_accuracy,
    trial_folds,
)
from .training import (
    CrossEntropy,
    Eq9,
    Guidance,
    Rebalancing,
    Schedule,
    logits_of,
    share_right,
    train_net,
)

FOLDS = 4


@dataclass(frozen=True)
class Recipe:
    """A network and what it is trained for.

    sees: its modalities. level: of its EEG branch. prototypes: "none", "dataset" or "batch";
    weights: "step" or "epoch", see ``Rebalancing``. sources: what teaches it, by Eq. 9 with
    ``guidance``. folds: 0 lets the sources train on the samples that they then teach; k trains
    them k times, each without the trials that it teaches.
    """

    sees: tuple[str, ...] = MODALITIES
    level: int = 0
    prototypes: str = "none"
    weights: str = "step"
    sources: tuple[Recipe, ...] = ()
    guidance: Eq9 = field(default_factory=Eq9)
    folds: int = 0

    @property
    def role(self) -> str:
        """Networks of one role start from equal weights and see equal batches."""
        if self.sees != MODALITIES:
            return f"{self.sees[0]} alone"
        return f"assistant {self.level}" if self.level else "teacher"


@dataclass(frozen=True)
class Trained:
    """A network with its best weights; log: see ``CrossEntropy.log``."""

    net: Net
    log: dict[str, float]


@dataclass
class Lab:
    """Trains recipes on one study, each once.

    seed: of weights, batch orders, drawn sources and folds.
    """

    study: Study
    seed: int
    schedule: Schedule
    shelf: dict[Recipe, Trained] = field(default_factory=dict)
    others: dict[tuple[int, int], Lab] = field(default_factory=dict)

    def network(self, recipe: Recipe) -> Trained:
        """The recipe's network, trained on first use."""
        if recipe not in self.shelf:
            self.shelf[recipe] = self._train(recipe)
        return self.shelf[recipe]

    @property
    def condition(self) -> Condition:
        """Of the study."""
        return self.study.condition

    def ground(self) -> dict[str, float]:
        """What the law that drew the study allows."""
        test = self.study.test
        return {
            "oracle video": oracle_accuracy(test, ("video",)),
            "oracle EEG": oracle_accuracy(test, ("eeg",)),
            "oracle both": oracle_accuracy(test),
        }

    @property
    def trainings(self) -> int:
        """How many networks were trained."""
        return len(self.shelf) + sum(lab.trainings for lab in self.others.values())

    def _train(self, recipe: Recipe) -> Trained:
        part, feature = self.study.train, self.study.condition.feature_dims
        weights = self._seed(recipe, "weights")
        net = build_net(recipe.sees, recipe.level, part, feature, weights)
        if recipe.sources:
            table = torch.stack([self.teaching(one, recipe.folds) for one in recipe.sources])
            seed = self._seed(recipe, "sources")
            objective: CrossEntropy = Guidance(part, table, recipe.guidance, seed)
        elif recipe.prototypes != "none":
            objective = Rebalancing(part, feature, recipe.prototypes, recipe.weights)
        else:
            objective = CrossEntropy(part)
        train_net(net, objective, self.study.val, self.schedule, self._seed(recipe, "order"))
        return Trained(net, objective.log())

    def _seed(self, recipe: Recipe, purpose: str) -> int:
        return derive_seed(self.seed, recipe.role, purpose)

    def teaching(self, recipe: Recipe, folds: int) -> Tensor:
        """Logits (N, K) with which a source teaches the train part."""
        part = self.study.train
        if not folds:
            return logits_of(self.network(recipe).net, part)
        logits = torch.empty(len(part), NUM_CLASSES)
        for fold, (outside, inside) in enumerate(trial_folds(part, folds, self.seed)):
            key = (folds, fold)
            if key not in self.others:
                study = replace(self.study, train=part.take(outside))
                self.others[key] = Lab(study, self.seed, self.schedule)
            logits[inside] = logits_of(self.others[key].network(recipe).net, part.take(inside))
        return logits

    def measure(self, recipe: Recipe) -> dict[str, float]:
        """Test accuracy on true labels, what its branches are worth, what its training logged."""
        trained, test = self.network(recipe), self.study.test
        with torch.no_grad():
            seen = [trained.net(*trained.net.inputs(part)) for part in (self.study.train, test)]
        values = {"accuracy": share_right(seen[1].logits, test.truth)}
        for name in recipe.sees:
            fitted, asked = (output.features[name] for output in seen)
            told = self.study.train.labels
            values[f"probe_{name}"] = linear_probe(fitted, told, asked, test.truth)
            values[f"nearest_{name}"] = nearest_prototype(fitted, told, asked, test.truth)
        return {**values, **trained.log}


@contextmanager
def drawn_lab(condition: Condition, seed: int, schedule: Schedule) -> Iterator[Lab]:
    """A lab on the features of a condition and a seed."""
    yield Lab(draw_study(condition, seed), seed, schedule)


def linear_probe(fitted: Tensor, told: Tensor, asked: Tensor, truth: Tensor) -> float:
    """Accuracy of a least-squares classifier (ridge 1e-3) on frozen features.

    fitted (N, D) with labels told (N,); asked (M, D) with true labels truth (M,).
    """
    mean = fitted.double().mean(0)
    known, new = (features.double() - mean for features in (fitted, asked))
    targets = 2.0 * told.double() - 1
    gram = known.T @ known / len(known) + 1e-3 * torch.eye(known.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, known.T @ (targets - targets.mean()) / len(known))
    score = new @ weights + targets.mean()
    return float(((score > 0) == truth.bool()).double().mean())


def nearest_prototype(fitted: Tensor, told: Tensor, asked: Tensor, truth: Tensor) -> float:
    """Accuracy of the nearest class mean (Eqs. 1-2); arguments as in ``linear_probe``."""
    means = torch.stack([fitted[told == c].mean(0) for c in range(NUM_CLASSES)])
    return share_right(-torch.cdist(asked, means), truth)
