"""pycdgkd: cross-modal densely guided knowledge distillation with modality rebalancing.

The public names below are loaded on first use, so that ``pycdgkd --help`` answers without torch.
The ops under ``torch.ops.pycdgkd`` are registered by the first use of any of them, by
``import pycdgkd.ops``, and at once where torch is imported already.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from .lazy import attach

if TYPE_CHECKING:
    from . import data, models, ops, reference, training
    from .bank import PrototypeBank
    from .losses import (
        ClassPrototypes,
        DistillationLoss,
        PrototypeLoss,
        TeacherLoss,
        class_prototypes,
        convergence_rates,
        distillation_loss,
        modality_weights,
        multi_source_kl,
        prototype_loss,
        teacher_loss,
    )
    from .sampling import sample_sources

__version__ = "0.1.0"

__all__ = [
    "ClassPrototypes",
    "DistillationLoss",
    "PrototypeBank",
    "PrototypeLoss",
    "TeacherLoss",
    "class_prototypes",
    "convergence_rates",
    "data",
    "distillation_loss",
    "modality_weights",
    "models",
    "multi_source_kl",
    "ops",
    "prototype_loss",
    "reference",
    "sample_sources",
    "teacher_loss",
    "training",
]

_HOME = {
    "ClassPrototypes": "losses",
    "DistillationLoss": "losses",
    "PrototypeBank": "bank",
    "PrototypeLoss": "losses",
    "TeacherLoss": "losses",
    "class_prototypes": "losses",
    "convergence_rates": "losses",
    "distillation_loss": "losses",
    "modality_weights": "losses",
    "multi_source_kl": "losses",
    "prototype_loss": "losses",
    "sample_sources": "sampling",
    "teacher_loss": "losses",
}

__getattr__, __dir__ = attach(__name__, _HOME, ("data", "models", "ops", "reference", "training"))

if sys.modules.get("torch") is not None:  # nothing is saved by waiting
    importlib.import_module(".ops", __name__)
