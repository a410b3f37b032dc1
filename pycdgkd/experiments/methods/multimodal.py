"""One modality alone, their plain fusion, and the paper's rebalanced teacher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.training.config import TeacherConfig
from pycdgkd.training.objective import CrossEntropy

from .distilled import NoSettings, train_alone


@dataclass(frozen=True)
class FusionSettings:
    """teacher: rebalancing, see ``TeacherConfig``; a proto_weight of 0 is plain fusion."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)


def train_eeg(bench: Bench, settings: NoSettings) -> Classifier:
    """The teacher's EEG branch with a classifier, by cross-entropy."""
    del settings
    net = bench.eeg_net()
    return bench.classifier(net, bench.fit("eeg", net, CrossEntropy(), seed_role="teacher"))


def train_fusion(bench: Bench, settings: FusionSettings) -> Classifier:
    """A teacher by Eq. 5; the default one is that which all students share."""
    config = replace(bench.config, assistants=0, teacher=settings.teacher)
    shared = config == replace(bench.config, assistants=0)
    chain = bench.chain(config, "shared" if shared else bench.method)
    state = chain.train_network("teacher")
    return bench.classifier(chain.load("teacher"), state)


VIDEO = Method("video", "video alone", ("video",), NoSettings(), train_alone)
EEG = Method("eeg", "EEG alone", ("eeg",), NoSettings(), train_eeg)
FUSION = Method(
    "fusion",
    "fusion (variant 1)",
    ("video", "eeg"),
    FusionSettings(TeacherConfig(proto_weight=0.0)),
    train_fusion,
)
REBALANCED = Method(
    "rebalanced", "rebalanced fusion (variant 2)", ("video", "eeg"), FusionSettings(), train_fusion
)
