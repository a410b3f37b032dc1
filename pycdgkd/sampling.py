"""Which sources guide the student in one step: the random subset S_i of Eq. 9."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check, check_choice

_STRATEGIES = ("all", "subset", "bernoulli_sum", "drop_one", "drop_one_sum")


def sample_sources(
    num_sources: int,
    *,
    strategy: str = "subset",
    drop_prob: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the source weights of one training step (the paper's stochastic subset S_i).

    Args:
        num_sources: S >= 1.
        strategy: "subset": each source is kept with probability 1 - drop_prob, redrawn until one
            is kept, weights sum to 1 (the paper). "all": 1/S each. "bernoulli_sum": kept sources
            weigh 1, possibly none is kept (the authors' code). "drop_one": all but one, weights
            sum to 1; a single source is never dropped. "drop_one_sum": the same, and each kept
            source weighs 1 (DGKD).
        drop_prob: in [0, 1), or [0, 1] for "bernoulli_sum".
        generator: of the CPU; None: torch's global one.

    Returns:
        (S,) float32 on the CPU.
    """
    name = "sample_sources"
    check(name, "num_sources", num_sources, num_sources >= 1, "at least 1")
    check_choice(name, "strategy", strategy, _STRATEGIES)
    if strategy == "bernoulli_sum":
        check(name, "drop_prob", drop_prob, 0.0 <= drop_prob <= 1.0, "a probability")
    else:  # a subset is redrawn until it holds a source, which must not take for ever
        check(name, "drop_prob", drop_prob, 0.0 <= drop_prob <= 1.0 - 1e-6, "a probability below 1")
    if strategy == "all" or (strategy.startswith("drop_one") and num_sources == 1):
        return torch.full((num_sources,), 1.0 / num_sources, device="cpu")
    if strategy.startswith("drop_one"):
        kept = torch.ones(num_sources, device="cpu")
        kept[int(torch.randint(num_sources, (), generator=generator, device="cpu"))] = 0.0
        return kept if strategy == "drop_one_sum" else kept / (num_sources - 1)
    kept = torch.rand(num_sources, generator=generator, device="cpu") >= drop_prob
    while strategy == "subset" and not bool(kept.any()):
        kept = torch.rand(num_sources, generator=generator, device="cpu") >= drop_prob
    return kept.float() if strategy == "bernoulli_sum" else kept.float() / kept.sum()
