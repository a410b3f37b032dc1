"""CNN+LSTM: Saffaryazdi et al., "Using Facial Micro-Expressions in Combination With EEG and
Physiological Signals for Emotion Recognition", Frontiers in Psychology 2022.

A 3-D CNN sees the stack of frames, an LSTM the band powers of EEG windows; each is trained alone
and they are fused at the decision level, p = w p_v + (1 - w) p_e. The EEG network (five bands,
sliding windows, LSTM of 80, LSTM of 30) follows the authors' published code. Their face network
sees frames around a landmark-based apex and its sizes are not known: here it sees all frames of a
sample. Their galvanic and pulse signals are left out, and so are their own learning rate (0.01) and
class weights: the schedule is everyone's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from pycdgkd.errors import InputError
from pycdgkd.experiments.bands import BandPowers
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.frames import small_frames, valid_frames
from pycdgkd.experiments.late_fusion import LateFusion, Predict
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.models.networks import Network
from pycdgkd.training.inference import probabilities
from pycdgkd.training.objective import CrossEntropy

BANDS = ((0.0, 4.0), (4.0, 8.0), (8.0, 12.0), (12.0, 30.0), (30.0, 45.0))  # the authors' five


@dataclass(frozen=True)
class CNNLSTMSettings:
    """window, step: seconds of the EEG's sliding windows; 7 in a sample of 4 s.

    size: pixels that larger frames are reduced to. dropout: before the face network's output. These
    are not known of the original.
    """

    window: float = 1.0
    step: float = 0.5
    size: int = 64
    dropout: float = 0.5

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        if self.window <= 0.0 or self.step <= 0.0:
            raise InputError(
                "cnn-lstm: window and step: expected seconds above 0; got "
                f"{self.window} and {self.step}; remedy: 1 and 0.5"
            )
        if self.size < 8:
            raise InputError(
                f"cnn-lstm: size: expected 8 pixels or more, which are halved three times; got "
                f"{self.size}; remedy: 64"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(
                f"cnn-lstm: dropout: expected a number from 0 to below 1; got {self.dropout}; "
                "remedy: 0.5"
            )


class Output(NamedTuple):
    """Logits (B, K)."""

    logits: Tensor


class FaceNet3D(Network):
    """3-D convolutions over the stack of frames, 32, 64 and 128 kernels of 3 x 3 x 3.

    Pooling halves the sides but not the few frames, so that any number of them does. A masked frame
    is set to zero before every convolution, as what lies beyond the ends of the stack is, and left
    out of the final mean: a sample with frames missing at its end gives what the shorter one would.
    (In training the batch statistics count its zeros.)
    """

    inputs = ("video", "frame_mask")

    def __init__(self, num_classes: int, size: int, dropout: float) -> None:
        super().__init__()
        self.size = size
        widths = (3, 32, 64, 128)
        self.convolutions = nn.ModuleList(
            nn.Conv3d(before, after, 3, padding=1, bias=False) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm3d(width) for width in widths[1:])
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.head = nn.Sequential(
            nn.Linear(128, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, num_classes)
        )

    def forward(self, video: Tensor, frame_mask: Tensor | None = None) -> Output:
        """Frames (B, T, 3, H, W) of any size and number."""
        valid = valid_frames(video, frame_mask).float()
        keep = valid[:, None, :, None, None]
        x = (2 * small_frames(video, self.size) - 1).transpose(1, 2) * keep  # (B, 3, T, S, S)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = self.pool(norm(convolution(x)).relu()) * keep
        pooled = x.mean((3, 4)).sum(2) / valid.sum(1, keepdim=True)
        return Output(self.head(pooled))


class EEGLSTM(Network):
    """An LSTM of 80 and one of 30 over the windows' band powers, (B, C, L) -> (B, K)."""

    inputs = ("eeg",)

    def __init__(self, powers: BandPowers, num_classes: int) -> None:
        super().__init__()
        self.powers = powers
        self.first = nn.LSTM(powers.mean.numel(), 80, batch_first=True)
        self.second = nn.LSTM(80, 30, batch_first=True)
        self.head = nn.Linear(30, num_classes)

    def forward(self, eeg: Tensor) -> Output:
        """EEG (B, C, L) microvolts; the last window's state decides."""
        sequence, _ = self.first(self.powers(eeg).flatten(2))  # (B, W, 80)
        _, (state, _) = self.second(sequence)
        return Output(self.head(state[-1]))


def _predict(bench: Bench, net: Network) -> Predict:
    return lambda data, indices: probabilities(bench.logits(net, data, indices))


def train(bench: Bench, settings: CNNLSTMSettings) -> Classifier:
    """Both networks by the shared schedule, then the weight of their fusion."""
    data, split, size = bench.data, bench.split, bench.config.optim.part_size
    bench.seed("cnn-lstm face")
    cache = data.cache
    pixels = min(settings.size, cache.video.shape[3])  # smaller frames gain nothing by blowing up
    face = FaceNet3D(bench.num_classes, pixels, settings.dropout).to(data.device)
    powers = BandPowers(
        cache.eeg.shape[1], cache.sfreq, BANDS, window=settings.window, step=settings.step
    )
    bench.seed("cnn-lstm eeg")
    eeg = EEGLSTM(powers, bench.num_classes).to(data.device)
    powers.set_statistics(data, split.train, size)
    states = [
        bench.fit("eeg", eeg, CrossEntropy(), seed_role="teacher"),
        bench.fit("face", face, CrossEntropy()),
    ]
    fusion = LateFusion.fit(_predict(bench, face), _predict(bench, eeg), data, split.val)
    notes = [note for state in states for note in state.notes]
    return Classifier(
        logits=fusion.logits,
        parameters=sum(p.numel() for net in (face, eeg) for p in net.parameters()),
        seconds=sum(state.seconds for state in states),
        epochs=max(state.epoch for state in states),
        val_accuracy=fusion.val_accuracy,
        notes=[
            *notes,
            f"weight of the face {fusion.weight:g}, fitted on validation, whose accuracy flatters",
        ],
    )


METHOD = Method(
    "cnn-lstm",
    "CNN+LSTM",
    ("video", "eeg"),
    CNNLSTMSettings(),
    train,
    "its own encoders; the fusion weight fitted on validation",
)
