"""What turns each modality into its feature: frames of a face into z_v, EEG into z_e."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pycdgkd.errors import InputError

from .backbones import IMAGENET_MEAN, IMAGENET_STD


class VisualBranch(nn.Module):
    """Frames of a face, (B, T, 3, H, W) -> z_v (B, dim).

    Each frame runs through ``frame_encoder`` ((n, 3, H, W) -> (n, encoder_dim)); sinusoidal
    positions and ``temporal_depth`` transformer layers let the frames of a sample see one another
    (0: neither); their mean is projected to ``dim``. Any number of frames T.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        frame_encoder: nn.Module,
        encoder_dim: int,
        dim: int,
        *,
        temporal_depth: int = 1,
        temporal_dropout: float = 0.1,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.frame_encoder = frame_encoder
        heads = next(n for n in (8, 4, 2, 1) if encoder_dim % n == 0)
        self.temporal = nn.ModuleList(
            nn.TransformerEncoderLayer(
                encoder_dim,
                heads,
                dim_feedforward=2 * encoder_dim,
                dropout=temporal_dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(temporal_depth)
        )
        self.project = nn.Linear(encoder_dim, dim)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1))

    def forward(self, video: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """RGB frames, uint8 or float in 0..1, (B, T, 3, H, W) -> (B, dim).

        ``frame_mask`` (B, T) bool is False for padding: those frames are not read at all. A sample
        without any valid frame raises ``InputError``. (On a GPU a mask costs one synchronisation.)
        """
        _check_video(video, frame_mask)
        if frame_mask is not None and bool(frame_mask.all()):
            frame_mask = None
        features = self._relate(self.frame_features(video, frame_mask), frame_mask)
        if frame_mask is None:
            pooled = features.mean(dim=1)
        else:
            weight = frame_mask.to(features.dtype).unsqueeze(2)
            pooled = (features * weight).sum(dim=1) / weight.sum(dim=1)
        z: Tensor = self.project(pooled)
        return z

    def frame_features(self, video: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """What ``frame_encoder`` says of each frame alone, (B, T, encoder_dim); padding is zero.

        Arguments and errors are those of ``forward``.
        """
        _check_video(video, frame_mask)
        batch, count = video.shape[:2]
        frames = video.flatten(0, 1)
        if frame_mask is None:
            features = self._encode(frames)
        else:
            _check_rows(frame_mask)
            index = frame_mask.flatten().nonzero().squeeze(1)
            valid = self._encode(frames[index])
            features = valid.new_zeros(batch * count, valid.shape[1]).index_copy(0, index, valid)
        return features.view(batch, count, features.shape[1])

    def _encode(self, frames: Tensor) -> Tensor:
        """Frames (n, 3, H, W) in 0..255 or 0..1 -> (n, encoder_dim)."""
        features: Tensor = self.frame_encoder(self.normalise(frames))
        return features

    def normalise(self, frames: Tensor) -> Tensor:
        """Frames (n, 3, H, W), uint8 or floats in 0..1 -> (pixels - mean) / std, as floats."""
        std = self.pixel_std * (1.0 if frames.is_floating_point() else 255.0)
        # One pass over the pixels.
        return torch.addcmul(
            -self.pixel_mean / self.pixel_std, frames.to(std.dtype), std.reciprocal()
        )

    def _relate(self, features: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Temporal layers over frame features (B, T, encoder_dim); padding is never attended to."""
        if not len(self.temporal):
            return features
        features = features + _positions(features)
        padding = None if frame_mask is None else ~frame_mask
        for layer in self.temporal:
            features = layer(features, src_key_padding_mask=padding)
        return features


class EEGBranch(nn.Module):
    """EEG segments (B, n_chans, L) in microvolts -> z_e (B, dim).

    Each channel is standardised with statistics of the training set (``set_statistics``; until then
    mean 0 and deviation 1), which belong to the state dict; ``encoder`` maps (B, 1, n_chans, L) to
    (B, encoder_dim), and a linear layer to ``dim``.
    """

    eeg_mean: Tensor
    eeg_std: Tensor

    def __init__(self, encoder: nn.Module, encoder_dim: int, dim: int, n_chans: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = nn.Linear(encoder_dim, dim)
        self.register_buffer("eeg_mean", torch.zeros(n_chans))
        self.register_buffer("eeg_std", torch.ones(n_chans))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation of each channel over the training set, (n_chans,) microvolts.

        ``InputError`` where a value is not finite or a deviation is not positive (a flat channel).
        """
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.eeg_mean.shape:
                raise ValueError(
                    f"EEGBranch.set_statistics: {name}: expected {tuple(self.eeg_mean.shape)}; "
                    f"got {tuple(value.shape)}"
                )
        bad = ~(mean.isfinite() & std.isfinite() & (std > 0)).cpu()
        if bad.any():
            raise InputError(
                f"EEG channels {bad.nonzero().flatten().tolist()} (counted from 0) are flat or not "
                f"finite over the training set; remedy: leave these channels or recordings out"
            )
        self.eeg_mean.copy_(mean)
        self.eeg_std.copy_(std)

    def standardise(self, eeg: Tensor) -> Tensor:
        """(B, n_chans, L) microvolts -> scores (B, 1, n_chans, L), what ``encoder`` takes."""
        if eeg.dim() != 3 or eeg.shape[1] != self.eeg_mean.shape[0]:
            raise ValueError(
                f"EEGBranch: eeg: expected (B, {self.eeg_mean.shape[0]}, L); got {tuple(eeg.shape)}"
            )
        scores = (eeg - self.eeg_mean.unsqueeze(1)) / self.eeg_std.unsqueeze(1)
        return scores.unsqueeze(1)

    def forward(self, eeg: Tensor) -> Tensor:
        """(B, n_chans, L) microvolts -> (B, dim)."""
        z: Tensor = self.project(self.encoder(self.standardise(eeg)))
        return z


def _positions(features: Tensor) -> Tensor:
    """Sinusoidal positions (T, D) of frames, for features (B, T, D) (Vaswani et al. 2017, 3.5)."""
    count, dim = features.shape[1:]
    step = torch.arange(count, device=features.device, dtype=torch.float32).unsqueeze(1)
    pair = torch.arange(dim, device=features.device) // 2
    angle = step * torch.pow(10000.0, -2.0 * pair / dim)
    even = torch.arange(dim, device=features.device) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).to(features.dtype)


def _check_video(video: Tensor, frame_mask: Tensor | None) -> None:
    if video.dim() != 5 or video.shape[2] != 3 or video.shape[1] < 1:
        raise ValueError(
            f"VisualBranch: video: expected (B, T, 3, H, W) with T >= 1; got {tuple(video.shape)}"
        )
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise ValueError(
            f"VisualBranch: video: expected uint8 or floating point; got {video.dtype}"
        )
    if frame_mask is None:
        return
    if frame_mask.dtype != torch.bool or frame_mask.shape != video.shape[:2]:
        raise ValueError(
            f"VisualBranch: frame_mask: expected bool {tuple(video.shape[:2])}; "
            f"got {frame_mask.dtype} {tuple(frame_mask.shape)}"
        )


def _check_rows(frame_mask: Tensor) -> None:
    empty = (~frame_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"samples {empty} of the batch (counted from 0) have no valid frame; "
            f"expected one or more each; remedy: leave such samples out"
        )
