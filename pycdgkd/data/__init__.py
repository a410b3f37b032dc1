"""Recordings to cache: synthetic studies, DEAP preparation, the prepared cache and its splits.

Every name is loaded on first use: ``import pycdgkd.data`` pulls in neither numpy nor torch, and the
optional packages (mne, av, edfio, the mtcnn weight files) are imported inside the functions that
need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import Cache
    from .config import PrepareConfig, StudyConfig, parameter_hash
    from .deap import PrepareReport, prepare
    from .faces import FaceDetector, track_crops
    from .splits import Split, trial_split
    from .synthetic import write_study
    from .video import sample_frames, video_fps

__all__ = [
    "Cache",
    "FaceDetector",
    "PrepareConfig",
    "PrepareReport",
    "Split",
    "StudyConfig",
    "parameter_hash",
    "prepare",
    "sample_frames",
    "track_crops",
    "trial_split",
    "video_fps",
    "write_study",
]

_HOME = {
    "Cache": "cache",
    "FaceDetector": "faces",
    "PrepareConfig": "config",
    "PrepareReport": "deap",
    "Split": "splits",
    "StudyConfig": "config",
    "parameter_hash": "config",
    "prepare": "deap",
    "sample_frames": "video",
    "track_crops": "faces",
    "trial_split": "splits",
    "video_fps": "video",
    "write_study": "synthetic",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pycdgkd.data' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
