"""Recordings to cache: synthetic studies, preparation, the prepared cache and its splits.

Every name is loaded on first use: ``import pycdgkd.data`` pulls in neither numpy nor torch, and the
optional packages (mne, av, edfio, the mtcnn weight files) are imported inside the functions that
need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pycdgkd.lazy import attach

if TYPE_CHECKING:
    from .cache import Cache
    from .config import PrepareConfig, StudyConfig, parameter_hash
    from .faces import FaceDetector, track_crops
    from .pipeline import PrepareReport, prepare
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
    "PrepareReport": "pipeline",
    "Split": "splits",
    "StudyConfig": "config",
    "parameter_hash": "config",
    "prepare": "pipeline",
    "sample_frames": "video",
    "track_crops": "faces",
    "trial_split": "splits",
    "video_fps": "video",
    "write_study": "synthetic",
}


__getattr__, __dir__ = attach(__name__, _HOME)
