"""Face crops as networks take them that are not built on the shared frame encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pycdgkd.errors import InputError


def small_frames(video: Tensor, size: int) -> Tensor:
    """Frames (B, T, 3, H, W), uint8 or floats in 0..1, at ``size`` pixels as floats in 0..1."""
    frames = video if video.is_floating_point() else video.float() / 255
    resized = F.interpolate(frames.flatten(0, 1), (size, size), mode="bilinear", antialias=True)
    return resized.view(*video.shape[:3], size, size)


def valid_frames(video: Tensor, frame_mask: Tensor | None) -> Tensor:
    """The mask (B, T) bool, all True where there is none.

    A sample without any valid frame raises ``InputError``.
    """
    if frame_mask is None:
        return torch.ones(video.shape[:2], dtype=torch.bool, device=video.device)
    empty = (~frame_mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"samples {empty} of the batch (counted from 0) have no valid frame; "
            "expected one or more each; remedy: leave such samples out"
        )
    return frame_mask
