"""Says in the report's head what is tested: which installation, which torch, which kernels."""

from __future__ import annotations

import signal

import torch

import pycdgkd
from pycdgkd import ops


def pytest_report_header() -> str:
    info = ops.build_info()
    sanitize = f", sanitizers {info['sanitize']}" if info["sanitize"] else ""
    return (
        f"pycdgkd: {pycdgkd.__file__}, {info['isa_active']} kernels{sanitize}; "
        f"torch {torch.__version__}"
    )


def pytest_configure() -> None:
    """Shells start what they put in the background with SIGINT ignored, which programs inherit:
    those that tests interrupt would not hear of it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
