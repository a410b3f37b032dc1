"""Training on a GPU, tried without one: fake tensors hold no values, but know where they are.

What mixes devices raises, as it would on a GPU. Backward passes are left out: autograd wants a
device for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from pycdgkd import bank, losses
from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import trial_split
from pycdgkd.training import environment
from pycdgkd.training.chain import Chain
from pycdgkd.training.config import TrainConfig
from pycdgkd.training.inference import network_logits
from pycdgkd.training.recordings import Recordings

GPU = torch.device("cuda")


def moved(net: nn.Module, device: torch.device) -> nn.Module:
    """``Module.to`` for fake tensors, which cannot be moved where they lie."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(device))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return net


def strict(function: Callable[..., Any]) -> Callable[..., Any]:
    """The shape functions of the ops do not compare devices; the ops themselves do."""

    def call(*arguments: Any, **options: Any) -> Any:
        places = {x.device for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)}
        if len(places) > 1:
            raise RuntimeError(f"{function.__name__}: tensors on {places}")
        return function(*arguments, **options)

    return call


@pytest.fixture
def chain(cache: Path, quick: TrainConfig, tmp_path: Path) -> Chain:
    """On the CPU, without what would depend on values: invalid frames, sources that are drawn."""
    opened = Cache.open(cache)
    data = Recordings.open(opened, TrainConfig(), torch.device("cpu"))
    split = trial_split(opened.samples, seed=0, fractions=quick.split.fractions)
    valid = np.flatnonzero(opened.frame_mask.all(1))
    split = replace(split, train=np.intersect1d(split.train, valid)[:16])
    config = replace(quick, distill=replace(quick.distill, strategy="all"))
    return Chain(config, tmp_path, data, split)


@pytest.fixture
def gpu(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(environment, "has_kernels", lambda _: True)
    for module, name in ((losses, "teacher_loss"), (losses, "distillation_loss"),
                         (bank, "class_prototypes")):  # fmt: skip
        monkeypatch.setattr(module, name, strict(getattr(module, name)))
    nets = {role: chain.build(role) for role in chain.config.roles}
    monkeypatch.setattr(chain, "load", lambda role: moved(nets[role], GPU))
    monkeypatch.setattr(chain, "data", replace(chain.data, device=GPU))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("role", ["teacher", "assistant_1", "student", "control"])
def test_a_step_stays_on_the_gpu(chain: Chain, role: str) -> None:
    net = chain.load(role).train()
    objective = chain._objective(role, net)
    objective.begin_epoch(net)
    objective.begin_step()
    batch = chain.data.batch(chain.split.train)
    loss, values = objective(net, batch, torch.arange(len(chain.split.train)))
    assert loss.device.type == values.device.type == "cuda"
    assert len(values) == len(objective.columns)
    logits = network_logits(net, chain.data, chain.split.train, 5)
    assert logits.device.type == "cuda"


@pytest.mark.usefixtures("gpu")
def test_what_is_left_on_the_cpu_is_found(chain: Chain) -> None:
    net = chain.load("teacher")
    objective = chain._objective("teacher", net)
    batch = chain.data.batch(chain.split.train)
    positions = torch.arange(len(chain.split.train))
    with pytest.raises(RuntimeError, match="devices"):
        objective(net, batch._replace(eeg=batch.eeg.cpu()), positions)
    moved(objective.banks, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="teacher_loss: tensors on"):
        objective(net, batch, positions)
