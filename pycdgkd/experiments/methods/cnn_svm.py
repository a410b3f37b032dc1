"""CNN+SVM: Huang et al., Future Internet 2019.

"Combining Facial Expressions and Electroencephalography to Enhance Emotion Recognition".

A small CNN classifies every face, a sample's p_v is the mean over its frames. A support vector
machine classifies band powers of the EEG, p_e are its Platt-scaled decisions. Fused at the decision
level: p = w p_v + (1 - w) p_e. Differences from the published system: samples in the place of
trials; w and Platt's scaling are fitted on the validation split instead of training trials; the
logarithm of band powers, as the mean of the filtered signal, which the published code takes, is
about 0; no FER2013 pretraining.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pycdgkd.errors import InputError, require
from pycdgkd.experiments.bands import log_band_power
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.frames import small_frames, valid_frames
from pycdgkd.experiments.late_fusion import LateFusion, Probabilities
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.models.networks import Network
from pycdgkd.training.inference import probabilities
from pycdgkd.training.objective import CrossEntropy
from pycdgkd.training.recordings import Indices, Recordings

ELECTRODES = (
    *("Fp1", "T7", "CP1", "Oz", "Fp2", "F8", "FC6", "FC2", "Cz", "C4", "T8", "CP6", "CP2", "PO4"),
)
PAIRS = (("T7", "T8"), ("Fp1", "Fp2"), ("CP1", "CP2"))  # whose differences are series as well
BANDS = ((4.0, 8.0), (8.0, 10.0), (8.0, 12.0), (12.0, 30.0), (30.0, math.inf))
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SIZE = 48  # pixels


@dataclass(frozen=True)
class CNNSVMSettings:
    """c: of the support vector machine, 15 in the paper. dropout: of the CNN, 0.5 there."""

    c: float = 15.0
    dropout: float = 0.5

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        if not 0.0 < self.c < math.inf:
            raise InputError(
                f"cnn-svm: c: expected a finite number above 0; got {self.c}; remedy: 15, as "
                "published"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(
                f"cnn-svm: dropout: expected a number from 0 to below 1; got {self.dropout}; "
                "remedy: 0.5, as published"
            )


class FaceOutput(NamedTuple):
    """Log-probabilities (B, K)."""

    logits: Tensor


class FaceCNN(Network):
    """Faces at 48 pixels, grey, minus the mean face of the training set.

    Three convolutions, pooling, a hidden layer; softmax for each frame, mean over valid frames.
    """

    inputs = ("video", "frame_mask")
    mean_face: Tensor

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean_face", torch.zeros(1, SIZE, SIZE))
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Dropout(dropout), nn.MaxPool2d(3)),
            *(nn.Flatten(), nn.Linear(64 * 14 * 14, 64), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(64, num_classes),
        )

    def forward(self, video: Tensor, frame_mask: Tensor | None = None) -> FaceOutput:
        """Frames (B, T, 3, H, W), any size; masked frames are not read."""
        valid = valid_frames(video, frame_mask)
        log_p = self.layers(_grey(video)[valid] - self.mean_face).log_softmax(1)
        table = log_p.new_full((*valid.shape, log_p.shape[1]), -math.inf)
        table[valid] = log_p
        return FaceOutput(table.logsumexp(1) - valid.sum(1, keepdim=True).log())

    @torch.no_grad()
    def set_mean(self, data: Recordings, indices: Indices, size: int) -> None:
        """Take the mean over the valid frames of these samples, ``size`` samples at a time."""
        total, count = torch.zeros_like(self.mean_face), 0
        for _, batch in data.batches(indices, size):
            faces = _grey(batch.video)[valid_frames(batch.video, batch.frame_mask)]
            total += faces.sum(0)
            count += len(faces)
        self.mean_face.copy_(total / count)


def _grey(video: Tensor) -> Tensor:
    """(B, T, 3, H, W) -> (B, T, 1, 48, 48) in 0..1."""
    weights = torch.tensor(LUMA, device=video.device).view(3, 1, 1)
    return (small_frames(video, SIZE) * weights).sum(2, keepdim=True)


class Series(NamedTuple):
    """Which electrodes and differences of electrodes are taken, as places in a cache."""

    electrodes: list[int]
    pairs: list[tuple[int, int]]
    published: bool

    @classmethod
    def of(cls, channels: Sequence[str]) -> Series:
        """The published 14 electrodes, or all where one is missing; pairs that are there."""
        place = {name.strip().casefold(): index for index, name in enumerate(channels)}
        wanted = [place.get(name.casefold(), -1) for name in ELECTRODES]
        published = min(wanted) >= 0
        ends = [(a.casefold(), b.casefold()) for a, b in PAIRS]
        pairs = [(place[a], place[b]) for a, b in ends if a in place and b in place]
        return cls(wanted if published else list(range(len(channels))), pairs, published)

    def features(self, eeg: Tensor, sfreq: float) -> Tensor:
        """(B, C, L) microvolts -> (B, series * bands) log band powers."""
        first, second = [a for a, _ in self.pairs], [b for _, b in self.pairs]
        chosen = torch.cat([eeg[:, self.electrodes], eeg[:, first] - eeg[:, second]], 1)
        return log_band_power(chosen, sfreq, BANDS).flatten(1)


class Platt(NamedTuple):
    """p = sigmoid(slope f + offset) of a decision f (Platt 1999)."""

    slope: float
    offset: float

    @classmethod
    def fit(cls, decisions: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_]) -> Platt:
        """By likelihood of Platt's smoothed targets, which exist for a single class as well."""
        targets = np.where(
            positive, (positive.sum() + 1) / (positive.sum() + 2), 1 / ((~positive).sum() + 2)
        )
        # Each sample counts as both classes, in the shares that its target gives them.
        regression = require("sklearn.linear_model", "experiments").LogisticRegression(
            C=1e6, max_iter=1000
        )
        both = np.concatenate([decisions, decisions])[:, None]
        labels = np.repeat([1, 0], len(decisions))
        regression.fit(both, labels, sample_weight=np.concatenate([targets, 1 - targets]))
        return cls(float(regression.coef_[0, 0]), float(regression.intercept_[0]))

    def __call__(self, decisions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Probabilities (n,)."""
        return np.asarray(0.5 * (1 + np.tanh(0.5 * (self.slope * decisions + self.offset))))


def share_out(ones: Sequence[npt.NDArray[np.float64]]) -> Probabilities:
    """Probabilities (n, K) of K one-versus-rest ones, (n,) each; of two classes the second's."""
    if len(ones) == 1:
        return np.stack([1 - ones[0], ones[0]], 1)
    table = np.stack(ones, 1).clip(1e-12)
    return np.asarray(table / table.sum(1, keepdims=True))


@dataclass(frozen=True)
class BandSVM:
    """Support vector machines on band powers, one versus rest; of two classes one machine."""

    series: Series
    machines: list[Any]
    scales: list[Platt]
    size: int

    @classmethod
    def fit(cls, bench: Bench, settings: CNNSVMSettings) -> BandSVM:
        """Machines and standardisation on the train split, Platt's scaling on validation."""
        svm, pipeline = (require(f"sklearn.{part}", "experiments") for part in ("svm", "pipeline"))
        scaler = require("sklearn.preprocessing", "experiments").StandardScaler
        data, split = bench.data, bench.split
        series, size = Series.of(data.cache.channels), bench.config.optim.part_size
        classes = range(1 if data.num_classes == 2 else 0, data.num_classes)
        train, val = (_table(series, data, part, size) for part in (split.train, split.val))
        machines, scales = [], []
        for k in classes:
            machine = pipeline.make_pipeline(scaler(), svm.SVC(C=settings.c, kernel="rbf"))
            machine.fit(train, data.labels[split.train] == k)
            machines.append(machine)
            decisions = machine.decision_function(val)
            scales.append(Platt.fit(decisions, data.labels[split.val] == k))
        return cls(series, machines, scales, size)

    def probabilities(self, data: Recordings, indices: Indices) -> Probabilities:
        """(n, K) for samples at these cache indices."""
        table = _table(self.series, data, indices, self.size)
        pairs = zip(self.machines, self.scales, strict=True)
        return share_out([scale(machine.decision_function(table)) for machine, scale in pairs])

    @property
    def vectors(self) -> int:
        """Support vectors of all machines."""
        return sum(int(machine[-1].n_support_.sum()) for machine in self.machines)


def _table(
    series: Series, data: Recordings, indices: Indices, size: int
) -> npt.NDArray[np.float64]:
    rate = data.cache.sfreq
    parts = [series.features(b.eeg, rate).cpu() for _, b in data.batches(indices, size)]
    return np.asarray(torch.cat(parts).double().numpy())


def train(bench: Bench, settings: CNNSVMSettings) -> Classifier:
    """The face CNN by the shared schedule, the machines, then the weight of their fusion."""
    require("sklearn", "experiments")  # before the CNN takes its time
    size = bench.config.optim.part_size
    bench.seed("cnn-svm face")
    net = FaceCNN(bench.num_classes, settings.dropout).to(bench.data.device)
    net.set_mean(bench.data, bench.split.train, size)
    state = bench.fit("face", net, CrossEntropy())
    started = time.monotonic()
    machine = BandSVM.fit(bench, settings)
    fusion = LateFusion.fit(
        lambda data, indices: probabilities(bench.logits(net, data, indices)),
        machine.probabilities,
        bench.data,
        bench.split.val,
    )
    notes = [
        f"weight of the face {fusion.weight:g}; it and Platt's scaling were fitted on validation, "
        "whose accuracy flatters",
        f"parameters are the CNN's; the machines have {machine.vectors} support vectors",
    ]
    if not machine.series.published:
        notes.append("EEG of all electrodes: the cache lacks some of the published 14")
    return Classifier(
        logits=fusion.logits,
        parameters=sum(p.numel() for p in net.parameters()),
        seconds=state.seconds + time.monotonic() - started,
        epochs=state.epoch,
        val_accuracy=fusion.val_accuracy,
        notes=[*state.notes, *notes],
    )


METHOD = Method(
    "cnn-svm",
    "CNN+SVM",
    ("video", "eeg"),
    CNNSVMSettings(),
    train,
    "its own face CNN, trained from scratch (FER2013, on which its authors pretrain, may not be "
    "redistributed); scikit-learn; Platt's scaling and the fusion weight fitted on validation",
)
