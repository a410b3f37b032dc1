"""Training chain: teacher with rebalancing, assistants level by level, student on video alone.

Names are loaded on first use; ``pycdgkd.training.config`` itself needs the standard library only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pycdgkd.lazy import attach

if TYPE_CHECKING:
    from .checkpoint import load_network, save_network
    from .config import TrainConfig, load_config, to_toml
    from .run import evaluate, train

__all__ = [
    "TrainConfig",
    "evaluate",
    "load_config",
    "load_network",
    "save_network",
    "to_toml",
    "train",
]

_HOME = {
    "TrainConfig": "config",
    "evaluate": "run",
    "load_config": "config",
    "load_network": "checkpoint",
    "save_network": "checkpoint",
    "to_toml": "config",
    "train": "run",
}


__getattr__, __dir__ = attach(__name__, _HOME)
