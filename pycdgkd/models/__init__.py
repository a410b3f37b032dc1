"""The PVT v1 and TSception encoders, and the teacher, assistants and student built on them.

Names and submodules load on first use, so that ``pycdgkd.models.presets`` comes without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pycdgkd.lazy import attach

if TYPE_CHECKING:
    from . import backbones, branches, networks, presets, pvt, tsception
    from .branches import EEGBranch, VisualBranch
    from .networks import (
        MultimodalNet,
        MultimodalOutput,
        VisualNet,
        VisualOutput,
        build_multimodal,
        build_visual,
        load_frame_encoder_weights,
    )
    from .presets import EEG_LEVELS, PRESETS, NetworkPreset
    from .pvt import PyramidVisionTransformer, pvt_small, pvt_tiny
    from .tsception import TSceptionEncoder

__all__ = [
    "EEG_LEVELS",
    "PRESETS",
    "EEGBranch",
    "MultimodalNet",
    "MultimodalOutput",
    "NetworkPreset",
    "PyramidVisionTransformer",
    "TSceptionEncoder",
    "VisualBranch",
    "VisualNet",
    "VisualOutput",
    "backbones",
    "branches",
    "build_multimodal",
    "build_visual",
    "load_frame_encoder_weights",
    "networks",
    "presets",
    "pvt",
    "pvt_small",
    "pvt_tiny",
    "tsception",
]

_HOME = {
    "EEG_LEVELS": "presets",
    "PRESETS": "presets",
    "EEGBranch": "branches",
    "MultimodalNet": "networks",
    "MultimodalOutput": "networks",
    "NetworkPreset": "presets",
    "PyramidVisionTransformer": "pvt",
    "TSceptionEncoder": "tsception",
    "VisualBranch": "branches",
    "VisualNet": "networks",
    "VisualOutput": "networks",
    "build_multimodal": "networks",
    "build_visual": "networks",
    "load_frame_encoder_weights": "networks",
    "pvt_small": "pvt",
    "pvt_tiny": "pvt",
}

__getattr__, __dir__ = attach(
    __name__, _HOME, ("backbones", "branches", "networks", "presets", "pvt", "tsception")
)
