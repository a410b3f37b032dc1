"""The same bits on every run, for every thread count and wherever the memory lies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import assert_same_bits, make_features, make_labels, make_logits, make_prototypes
from torch import Tensor

import pycdgkd


def prototypes_and_teacher(N: int, D: int, K: int, dtype: torch.dtype) -> list[Tensor]:
    labels = make_labels(N, K)
    prototypes = [make_prototypes(K, width, dtype=dtype) for width in (D, D // 2 + 1)]
    features = [make_features(c, labels).requires_grad_() for c in prototypes]
    logits = make_logits(N, K, dtype=dtype).requires_grad_()
    given = [c.requires_grad_() for c in prototypes]
    results = []
    for chosen in (given, None):
        result = pycdgkd.teacher_loss(logits, features, labels, chosen, detach_prototypes=False)
        leaves = [logits, *features, *(chosen or ())]
        results += [t.detach() for t in result]
        results += torch.autograd.grad(result.loss, leaves)
    for wanted in ([features[0]], [given[0]], [features[0], given[0]]):
        z, c = (x if any(x is w for w in wanted) else x.detach() for x in (features[0], given[0]))
        for reduction in ("none", "mean"):
            loss, true_prob = pycdgkd.prototype_loss(z, c, labels, reduction=reduction)
            weights = torch.linspace(-1, 1, N, dtype=loss.dtype) if loss.dim() else None
            grads = torch.autograd.grad(loss, wanted, weights)
            results += [loss.detach(), true_prob, *grads]
    return [*results, pycdgkd.convergence_rates(features, given, labels)]


def every_number_of_few_classes() -> list[Tensor]:
    results = []
    for K in [*range(2, 34), 40]:
        N, D = (5, 13, 33, 50)[K % 4], (1, 7, 15, 16, 17, 31, 33, 130, 511)[K % 9]
        labels, c = make_labels(N, K), make_prototypes(K, D).requires_grad_()
        z = make_features(c.detach(), labels).requires_grad_()
        loss, true_prob = pycdgkd.prototype_loss(z, c, labels)
        results += [loss.detach(), true_prob, *torch.autograd.grad(loss, [z, c])]
    return results


def divergences(N: int, K: int, dtype: torch.dtype) -> list[Tensor]:
    labels = make_labels(N, K)
    logits = make_logits(N, K, dtype=dtype).requires_grad_()
    sources = [make_logits(N, K, dtype=dtype) for _ in range(2)]
    results = []
    for direction in ("reverse", "forward"):
        result = pycdgkd.distillation_loss(logits, sources, labels, direction=direction)
        results += [t.detach() for t in result]
        results += torch.autograd.grad(result.loss, [logits])
        results.append(
            pycdgkd.multi_source_kl(logits.detach(), sources, direction=direction, reduction="none")
        )
    return results


PROBLEMS: dict[str, Callable[[], list[Tensor]]] = {
    "wide": lambda: prototypes_and_teacher(4096, 512, 2, torch.float32),
    "classes": lambda: prototypes_and_teacher(1031, 130, 65, torch.bfloat16),
    "one_block_of_classes": lambda: prototypes_and_teacher(30, 1030, 70, torch.float32),
    "blocks_of_classes": lambda: prototypes_and_teacher(2600, 33, 70, torch.float64),
    "chunks_of_classes": lambda: prototypes_and_teacher(150, 9, 1100, torch.float32),
    "double": lambda: prototypes_and_teacher(2049, 65, 3, torch.float64),
    "tall": lambda: divergences(65536, 7, torch.float32),
    "vocabulary": lambda: divergences(257, 1001, torch.bfloat16),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_same_bits_for_every_thread_count_and_run(name: str) -> None:
    outcomes = []
    for count in (1, 2, 4, 3, 2):
        torch.manual_seed(0)
        torch.set_num_threads(count)
        outcomes.append(PROBLEMS[name]())
    for outcome in outcomes[1:]:
        assert_same_bits(outcomes[0], outcome)


@pytest.mark.parametrize("K", [3, 70])
def test_same_bits_wherever_the_memory_lies(K: int) -> None:
    """Vector loops must not peel by address: nothing guarantees it to be the same next time."""
    labels, prototypes = make_labels(33, K), make_prototypes(K, 131)
    features, logits = make_features(prototypes, labels), make_logits(33, 131)
    source = make_logits(33, 131)
    outcomes, ballast = [], []
    for shift in range(17):
        moved = []
        for x in (features, prototypes, logits, source):
            base = torch.empty(x.numel() + shift)[shift:].view_as(x)
            moved.append(base.copy_(x).requires_grad_())
        z, c, s, t = moved
        loss, true_prob = pycdgkd.prototype_loss(z, c, labels)
        kl = pycdgkd.multi_source_kl(s, [t.detach()])
        grads = torch.autograd.grad(loss + kl, [z, c, s])
        outcomes.append([loss.detach(), true_prob, kl.detach(), *grads])
        ballast.append(torch.empty(1 + 7 * shift))  # moves later allocations
    for outcome in outcomes[1:]:
        assert_same_bits(outcomes[0], outcome)


def test_rows_of_many_classes_depend_on_their_neighbours_by_rounding_alone() -> None:
    labels, prototypes = make_labels(137, 70), make_prototypes(70, 30)
    features = make_features(prototypes, labels)
    rows, _ = pycdgkd.prototype_loss(features, prototypes, labels, reduction="none")
    for i in (0, 31, 32, 136):
        one = slice(i, i + 1)
        alone, _ = pycdgkd.prototype_loss(features[one], prototypes, labels[one], reduction="none")
        torch.testing.assert_close(alone, rows[one], rtol=1e-6, atol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Nor on its place in the vector loop: what a row gets in a batch, it gets alone."""
    labels, prototypes = make_labels(37, 5), make_prototypes(5, 30)
    features = make_features(prototypes, labels)
    rows, _ = pycdgkd.prototype_loss(features, prototypes, labels, reduction="none")
    logits, source = make_logits(37, 9), make_logits(37, 9)
    kl = pycdgkd.multi_source_kl(logits, [source], reduction="none")
    for i in (0, 15, 16, 36):
        one = slice(i, i + 1)
        alone, _ = pycdgkd.prototype_loss(features[one], prototypes, labels[one], reduction="none")
        assert torch.equal(alone, rows[one])
        single = pycdgkd.multi_source_kl(logits[one], [source[one]], reduction="none")
        assert torch.equal(single, kl[one])


ISA_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import pycdgkd.ops
assert pycdgkd.ops.build_info()["isa_active"] == sys.argv[2]
from test_determinism import divergences, every_number_of_few_classes, prototypes_and_teacher
torch.manual_seed(0)
torch.save([
    *prototypes_and_teacher(129, 65, 3, torch.float32), *divergences(65, 33, torch.float32),
    *prototypes_and_teacher(33, 70, 2, torch.float64), *divergences(33, 5, torch.float64),
    *prototypes_and_teacher(133, 65, 70, torch.float32), *every_number_of_few_classes(),
    *prototypes_and_teacher(70, 33, 65, torch.float64),
], sys.argv[3])
"""


def run_with_isa(isa: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        env={**os.environ, "PYCDGKD_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """They may sum in another order and fuse other products, no more."""
    outcomes = {}
    for isa in pycdgkd.ops.build_info()["isa_levels"].split(","):
        path = tmp_path / f"{isa}.pt"
        done = run_with_isa(isa, ISA_SCRIPT, str(Path(__file__).parent), isa, str(path))
        if "cannot run here" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        outcomes[isa] = torch.load(path, weights_only=True)
    assert "baseline" in outcomes
    for isa, outcome in outcomes.items():
        for ours, base in zip(outcome, outcomes["baseline"], strict=True):
            limit = 1e-13 if base.dtype == torch.float64 else 3e-6
            allowed = limit * base.abs().max()
            assert (ours - base).abs().max() <= allowed, isa
    if len(outcomes) == 1:
        pytest.skip("this processor runs the baseline kernels only")


def test_unknown_instruction_set_is_an_error() -> None:
    script = "import pycdgkd.ops; pycdgkd.ops.build_info()"
    done = run_with_isa("mmx", script)
    assert done.returncode != 0
    compiled = pycdgkd.ops.build_info()["isa_levels"]
    assert f"pycdgkd: PYCDGKD_ISA=mmx cannot run here; compiled: {compiled}; unset" in done.stderr
    assert run_with_isa("", script).returncode == 0  # empty means: not set
