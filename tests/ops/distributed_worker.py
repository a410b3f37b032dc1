"""One rank of a gloo group: computes its share of a batch, writes what it found, and ends.

Run as: python distributed_worker.py RANK WORLD STORE PROBLEM RESULT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

import pycdgkd


def teacher(problem: dict[str, Any], rows: slice, group: Any) -> dict[str, Any]:
    """Values and gradients of the rows' share."""
    logits = problem["logits"][rows].clone().requires_grad_()
    features = [z[rows].clone().requires_grad_() for z in problem["features"]]
    given = problem["prototypes"]
    prototypes = None if given is None else [c.clone().requires_grad_() for c in given]
    result = pycdgkd.teacher_loss(
        logits,
        features,
        problem["labels"][rows],
        prototypes,
        process_group=group,
        **problem["options"],
    )
    result.loss.backward()
    means = prototypes or []
    return {
        "values": [value.detach() for value in result],
        "grads": [logits.grad, *[z.grad for z in features]],
        "grad_prototypes": [c.grad for c in means if c.grad is not None],
    }


def bank(problem: dict[str, Any], rows: slice, group: Any) -> dict[str, Any]:
    """Two passes of a PrototypeBank over the rows' share."""
    features, labels = problem["features"][0][rows], problem["labels"][rows]
    state = pycdgkd.PrototypeBank(problem["logits"].shape[1], features.shape[1])
    for shift in (0.0, 1.0):
        state.update(features + shift, labels)
        state.refresh(process_group=group)
    return state.state_dict()


def main(rank: int, world: int, store: str, problem_path: str, result_path: str) -> None:
    """Join the group, answer every problem in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
    found = {}
    for name, problem in torch.load(problem_path, weights_only=True).items():
        begin, end = problem["shares"][rank]
        rows = slice(begin, end)
        found[name] = {"teacher": teacher(problem, rows, group), "bank": bank(problem, rows, group)}
    with torch.no_grad():  # one more, without a graph
        problem = next(iter(torch.load(problem_path, weights_only=True).values()))
        rows = slice(*problem["shares"][rank])
        quiet = pycdgkd.teacher_loss(
            problem["logits"][rows],
            [z[rows] for z in problem["features"]],
            problem["labels"][rows],
            process_group=group,
        )
        found["no_grad"] = list(quiet)
    torch.save(found, result_path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
