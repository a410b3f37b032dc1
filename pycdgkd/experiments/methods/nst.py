"""NST: a student whose neurons respond where the teacher's do.

Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017. A
channel's map over the grid of a frame tells where its neuron responds; l2-normalised, the maps f of
a stage are samples of a distribution, and the squared maximum mean discrepancy between the
student's C_S maps and the teacher's C_T is

    MMD^2 = sum k(f_T, f_T') / C_T^2 + sum k(f_S, f_S') / C_S^2 - 2 sum k(f_S, f_T) / (C_S C_T).

Student and teacher read the same frames on the same grids, so no map is resized.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.models.branches import VisualBranch
from pycdgkd.models.networks import MultimodalNet, Network, VisualNet
from pycdgkd.models.pvt import PyramidVisionTransformer
from pycdgkd.training.inference import forward
from pycdgkd.training.objective import Objective
from pycdgkd.training.recordings import Batch

KERNELS = ("polynomial", "gaussian")


@dataclass(frozen=True)
class NSTSettings:
    """What is matched and how strongly.

    weight: lambda in CE + (lambda / 2) MMD^2; 50 is mdistiller's for the polynomial kernel (there
    the half is left out). PVT's maps of 14 x 14 cells start at an MMD^2 near 0.005.
    kernel: "polynomial" is (a^T b)^2; "gaussian" is exp(-||a - b||^2 / (2 s^2)), s^2 the mean
    squared distance of a frame's student maps from its teacher maps.
    stage: of the pyramid, 1 to 4. The third is the last whose whole map the network uses: of what
    leaves the fourth it reads the class token alone, so that no loss has shaped that map.
    """

    weight: float = 50.0
    kernel: str = "polynomial"
    stage: int = 3

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        if not 0.0 <= self.weight < float("inf"):
            raise InputError(
                f"nst.weight: expected a finite number of at least 0; got {self.weight}; "
                "remedy: 50, the default"
            )
        if self.kernel not in KERNELS:
            raise InputError(
                f"nst.kernel: expected one of {', '.join(KERNELS)}; got '{self.kernel}'; "
                "remedy: polynomial, the default"
            )
        if self.stage not in (1, 2, 3, 4):
            raise InputError(
                f"nst.stage: expected 1, 2, 3 or 4; got {self.stage}; remedy: 3, the default"
            )


class NSTLoss(NamedTuple):
    """The loss and its parts, scalars."""

    loss: Tensor
    cross_entropy: Tensor
    mmd: Tensor


def squared_mmd(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    """MMD^2 (n,) of the channels' maps of n frames, each between its own two sets of maps.

    student: (n, cells, C_S) tokens of a grid. teacher: (n, cells, C_T). A channel without any
    response stays zero.
    """
    ours, theirs = F.normalize(student, dim=1), F.normalize(teacher, dim=1)

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return a.transpose(1, 2) @ b  # (n, C_a, C_b)

    own, cross, other = inner(ours, ours), inner(ours, theirs), inner(theirs, theirs)
    # Of unit maps, ||a - b||^2 = 2 - 2 a^T b. The bandwidth is a constant of the kernel.
    width = (2.0 - 2.0 * cross.detach()).mean((1, 2), keepdim=True)

    def mean_kernel(products: Tensor) -> Tensor:
        if kernel == "polynomial":
            return products.square().mean((1, 2))
        return torch.exp((products - 1.0) / width.clamp_min(1e-4)).mean((1, 2))

    return mean_kernel(own) + mean_kernel(other) - 2.0 * mean_kernel(cross)


def frame_weights(video: Tensor, frame_mask: Tensor | None) -> Tensor:
    """Weights (n,) of the n valid frames of (B, T): means over a sample's frames, then samples."""
    batch, count = video.shape[:2]
    if frame_mask is None:
        return torch.full((batch * count,), 1.0 / (batch * count), device=video.device)
    return (frame_mask / (batch * frame_mask.sum(1, keepdim=True)))[frame_mask]


def nst_loss(logits: Tensor, labels: Tensor, mmd: Tensor, weight: float) -> NSTLoss:
    """CE + (lambda / 2) MMD^2. logits: (B, K). labels: (B,). mmd: scalar, the mean MMD^2."""
    cross_entropy = F.cross_entropy(logits, labels)
    return NSTLoss(cross_entropy + 0.5 * weight * mmd, cross_entropy, mmd)


@contextlib.contextmanager
def recorded_maps(branch: VisualBranch, stage: int) -> Iterator[list[Tensor]]:
    """Collect the map (n, cells, C) that leaves a stage whenever the branch runs inside.

    n: the valid frames, sample by sample.
    """
    encoder = branch.frame_encoder
    assert isinstance(encoder, PyramidVisionTransformer), "other encoders have no such stages"
    maps: list[Tensor] = []

    def keep(_block: nn.Module, inputs: tuple[Any, ...], tokens: Tensor) -> None:
        height, width = inputs[1]
        maps.append(tokens[:, -height * width :])  # the class token of the fourth comes first

    last = encoder.get_submodule(f"block{stage}.{encoder.depths[stage - 1] - 1}")
    handle = last.register_forward_hook(keep)
    try:
        yield maps
    finally:
        handle.remove()


class SelectivityTransfer(Objective):
    """Objective of the student: cross-entropy, and the discrepancy from the teacher's maps.

    The teacher's maps of a whole split are too large to keep (at 224 pixels 250 kB a frame in the
    third stage), so its visual branch runs, frozen, on every batch.
    """

    columns = ("loss", "cross_entropy", "mmd")

    def __init__(self, settings: NSTSettings, teacher: VisualBranch) -> None:
        """Learn from this branch, which is put into evaluation mode."""
        self.settings, self.teacher = settings, teacher.eval().requires_grad_(False)

    def __call__(self, net: Network, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """NST loss of the batch."""
        del positions
        assert isinstance(net, VisualNet), "the student sees video alone"
        with recorded_maps(net.visual, self.settings.stage) as ours:
            output = forward(net, batch)
        with recorded_maps(self.teacher, self.settings.stage) as theirs, torch.no_grad():
            self.teacher(batch.video, batch.frame_mask)
        frames = squared_mmd(ours[0], theirs[0], self.settings.kernel)
        mmd = frames @ frame_weights(batch.video, batch.frame_mask)
        result = nst_loss(output.logits, batch.labels, mmd, self.settings.weight)
        return result.loss, torch.stack(result).detach()


def train_nst(bench: Bench, settings: NSTSettings) -> Classifier:
    """A student by labels and the shared teacher's maps.

    Raises ``InputError`` for a backbone that is no PVT.
    """
    if bench.config.backbone != "pvt":
        raise InputError(
            f"nst: expected backbone 'pvt', whose stages it compares; got "
            f"'{bench.config.backbone}', whose maps have no common form; remedy: backbone pvt, or "
            "leave nst out"
        )
    teacher = bench.teacher().load("teacher")
    assert isinstance(teacher, MultimodalNet), "teachers see both modalities"
    net = bench.visual_net()
    state = bench.fit("student", net, SelectivityTransfer(settings, teacher.visual))
    return bench.classifier(net, state)


METHOD = Method(
    "nst",
    "NST",
    ("video",),
    NSTSettings(),
    train_nst,
    "the teacher's feature maps",
)
