"""A bench on a small cache whose labels can be learned in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_cache import QUICK, write_cache

from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import trial_split
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Method
from pycdgkd.training.config import TrainConfig
from pycdgkd.training.recordings import Recordings

# Long enough for every method to learn.
LEARNING = replace(QUICK, optim=replace(QUICK.optim, epochs=8, patience=8))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, and every machine has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="session")
def data(cache: Path) -> Recordings:
    return Recordings.open(Cache.open(cache), TrainConfig(), torch.device("cpu"))


@pytest.fixture
def open_bench(data: Recordings, tmp_path: Path) -> Callable[..., Bench]:
    """A bench for a method, with the settings it has by default."""

    def open_one(method: Method, config: TrainConfig = LEARNING) -> Bench:
        mine = Recordings.open(data.cache, config, data.device)
        split = trial_split(data.cache.samples, seed=0, fractions=config.split.fractions)
        return Bench.open(config, mine, split, tmp_path, method.name, method.settings)

    return open_one
