"""Students that learn from logits alone: Eq. 9 with other sources, directions and temperatures.

KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. TAKD: Mirzadeh et
al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020. DGKD: Son et al., "Densely
Guided Knowledge Distillation using Multiple Teacher Assistants", ICCV 2021. CDGKD: the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.training.config import DistillConfig
from pycdgkd.training.objective import CrossEntropy


@dataclass(frozen=True)
class NoSettings:
    """A method without settings of its own."""


@dataclass(frozen=True)
class DistilledSettings:
    """assistants: how many. distill: Eq. 9's settings, see ``DistillConfig``."""

    assistants: int
    distill: DistillConfig = field(default_factory=DistillConfig)


def train_alone(bench: Bench, settings: NoSettings) -> Classifier:
    """The student by cross-entropy."""
    del settings
    net = bench.visual_net()
    return bench.classifier(net, bench.fit("student", net, CrossEntropy()))


def train_distilled(bench: Bench, settings: DistilledSettings) -> Classifier:
    """Teacher, assistants, student."""
    return bench.distilled(settings.distill, settings.assistants)


ALONE = Method("none", "no distillation (variant 3)", ("video",), NoSettings(), train_alone)
# Weight 0.5, T 2, reverse KL without T^2: the authors' baseline; Hinton's is forward with T^2.
KD = Method(
    "kd",
    "KD",
    ("video",),
    DistilledSettings(0, DistillConfig(strategy="previous")),
    train_distilled,
)
TAKD = Method(
    "takd",
    "TAKD",
    ("video",),
    DistilledSettings(2, DistillConfig(strategy="previous")),
    train_distilled,
    "two assistants",
)
# As in the released code (github.com/wonchulSon/DGKD, train.py): (1 - w) CE + w T^2 sum_j KL of the
# sources to the learner at T = 5, where one source, drawn for each step, takes no part. Its KL is
# also divided by the number of classes; here it is a mean over samples, as the divergence is
# defined. Its w is 1, which leaves the labels out; here it is that of all methods. The paper's
# Eq. 7 counts CE once for every source; "drop_one" is the mean over the kept ones.
DGKD = Method(
    "dgkd",
    "DGKD",
    ("video",),
    DistilledSettings(
        2,
        DistillConfig(
            direction="forward", temperature=5.0, temperature_power=2.0, strategy="drop_one_sum"
        ),
    ),
    train_distilled,
    "two assistants",
)
CDGKD_ALL = Method(
    "cdgkd-all",
    "CDGKD without stochastic sources (variant 4)",
    ("video",),
    DistilledSettings(2, DistillConfig(strategy="all")),
    train_distilled,
    "two assistants",
)
# What helped in the controlled study with many wrong labels (benchmarks/evidence).
CDGKD_NOISY = Method(
    "cdgkd-noisy",
    "CDGKD for noisy labels",
    ("video",),
    DistilledSettings(
        2, DistillConfig(kd_weight=0.9, direction="forward", guidance="out-of-fold", folds=4)
    ),
    train_distilled,
    "two assistants; teacher and assistants trained four times more, out of fold",
)
CDGKD = Method(
    "cdgkd",
    "CDGKD (variant 5)",
    ("video",),
    DistilledSettings(2),
    train_distilled,
    "two assistants",
)
