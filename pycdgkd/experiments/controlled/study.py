"""Studies whose truth is known: trials of subjects, two modalities, labels that may be wrong.

A sample of a trial with true class c in {-1, +1} is, in each modality of strength s,

    x = Q (h + subject + trial),    h = (s sqrt(1 - n) c,  s sqrt(n) g,  s sqrt(n) g c,  0, ...) + e

with e ~ N(0, I), g = +-1 by chance for every sample and a random rotation Q. The first coordinate
is a linear signal. The next two hold the class in the sign of their product, which no linear map
finds: n is the share of the signal that a network must learn to see. Samples of one trial share its
label and its effect; labels are flipped by the trial, in training and validation alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pycdgkd.errors import InputError
from pycdgkd.training.environment import derive_seed

NUM_CLASSES = 2
MODALITIES = ("video", "eeg")

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Condition:
    """One kind of study, named in words.

    video_strength, eeg_strength: s; each modality's noise has standard deviation 1. label_noise:
    chance that a trial's label is wrong. subject_effect, trial_effect: standard deviations of what
    samples of a subject or a trial have in common beside the label. nonlinear: n. samples: of each
    trial. Subjects take equal shares of the trials. video_dims, eeg_dims: of a sample.
    feature_dims: of what each branch of a network makes of it.
    """

    name: str
    video_strength: float = 1.4
    eeg_strength: float = 1.9
    label_noise: float = 0.15
    subject_effect: float = 0.5
    trial_effect: float = 0.5
    nonlinear: float = 0.7
    subjects: int = 22
    train_trials: int = 240
    val_trials: int = 60
    test_trials: int = 500
    samples: int = 4
    video_dims: int = 10
    eeg_dims: int = 14
    feature_dims: int = 16

    def __post_init__(self) -> None:
        """Refuse what no study can be drawn from."""
        for name, low, high in (
            ("label_noise", 0, 0.5),
            ("nonlinear", 0, 1),
            ("video_strength", 0, np.inf),
            ("eeg_strength", 0, np.inf),
            ("train_trials", 2, np.inf),
            ("val_trials", 1, np.inf),
            ("test_trials", 1, np.inf),
            ("subjects", 1, np.inf),
            ("samples", 1, np.inf),
            ("video_dims", 3, np.inf),
            ("eeg_dims", 3, np.inf),
            ("feature_dims", 1, np.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(
                    f"condition '{self.name}': {name}: expected {low} to {high}, got {value}; "
                    "remedy: another value"
                )

    @property
    def weaker(self) -> tuple[str, ...]:
        """The modality of lower strength; both where they are equal."""
        if self.video_strength == self.eeg_strength:
            return MODALITIES
        return ("video",) if self.video_strength < self.eeg_strength else ("eeg",)

    @property
    def stronger(self) -> tuple[str, ...]:
        """The modality of higher strength; both where they are equal."""
        return tuple(m for m in MODALITIES if m not in self.weaker) or MODALITIES


@dataclass(frozen=True)
class Part:
    """Samples of some trials.

    video (N, D_v), eeg (N, D_e): float32, scaled by the train part's mean and deviation. labels
    (N,) int64: what a network is told; truth (N,) int64: what is true. trials, subjects: (N,).
    oracle: for each modality the log-odds (N,) of class 1 under the law that made the samples.
    """

    video: Tensor
    eeg: Tensor
    labels: Tensor
    truth: Tensor
    trials: Counts
    subjects: Counts
    oracle: dict[str, Floats]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Counts) -> Part:
        """The samples at these rows."""
        at = torch.from_numpy(rows)
        return Part(
            self.video[at],
            self.eeg[at],
            self.labels[at],
            self.truth[at],
            self.trials[rows],
            self.subjects[rows],
            {name: odds[rows] for name, odds in self.oracle.items()},
        )


@dataclass(frozen=True)
class Study:
    """One study: its parts share no trial."""

    condition: Condition
    train: Part
    val: Part
    test: Part


def draw_study(condition: Condition, seed: int) -> Study:
    """The study of a condition and a seed.

    Every purpose has its own generator, so that conditions of equal size and seed share what they
    have in common: a noisier one has the same features and all wrong labels of the cleaner one.
    """

    def generator(purpose: str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(seed, "study", purpose))

    sizes = (condition.train_trials, condition.val_trials, condition.test_trials)
    part_of_trial = np.repeat(np.arange(3), sizes)  # trials are exchangeable: no shuffle needed
    count = len(part_of_trial)
    subject = generator("subjects").permutation(np.arange(count) % condition.subjects)
    truth = generator("classes").integers(NUM_CLASSES, size=count)
    wrong = (generator("flips").random(count) < condition.label_noise) & (part_of_trial < 2)
    told = np.where(wrong, 1 - truth, truth)
    trial = np.repeat(np.arange(count), condition.samples)
    in_train = part_of_trial[trial] == 0
    features, oracle = {}, {}
    for name in MODALITIES:
        drawn, oracle[name] = _modality(
            condition, name, 2 * truth - 1, subject, trial, generator(name)
        )
        centre, spread = drawn[in_train].mean(0), drawn[in_train].std(0)
        features[name] = torch.from_numpy(((drawn - centre) / spread).astype(np.float32))
    whole = Part(
        features["video"],
        features["eeg"],
        torch.from_numpy(told[trial]),
        torch.from_numpy(truth[trial]),
        trial,
        subject[trial],
        oracle,
    )
    parts = (whole.take(np.flatnonzero(part_of_trial[trial] == number)) for number in range(3))
    return Study(condition, *parts)


def _modality(
    condition: Condition,
    name: str,
    signs: Counts,
    subject: Counts,
    trial: Counts,
    generator: np.random.Generator,
) -> tuple[Floats, Floats]:
    """Features (N, D) of all samples, and the log-odds (N,) of class 1 given the effects."""
    strength = getattr(condition, f"{name}_strength")
    width = getattr(condition, f"{name}_dims")
    linear, pair = strength * np.sqrt([1 - condition.nonlinear, condition.nonlinear])
    rotation = np.linalg.qr(generator.standard_normal((width, width)))[0]
    of_subject = condition.subject_effect * generator.standard_normal((condition.subjects, width))
    of_trial = condition.trial_effect * generator.standard_normal((len(signs), width))
    hidden = generator.standard_normal((len(trial), width))
    side = generator.choice([-1.0, 1.0], len(trial))
    hidden[:, 0] += linear * signs[trial]
    hidden[:, 1] += pair * side
    hidden[:, 2] += pair * side * signs[trial]
    first, second = hidden[:, 1] + hidden[:, 2], hidden[:, 1] - hidden[:, 2]
    # Of class +1 the pair lies at +-(pair, pair), of class -1 at +-(pair, -pair).
    odds = 2 * linear * hidden[:, 0] + _log_cosh(pair * first) - _log_cosh(pair * second)
    return (hidden + of_subject[subject[trial]] + of_trial[trial]) @ rotation, odds


def _log_cosh(x: Floats) -> Floats:
    return np.asarray(np.logaddexp(x, -x) - np.log(2), dtype=np.float64)


def oracle_accuracy(part: Part, modalities: tuple[str, ...] = MODALITIES) -> float:
    """Share of samples that the law which made them tells right, with all effects known.

    No network can do better on average; one that has to learn from these trials does worse.
    """
    odds = sum((part.oracle[name] for name in modalities), np.zeros(len(part)))
    return float(((odds > 0) == part.truth.numpy()).mean())


def trial_folds(part: Part, folds: int, seed: int) -> list[tuple[Counts, Counts]]:
    """For each fold the rows outside and inside it; a trial lies in one fold with all samples."""
    trials = np.unique(part.trials)
    if not 2 <= folds <= len(trials):
        raise InputError(
            f"folds: expected 2 to {len(trials)} (the number of trials), got {folds}; "
            "remedy: fewer folds or more trials"
        )
    order = np.random.default_rng(derive_seed(seed, "folds")).permutation(trials)
    inside = [np.isin(part.trials, chosen) for chosen in np.array_split(order, folds)]
    return [(np.flatnonzero(~mask), np.flatnonzero(mask)) for mask in inside]
