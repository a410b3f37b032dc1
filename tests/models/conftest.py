from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> Iterator[None]:
    """Small networks gain nothing from threads, and lose much where another process is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Reader of a golden archive: (weights by official name, inputs and outputs by key)."""

    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        path = GOLDEN / name
        if not path.is_file():
            pytest.skip(f"golden values not found: ../shared/golden/{name}")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        config = str(arrays.pop("config"))
        tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
        prefix = "weights/"
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        values = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        return weights, {"config": config, **values}

    return read
