"""Runs on a small cache whose labels can be learned in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from small_cache import QUICK, write_cache

from pycdgkd.training.config import TrainConfig
from pycdgkd.training.run import train

Run: TypeAlias = tuple[Path, dict[str, Any]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, and every machine has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(**options: Any) -> Path:
        return write_cache(tmp_path_factory.mktemp("caches") / "cache", **options)

    return make


@pytest.fixture(scope="session")
def cache(make_cache: Callable[..., Path]) -> Path:
    return make_cache()


@pytest.fixture(scope="session")
def quick() -> TrainConfig:
    """The whole chain in a few seconds."""
    return QUICK


@pytest.fixture(scope="session")
def finished(cache: Path, quick: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One uninterrupted run of ``quick``: its folder and results. Tests must not write into it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    torch.set_num_threads(1)
    return out, train(cache, out, quick)
