"""The PVT v1 and TSception encoders, and the teacher, assistants and student built on them.

Names and submodules load on first use, so that ``pycdgkd.models.presets`` comes without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import backbones, networks, presets, pvt, tsception
    from .networks import (
        EEGBranch,
        MultimodalNet,
        MultimodalOutput,
        VisualBranch,
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

_SUBMODULES = frozenset({"backbones", "networks", "presets", "pvt", "tsception"})
_HOMES = {
    "EEG_LEVELS": "presets",
    "PRESETS": "presets",
    "NetworkPreset": "presets",
    "PyramidVisionTransformer": "pvt",
    "pvt_small": "pvt",
    "pvt_tiny": "pvt",
    "TSceptionEncoder": "tsception",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        home = importlib.import_module(f".{_HOMES.get(name, 'networks')}", __name__)
        value = globals()[name] = getattr(home, name)
        return value
    raise AttributeError(f"module 'pycdgkd.models' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
