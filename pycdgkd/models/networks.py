"""Teacher and assistants (face video and EEG), student (face video alone), and EEG alone."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .backbones import build_frame_encoder, load_encoder_weights
from .branches import EEGBranch, VisualBranch
from .presets import NetworkPreset, eeg_level, get_preset
from .tsception import TSceptionEncoder


class MultimodalOutput(NamedTuple):
    """Logits (B, K) and the features z_v (B, Dv) and z_e (B, De) before fusion."""

    logits: Tensor
    video: Tensor
    eeg: Tensor


class VisualOutput(NamedTuple):
    """Logits (B, K) and the features z_v (B, Dv)."""

    logits: Tensor
    video: Tensor


class EEGOutput(NamedTuple):
    """Logits (B, K) and the features z_e (B, De)."""

    logits: Tensor
    eeg: Tensor


class Network(nn.Module):
    """A network whose output has ``logits`` (B, K).

    inputs: what ``forward`` takes, in order: "video", "frame_mask", "eeg".
    """

    inputs: ClassVar[tuple[str, ...]]


class MultimodalNet(Network):
    """Teacher or assistant: both branches, their features side by side, one classifier."""

    inputs = ("video", "frame_mask", "eeg")

    def __init__(
        self,
        visual: VisualBranch,
        eeg: EEGBranch,
        num_classes: int,
        *,
        hidden: int = 128,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.visual = visual
        self.eeg = eeg
        width = visual.project.out_features + eeg.project.out_features
        self.head = _classifier(width, hidden, num_classes, dropout)

    def forward(self, video: Tensor, frame_mask: Tensor | None, eeg: Tensor) -> MultimodalOutput:
        """``VisualBranch``'s frames and mask, and EEG (B, n_chans, L) microvolts of the same B."""
        if video.shape[0] != eeg.shape[0]:
            raise ValueError(
                f"MultimodalNet: eeg: expected as many samples as video, {video.shape[0]}; "
                f"got {eeg.shape[0]}"
            )
        z_v = self.visual(video, frame_mask)
        z_e = self.eeg(eeg)
        return MultimodalOutput(self.head(torch.cat([z_v, z_e], dim=1)), z_v, z_e)


class VisualNet(Network):
    """Student: the visual branch and a classifier."""

    inputs = ("video", "frame_mask")

    def __init__(
        self, visual: VisualBranch, num_classes: int, *, hidden: int = 128, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.visual = visual
        self.head = _classifier(visual.project.out_features, hidden, num_classes, dropout)

    def forward(self, video: Tensor, frame_mask: Tensor | None = None) -> VisualOutput:
        """Frames and mask as ``VisualBranch`` takes them."""
        z_v = self.visual(video, frame_mask)
        return VisualOutput(self.head(z_v), z_v)


class EEGNet(Network):
    """The EEG branch and a classifier."""

    inputs = ("eeg",)

    def __init__(
        self, eeg: EEGBranch, num_classes: int, *, hidden: int = 128, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.eeg = eeg
        self.head = _classifier(eeg.project.out_features, hidden, num_classes, dropout)

    def forward(self, eeg: Tensor) -> EEGOutput:
        """EEG (B, n_chans, L) microvolts."""
        z_e = self.eeg(eeg)
        return EEGOutput(self.head(z_e), z_e)


def build_multimodal(
    preset: str | NetworkPreset,
    *,
    level: int = 0,
    num_classes: int = 2,
    n_chans: int = 28,
    n_times: int = 512,
    sfreq: float = 128.0,
    img_size: int | None = None,
    backbone: str = "pvt",
) -> MultimodalNet:
    """Teacher (``level`` 0) or assistant (1, 2, ...: ``EEG_LEVELS``), initialised at random.

    EEG segments have ``n_chans`` channels and ``n_times`` samples at ``sfreq`` Hz; frames are
    square, ``img_size`` pixels (None: the preset's). ``backbone``: "pvt" or "timm:<name>". Weights
    come from torch's global generator. ``InputError`` for sizes or names that do not fit.
    """
    sizes = get_preset(preset)
    visual = _build_branch(sizes, img_size, backbone)
    eeg = _build_eeg_branch(sizes, level, n_chans, n_times, sfreq)
    return MultimodalNet(visual, eeg, num_classes, hidden=sizes.hidden, dropout=sizes.dropout)


def build_visual(
    preset: str | NetworkPreset,
    *,
    num_classes: int = 2,
    img_size: int | None = None,
    backbone: str = "pvt",
) -> VisualNet:
    """Student, initialised at random; arguments as those of ``build_multimodal``."""
    sizes = get_preset(preset)
    visual = _build_branch(sizes, img_size, backbone)
    return VisualNet(visual, num_classes, hidden=sizes.hidden, dropout=sizes.dropout)


def build_eeg(
    preset: str | NetworkPreset,
    *,
    level: int = 0,
    num_classes: int = 2,
    n_chans: int = 28,
    n_times: int = 512,
    sfreq: float = 128.0,
) -> EEGNet:
    """EEG alone, initialised at random; arguments as those of ``build_multimodal``."""
    sizes = get_preset(preset)
    eeg = _build_eeg_branch(sizes, level, n_chans, n_times, sfreq)
    return EEGNet(eeg, num_classes, hidden=sizes.hidden, dropout=sizes.dropout)


def load_frame_encoder_weights(net: MultimodalNet | VisualNet, path: str | Path) -> None:
    """Load pretrained weights into the frame encoder of ``net``, from .pth or .safetensors.

    For "pvt" an official PVT v1 checkpoint: ``head.*`` is dropped, everything else must fit;
    position embeddings are resized where ``net`` was built for another image size. For timm
    backbones that model's own weights. ``InputError`` where the file is unreadable or does not fit.
    """
    load_encoder_weights(net.visual.frame_encoder, path)


def _build_branch(preset: NetworkPreset, img_size: int | None, backbone: str) -> VisualBranch:
    encoder = build_frame_encoder(
        backbone, preset, preset.img_size if img_size is None else img_size
    )
    return VisualBranch(
        encoder.module,
        encoder.dim,
        preset.feature_dim,
        temporal_depth=preset.temporal_depth,
        pixel_mean=encoder.mean,
        pixel_std=encoder.std,
    )


def _build_eeg_branch(
    preset: NetworkPreset, level: int, n_chans: int, n_times: int, sfreq: float
) -> EEGBranch:
    windows, spatial = eeg_level(level)
    encoder = TSceptionEncoder(
        n_chans,
        n_times,
        sfreq,
        windows=windows,
        spatial=spatial,
        num_temporal=preset.num_temporal,
        num_spatial=preset.num_spatial,
    )
    return EEGBranch(encoder, encoder.num_features, preset.feature_dim, n_chans)


def _classifier(width: int, hidden: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Dropout, Linear, ReLU, Linear. (The authors' has no ReLU, which makes it one linear map.)"""
    if num_classes < 2:
        raise ValueError(f"num_classes: expected 2 or more; got {num_classes}")
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
    )
