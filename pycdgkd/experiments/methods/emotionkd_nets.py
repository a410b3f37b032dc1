"""EmotionKD's networks: a teacher with interactive multimodal fusion (IMF), and its student.

Liu, Jia, Wang, "EmotionKD: A Cross-Modal Knowledge Distillation Framework for Emotion Recognition
Based on Physiological Signals", ACM Multimedia 2023. Both modalities become tokens E^d (first) and
G^d (second) after each of three transformer blocks d, and IMF of two depths a, b is

    s_d = softsign(BN(W' relu(BN(W [E^d; G^d]))))
    IMF(a, b) = s_a * [E^a; G^a] + s_b * [E^b; G^b]

with elementwise products; the features are IMF(1, 2) + IMF(2, 3), one token beside the other. (The
released code has E^a in both brackets.) Tokens here are the frames of our visual encoder and the
time steps of our EEG encoder, so that the fusion alone differs from the other multimodal networks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pycdgkd.models.branches import EEGBranch, VisualBranch
from pycdgkd.models.networks import Network, VisualNet, VisualOutput
from pycdgkd.models.tsception import TSceptionEncoder

TOKEN = 64  # width of a token, as published; so are the numbers of blocks and heads
_BLOCKS, _HEADS, _DROPOUT = 3, 8, 0.1


class TeacherOutput(NamedTuple):
    """Logits (B, K) and the fused features (B, D), zero in the tokens of padded frames."""

    logits: Tensor
    features: Tensor


class TokenStream(nn.Module):
    """Features of one modality as tokens, through post-norm transformer blocks.

    Heads are TOKEN / 8 wide; the released code's are 64 wide.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, TOKEN)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, TOKEN), std=0.02))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                TOKEN, _HEADS, dim_feedforward=TOKEN, dropout=_DROPOUT, batch_first=True
            )
            for _ in range(_BLOCKS)
        )

    def forward(self, features: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """(B, count, width) -> what each block gives, (B, count, TOKEN).

        valid: (B, count) bool; the other tokens are never attended to.
        """
        tokens = self.embed(features) + self.positions
        depths = []
        for block in self.blocks:
            tokens = block(tokens, src_key_padding_mask=None if valid is None else ~valid)
            depths.append(tokens)
        return depths


class InteractiveFusion(nn.Module):
    """IMF of two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.ModuleList(
            nn.Sequential(
                nn.Linear(TOKEN, TOKEN),
                nn.BatchNorm1d(TOKEN),
                nn.ReLU(),
                nn.Linear(TOKEN, TOKEN),
                nn.BatchNorm1d(TOKEN),
                nn.Softsign(),
            )
            for _ in range(2)
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Tokens of both modalities (n, TOKEN) at the two depths -> (n, TOKEN)."""
        score_first, score_second = self.scores
        fused: Tensor = score_first(first) * first + score_second(second) * second
        return fused


class EmotionKDTeacher(Network):
    """Both encoders, a token stream each, IMF of depths (1, 2) and (2, 3), one classifier.

    Takes the branches over: their temporal layers and projections have no part in it. frames: T,
    which the positions and the classifier fix. hidden, dropout: of the classifier.
    """

    inputs = ("video", "frame_mask", "eeg")

    def __init__(
        self,
        visual: VisualBranch,
        eeg: EEGBranch,
        *,
        frames: int,
        num_classes: int,
        hidden: int = 128,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        steps = _tsception(eeg).num_steps
        self.frames = TokenStream(visual.project.in_features, frames)
        self.steps = TokenStream(eeg.project.in_features, steps)
        del visual.temporal, visual.project, eeg.project
        self.visual, self.eeg = visual, eeg
        self.fusions = nn.ModuleList(InteractiveFusion() for _ in range(_BLOCKS - 1))
        self.width = (frames + steps) * TOKEN
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(self.width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, video: Tensor, frame_mask: Tensor | None, eeg: Tensor) -> TeacherOutput:
        """Frames and mask as ``VisualBranch`` takes them, EEG (B, n_chans, L) microvolts."""
        frames = self.visual.frame_features(video, frame_mask)
        steps = _tsception(self.eeg).time_steps(self.eeg.standardise(eeg)).transpose(1, 2)
        streams = zip(self.frames(frames, frame_mask), self.steps(steps), strict=True)
        features = self._fuse([torch.cat(pair, dim=1) for pair in streams], frame_mask)
        return TeacherOutput(self.head(features), features)

    def _fuse(self, depths: list[Tensor], frame_mask: Tensor | None) -> Tensor:
        """Tokens (B, frames + steps, TOKEN) at each depth -> features (B, D)."""
        batch, count = depths[0].shape[:2]
        tokens = [depth.flatten(0, 1) for depth in depths]
        index = None
        if frame_mask is not None:
            # Padding is left out, or the batch normalisation would see it.
            others = frame_mask.new_ones(batch, count - frame_mask.shape[1])
            index = torch.cat([frame_mask, others], dim=1).flatten().nonzero().squeeze(1)
            tokens = [depth[index] for depth in tokens]
        first, second, third = tokens
        fused: Tensor = self.fusions[0](first, second) + self.fusions[1](second, third)
        if index is not None:
            fused = fused.new_zeros(batch * count, TOKEN).index_copy(0, index, fused)
        return fused.view(batch, count * TOKEN)


def _tsception(eeg: EEGBranch) -> TSceptionEncoder:
    assert isinstance(eeg.encoder, TSceptionEncoder), "its time steps are the EEG's tokens"
    return eeg.encoder


class EmotionKDPair(Network):
    """Teacher and student trained together; used as a network it is the student.

    match: maps the student's features to the width of the teacher's.
    """

    inputs = ("video", "frame_mask")

    def __init__(self, teacher: EmotionKDTeacher, student: VisualNet) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        self.match = nn.Linear(student.visual.project.out_features, teacher.width)

    def forward(self, video: Tensor, frame_mask: Tensor | None = None) -> VisualOutput:
        """The student's output."""
        output: VisualOutput = self.student(video, frame_mask)
        return output
