"""The ops under ``torch.ops.pycdgkd``: shapes for tracing, gradients, registration, op by op.

Importing this package loads the compiled library, which registers the schemas (csrc/schemas.cpp)
and the kernels; what the quantities mean is said in ``pycdgkd.losses``. Gradients that a forward
pass already holds are saved, never recomputed: ``residual`` is P - Y (N, K) of the distance
softmax, ``unit_grad`` the gradient for grad_loss = 1.
"""

from __future__ import annotations

import warnings

import torch

try:
    from pycdgkd import _C
except ImportError as error:
    error.add_note(
        "pycdgkd's compiled module could not be loaded. From a source checkout: pip install . ; "
        "otherwise reinstall the wheel for this Python. `pycdgkd doctor` tells more."
    )
    raise

from .distillation import distillation_loss, multi_source_kl
from .prototypes import prototype_loss
from .registration import DIRECTIONS, REDUCTIONS, arithmetic_dtype
from .teacher import attach_teacher_gradient, teacher_loss
from .temporal_conv import temporal_conv

__all__ = [
    "DIRECTIONS",
    "REDUCTIONS",
    "arithmetic_dtype",
    "attach_teacher_gradient",
    "build_info",
    "distillation_loss",
    "has_kernels",
    "multi_source_kl",
    "prototype_loss",
    "teacher_loss",
    "temporal_conv",
]

build_info = _C.build_info
CUDA_ERROR: str | None = None  # why the library with the CUDA kernels could not be loaded

if torch.version.cuda is not None and build_info()["cuda"]:
    try:
        from pycdgkd import _cuda  # noqa: F401  registers the CUDA kernels
    except ImportError as error:
        CUDA_ERROR = str(error)
        warnings.warn(
            f"pycdgkd: the CUDA kernels could not be loaded ({error}); the losses work on CPU "
            "tensors only. `pycdgkd doctor` tells more.",
            stacklevel=2,
        )


def has_kernels(device_type: str) -> bool:
    """Whether this build computes the losses on tensors of that device type ("cpu", "cuda")."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("pycdgkd::teacher_loss", key)
