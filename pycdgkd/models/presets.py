"""Sizes of the networks, by name: plain numbers that configuration code reads without torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pycdgkd.errors import InputError


@dataclass(frozen=True)
class NetworkPreset:
    """Sizes of one family of networks: teacher, assistants and student share them.

    The four-tuples describe the stages of the pyramid vision transformer (see
    ``PyramidVisionTransformer``) and do not concern timm backbones.
    """

    name: str
    img_size: int  # pixels, square face crops
    patch_size: int  # pixels per side of a patch of the first stage
    embed_dims: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int]
    mlp_ratios: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    sr_ratios: tuple[int, int, int, int]
    feature_dim: int  # width of z_v and of z_e
    num_temporal: int  # TSception's T
    num_spatial: int  # TSception's S
    temporal_depth: int  # transformer layers over the frames of a sample
    hidden: int  # hidden width of the classifier
    dropout: float  # of the classifier


# "paper": PVT v1 tiny on 224-pixel crops and TSception with T = S = 15; both features are 768 wide,
# as in the authors' networks, which keeps the two prototype losses comparable (squared distances
# grow with the width). "nano": the same networks with small widths, for two CPU cores. Its patches
# of 3 pixels give 48-pixel crops the grids 16, 8, 4 and 2, which every stage divides exactly.
PRESETS: dict[str, NetworkPreset] = {
    "paper": NetworkPreset(
        name="paper",
        img_size=224,
        patch_size=4,
        embed_dims=(64, 128, 320, 512),
        num_heads=(1, 2, 5, 8),
        mlp_ratios=(8, 8, 4, 4),
        depths=(2, 2, 2, 2),
        sr_ratios=(8, 4, 2, 1),
        feature_dim=768,
        num_temporal=15,
        num_spatial=15,
        temporal_depth=1,
        hidden=128,
        dropout=0.5,
    ),
    "nano": NetworkPreset(
        name="nano",
        img_size=48,
        patch_size=3,
        embed_dims=(16, 32, 40, 64),
        num_heads=(1, 2, 5, 8),
        mlp_ratios=(2, 2, 2, 2),
        depths=(1, 1, 1, 1),
        sr_ratios=(8, 4, 2, 1),
        feature_dim=64,
        num_temporal=8,
        num_spatial=8,
        temporal_depth=1,
        hidden=32,
        dropout=0.5,
    ),
}

# EEG encoders by level, as (TSception windows in seconds, spatial kernels): 0 is the teacher's and
# each next assistant's is simpler. The first two assistants have the authors' windows; the last
# level has no spatial block (the paper's Fig. 4).
EEG_LEVELS: tuple[tuple[tuple[float, ...], tuple[str, ...]], ...] = (
    ((0.5, 0.25, 0.125), ("global", "hemisphere")),
    ((0.5, 0.125), ("hemisphere",)),
    ((0.5,), ("hemisphere",)),
    ((0.5,), ()),
)


def get_preset(preset: str | NetworkPreset) -> NetworkPreset:
    """The preset of that name (else ``InputError``); a ``NetworkPreset`` passes through."""
    if isinstance(preset, NetworkPreset):
        return preset
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)
        raise InputError(
            f"unknown network preset '{preset}'; expected one of {', '.join(PRESETS)}; "
            f"did you mean '{near[0]}'?"
        )
    return PRESETS[preset]


def eeg_level(level: int) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """(windows, spatial) of the EEG encoder at ``level`` >= 0; beyond the last level, the last."""
    if level < 0:
        raise InputError(f"level of an EEG encoder must be 0 (teacher) or more; got {level}")
    return EEG_LEVELS[min(level, len(EEG_LEVELS) - 1)]
