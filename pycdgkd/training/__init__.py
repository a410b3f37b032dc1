"""Training chain: teacher with rebalancing, assistants level by level, student on video alone.

Names are loaded on first use; ``pycdgkd.training.config`` itself needs the standard library only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pycdgkd.training' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
