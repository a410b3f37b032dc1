"""The tensors of a case, and what the reference makes of them in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pycdgkd import reference

from .cases import KL_OPS, Case

PROTO_WEIGHT = KD_WEIGHT = 0.5
TEMPERATURE = 2.0
BROADCAST_LIMIT = 2**22  # N K D up to which the reference forms every difference z_i - c_k


@dataclass(frozen=True)
class Inputs:
    """What every contestant of a case gets; unused fields are empty."""

    case: Case
    labels: Tensor  # (N,)
    logits: Tensor  # (N, K)
    features: list[Tensor]  # M of (N, D)
    prototypes: list[Tensor]  # M of (K, D)
    sources: list[Tensor]  # S of (N, K)
    weights: list[float]  # S
    grad_output: Tensor  # gradient of the result: 1, or (K, D) for class_prototypes

    @property
    def leaves(self) -> list[Tensor]:
        """What is differentiated."""
        return [t for t in (self.logits, *self.features) if t.requires_grad]

    @property
    def weight_tensor(self) -> Tensor | None:
        """The sources' weights, or None where all take part."""
        if not self.case.inactive:
            return None
        return torch.tensor(self.weights, device=self.logits.device)

    @property
    def temperature_power(self) -> int:
        """The usual distillation loss (forward KL) has the factor T^2, the paper's has not."""
        return 2 if self.case.direction == "forward" else 0

    def double(self) -> Inputs:
        """The same numbers in float64, leaves again leaves."""

        def wide(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        return replace(
            self,
            logits=wide(self.logits),
            features=[wide(z) for z in self.features],
            prototypes=[wide(c) for c in self.prototypes],
            sources=[wide(t) for t in self.sources],
            grad_output=self.grad_output.double(),
        )


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    rows, columns = values.shape
    if layout == "strided":
        return values.new_zeros(rows, columns + 16)[:, :columns].copy_(values)
    if layout == "unaligned":
        return values.new_zeros(rows * columns + 1)[1:].view(rows, columns).copy_(values)
    return values


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Seeded inputs with a class structure weak enough to leave a loss."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def stored(values: Tensor) -> Tensor:
        return _laid_out(values.to(dtype), case.layout)

    N, D, K = case.rows, case.width, case.classes
    labels = torch.randint(K, (N,), generator=generator, device=device)
    labels[: min(N, K)] = torch.arange(min(N, K), device=device)  # few classes without a row
    features, prototypes, sources = [], [], []
    # Batch means contain each row itself: with wide noise every row would look certain.
    noise = min(0.3, (N / K / (2 * D)) ** 0.5) if case.op == "teacher_loss" else 0.3
    if case.op not in KL_OPS:
        for _ in range(case.modalities):
            centres = normal(K, D) / D**0.5
            features.append(stored(centres[labels] + noise * normal(N, D)))
            prototypes.append(centres.to(dtype))
    logits = 2 * normal(N, K) if case.op in (*KL_OPS, "teacher_loss") else torch.empty(0)
    for _ in range(case.sources):
        sources.append(stored(logits + normal(N, K)))
    differentiable = case.op != "convergence_rates"
    grad_output = normal(K, D) if case.op == "class_prototypes" else torch.ones((), device=device)
    weights = [0.0 if j < case.inactive else 1.0 / case.active for j in range(case.sources)]
    return Inputs(
        case,
        labels,
        stored(logits).requires_grad_() if logits.numel() else logits,
        [z.requires_grad_(differentiable) for z in features],
        prototypes,
        sources,
        weights,
        grad_output,
    )


# ---- what is right -------------------------------------------------------------------------------

Result = tuple[Tensor, Sequence[Tensor | None]]  # value, gradients of the leaves; None is zero


def _log_prob(features: Tensor, prototypes: Tensor) -> Tensor:
    """Eq. 2 in float64; large cases by a matrix product, held against the reference on some rows.

    The reference forms all N K D differences, which no machine holds for many classes.
    """
    N, (K, D) = features.shape[0], prototypes.shape
    if N * K * D <= BROADCAST_LIMIT:
        return reference.class_log_probabilities(features, prototypes)
    centre = prototypes.mean(0)
    z, c = features - centre, prototypes - centre
    log_prob = torch.addmm(-c.square().sum(1), z, c.T, alpha=2).log_softmax(1)
    some = torch.linspace(0, N - 1, max(1, min(N, BROADCAST_LIMIT // (K * D)))).long()
    exact = reference.class_log_probabilities(features[some], prototypes)
    torch.testing.assert_close(log_prob[some], exact, rtol=1e-9, atol=1e-9)
    return log_prob


def _prototype_terms(features: Tensor, prototypes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Eqs. 3 and 4: (loss, rate)."""
    true_log_prob = _log_prob(features, prototypes).gather(1, labels[:, None])[:, 0]
    return -true_log_prob.mean(), true_log_prob.detach().exp().sum()


def _teacher_value(i: Inputs, detach: bool) -> Tensor:
    K = i.case.classes
    means = [reference.class_prototypes(z, i.labels, K)[0] for z in i.features]
    terms = [
        _prototype_terms(z, c.detach() if detach else c, i.labels)
        for z, c in zip(i.features, means, strict=True)
    ]
    weights = reference.modality_weights(torch.stack([rate for _, rate in terms]))
    cross_entropy = torch.nn.functional.cross_entropy(i.logits, i.labels)
    proto = (weights * torch.stack([loss for loss, _ in terms])).sum()
    return (1 - PROTO_WEIGHT) * cross_entropy + PROTO_WEIGHT * proto


def _kl_value(i: Inputs) -> Tensor:
    settings: dict[str, Any] = {
        "source_weights": i.weights,
        "temperature": TEMPERATURE,
        "direction": i.case.direction,
    }
    if i.case.op == "multi_source_kl":
        return reference.multi_source_kl(i.logits, i.sources, **settings)
    return reference.distillation_loss(
        i.logits, i.sources, i.labels, kd_weight=KD_WEIGHT, **settings,
        temperature_power=i.temperature_power,
    )[0]  # fmt: skip


def _unweighted(i: Inputs) -> Tensor:
    """What the raw kernels of teacher_loss compute: the sum of the prototype losses."""
    K = i.case.classes
    means = [reference.class_prototypes(z.detach(), i.labels, K)[0] for z in i.features]
    terms = (_prototype_terms(z, c, i.labels) for z, c in zip(i.features, means, strict=True))
    return torch.stack([loss for loss, _ in terms]).sum()


VALUES: dict[str, Callable[[Inputs], Tensor]] = {
    "class_prototypes": lambda i: reference.class_prototypes(
        i.features[0], i.labels, i.case.classes
    )[0],
    "prototype_loss": lambda i: _prototype_terms(i.features[0], i.prototypes[0], i.labels)[0],
    "convergence_rates": lambda i: torch.stack(
        [_prototype_terms(z, c, i.labels)[1] for z, c in zip(i.features, i.prototypes, strict=True)]
    ),
    "teacher_loss": lambda i: _teacher_value(i, detach=True),
    "teacher_loss through means": lambda i: _teacher_value(i, detach=False),
    "teacher_loss kernels": _unweighted,
    "multi_source_kl": _kl_value,
    "distillation_loss": _kl_value,
}


def exact_result(inputs: Inputs, value_of: str) -> Result:
    """Value and gradients in float64, by autograd through ``pycdgkd.reference``."""
    wide = inputs.double()
    value = VALUES[value_of](wide)
    if not value.requires_grad:
        return value, []
    leaves = wide.features if value_of == "teacher_loss kernels" else wide.leaves
    return value.detach(), list(torch.autograd.grad(value, leaves, wide.grad_output))


def largest_error(found: Result, exact: Result) -> float:
    """Largest difference relative to the largest exact number, over value and gradients."""

    def relative(a: Tensor | None, b: Tensor | None) -> float:
        assert b is not None
        difference = b if a is None else a.detach().double() - b
        error = difference.abs().max() / b.abs().max().clamp(min=1e-300)
        return float("inf") if error.isnan() else float(error)

    pairs = [(found[0], exact[0]), *zip(found[1], exact[1], strict=True)]
    return max(relative(a, b) for a, b in pairs)
