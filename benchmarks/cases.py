"""The shapes that are timed, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherCase:
    name: str
    rows: int
    width: int
    classes: int
    modalities: int = 2


@dataclass(frozen=True)
class DistillationCase:
    name: str
    rows: int
    classes: int
    sources: int = 3


TEACHER = [
    TeacherCase("paper", 128, 768, 2),
    TeacherCase("odd", 1000, 511, 5),
    TeacherCase("bandwidth", 16384, 1024, 2),
]
DISTILLATION = [
    DistillationCase("paper", 128, 2),
    DistillationCase("seven-classes", 65536, 7),
    DistillationCase("thousand-classes", 4096, 1000),
]


def teacher_inputs(case: TeacherCase) -> tuple[Tensor, list[Tensor], Tensor]:
    """(logits, features, labels) with a class structure weak enough to leave a loss."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(case.classes, (case.rows,), generator=generator)
    features = []
    for _ in range(case.modalities):
        centres = torch.randn(case.classes, case.width, generator=generator) / case.width**0.5
        noise = torch.randn(case.rows, case.width, generator=generator)
        features.append((centres[labels] + 0.3 * noise).requires_grad_())
    logits = torch.randn(case.rows, case.classes, generator=generator, requires_grad=True)
    return logits, features, labels


def distillation_inputs(case: DistillationCase) -> tuple[Tensor, list[Tensor], Tensor]:
    """(logits, sources, labels); the sources resemble the student's logits."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(case.classes, (case.rows,), generator=generator)
    logits = 2 * torch.randn(case.rows, case.classes, generator=generator)
    sources = [
        logits + torch.randn(case.rows, case.classes, generator=generator)
        for _ in range(case.sources)
    ]
    return logits.requires_grad_(), sources, labels
