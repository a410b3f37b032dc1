"""Two or three processes over gloo give the loss and gradients of one with the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_features, make_labels, make_logits, make_prototypes
from distributed_worker import bank, teacher
from torch import Tensor

import pycdgkd

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

N, K = 24, 4
MANY = 70  # classes


def problem(dtype: torch.dtype, K: int = K, **options: Any) -> dict[str, Any]:
    given = options.pop("given")
    labels = options.pop("labels", make_labels(N, K))
    prototypes = [make_prototypes(K, D, dtype=dtype) for D in (9, 5)]
    return {
        "logits": make_logits(N, K, dtype=dtype),
        "features": [make_features(c, labels, noise=1.0 + m) for m, c in enumerate(prototypes)],
        "labels": labels,
        "prototypes": prototypes if given else None,
        "options": options,
    }


def problems() -> dict[str, dict[str, Any]]:
    torch.manual_seed(5)
    found: dict[str, dict[str, Any]] = {}
    for dtype in (torch.float64, torch.float32):
        for given in (True, False):
            for detach in (True, False):
                name = f"{dtype}-given{given}-detach{detach}".removeprefix("torch.")
                found[name] = problem(dtype, given=given, detach_prototypes=detach, scale=0.7)
    sorted_labels = make_labels(N, K).sort().values  # a rank sees some classes only
    one_idle = make_labels(N, K)
    one_idle[:7] = -100  # the first rank of two holds nothing but ignored rows
    for name, labels in (("missing_classes", sorted_labels), ("idle_rank", one_idle)):
        for given in (True, False):
            found[f"{name}-given{given}"] = problem(
                torch.float64, given=given, labels=labels, detach_prototypes=False, scale=0.3
            )
    counts = torch.tensor([3, 0, 2, 1])
    for given in (True, False):
        for detach in (True, False):
            found[f"many_classes-given{given}-detach{detach}"] = problem(
                torch.float64, MANY, given=given, detach_prototypes=detach
            )
    found["class_counts"] = problem(torch.float64, given=True, class_counts=counts)
    found["all_ignored"] = problem(torch.float64, given=True, labels=torch.full((N,), -100))
    found["proto_weight_1"] = problem(torch.float64, given=False, proto_weight=1.0)
    return found


SHARES = {2: [(0, 7), (7, N)], 3: [(0, 3), (3, 3), (3, N)]}  # one rank of three has no rows at all
PROBLEMS = problems()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank found."""
    world, folder = request.param, tmp_path_factory.mktemp("group")
    shared = {name: {**p, "shares": SHARES[world]} for name, p in PROBLEMS.items()}
    script = str(Path(__file__).with_name("distributed_worker.py"))
    store, stored = str(folder / "store"), str(folder / "problems.pt")
    torch.save(shared, stored)
    outputs = [folder / f"rank{rank}.pt" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), store, stored, str(output)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)
    return [torch.load(output, weights_only=True) for output in outputs]


def assert_near(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 2e-5
    scale = expected.nan_to_num().abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * scale + 1e-30, equal_nan=True
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_teacher_loss(name: str, ranks: list[Any]) -> None:
    """Gradients after the mean over ranks that DistributedDataParallel takes of parameters.

    A parameter's gradient is the sum over rows of (row's gradient) x (row's Jacobian); the mean
    over W ranks divides it by W, so that each rank's rows must bear W times the global gradient.
    """
    expected = teacher(PROBLEMS[name], slice(0, N), None)
    world = len(ranks)
    found = [rank[name]["teacher"] for rank in ranks]
    for each in found:
        for ours, theirs in zip(each["values"], expected["values"], strict=True):
            assert ours.dtype == theirs.dtype
            assert_near(ours, theirs)
    for index, whole in enumerate(expected["grads"]):
        rows = torch.cat([each["grads"][index] for each in found])
        assert_near(rows / world, whole)
    for index, whole in enumerate(expected["grad_prototypes"]):
        mean = sum(each["grad_prototypes"][index] for each in found) / world
        assert_near(mean, whole)


@pytest.mark.parametrize("name", PROBLEMS)
def test_prototype_bank(name: str, ranks: list[Any]) -> None:
    expected = bank(PROBLEMS[name], slice(0, N), None)
    for rank in ranks:
        for key, value in expected.items():
            torch.testing.assert_close(rank[name]["bank"][key], value, rtol=1e-6, atol=1e-7)


def test_values_without_a_graph(ranks: list[Any]) -> None:
    first = next(iter(PROBLEMS.values()))
    expected = pycdgkd.teacher_loss(first["logits"], first["features"], first["labels"])
    for rank in ranks:
        for ours, theirs in zip(rank["no_grad"], expected, strict=True):
            assert not ours.requires_grad
            assert_near(ours, theirs)


def test_ranks_alone_would_weigh_the_modalities_otherwise() -> None:
    """So that the tests above could not pass with weights of each rank's own."""
    first = next(iter(PROBLEMS.values()))
    shares = [slice(*share) for share in SHARES[2]]
    weights = [teacher(first, rows, None)["values"][4] for rows in (*shares, slice(0, N))]
    assert not torch.allclose(weights[0], weights[2])
    assert not torch.allclose(weights[1], weights[2])
