"""The statistics on made-up times, and the rounds."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
import torch

from pycdgkd.bench import timing
from pycdgkd.bench.contestants import Contestant
from pycdgkd.bench.records import Spread


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_quantiles_are_numpys(share: float, count: int) -> None:
    values = np.random.default_rng(0).normal(size=count).tolist()
    assert timing.quantile(values, share) == pytest.approx(np.quantile(values, share))


def test_ratios_are_formed_within_a_round() -> None:
    """The machine is ten times slower in the second round: the ratio does not notice."""
    ours = [{"forward": 1.0, "backward": 1.0, "both": 2.0}] * 2
    ours.append({"forward": 10.0, "backward": 10.0, "both": 20.0})
    other = [{"forward": 3.0, "both": 4.0}, {"forward": 3.0, "both": 4.0}]
    other.append({"forward": 30.0, "both": 40.0})
    found = timing.ratios({"ours": ours, "other": other}, "ours", "other")
    assert found == {"forward": Spread(3.0, 3.0, 3.0), "both": Spread(2.0, 2.0, 2.0)}
    assert timing.summarise(ours)["both"] == Spread(2.0, 2.0, pytest.approx(16.4))


def test_a_sample_tells_forward_from_backward() -> None:
    ticks = iter(itertools.accumulate([0.0, 1.0, 3.0] * 4))  # forward 1 s, backward 3 s, 0 between
    freed: list[int] = []

    class State:
        def __del__(self) -> None:
            freed.append(len(calls))

    calls: list[State] = []
    one = Contestant("one", State, lambda state: calls.append(id(state)) or [])  # type: ignore[func-returns-value,arg-type]
    sample = timing._sample(one, 4, lambda: next(ticks))
    assert sample == {"forward": 1.0, "backward": 3.0, "both": 4.0}
    assert freed == [1, 2, 3, 4]  # each state is freed within its own step


def test_without_a_backward_there_is_no_such_phase() -> None:
    sample = timing._sample(Contestant("one", lambda: 0, None), 2)
    assert set(sample) == {"forward", "both"}
    assert set(timing.summarise([sample])) == {"forward", "both"}


def test_rounds_are_interleaved_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)  # one step a sample
    seen: list[tuple[str, int]] = []

    def contestant(name: str, threads: int) -> Contestant:
        return Contestant(
            name, lambda: seen.append((name, torch.get_num_threads())), None, threads=threads
        )

    threads, collecting = torch.get_num_threads(), gc.isenabled()
    contestants = [contestant("a", 1), contestant("b", 2), contestant("c", 1)]
    tick_by_seconds(monkeypatch)
    samples = timing.time_together(contestants, budget=3.0)
    assert (torch.get_num_threads(), gc.isenabled()) == (threads, collecting)
    assert {name: len(found) for name, found in samples.items()} == dict.fromkeys(
        "abc", timing.FEWEST_ROUNDS
    )
    timed = seen[-3 * timing.FEWEST_ROUNDS :]
    rounds = [tuple(name for name, _ in timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1
    assert set(seen) == {("a", 1), ("b", 2), ("c", 1)}


def tick_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every round take one second of the budget."""
    seconds = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(seconds)))


@pytest.mark.parametrize(
    ("budget", "rounds"),
    [(0.5, timing.SLOW_ROUNDS), (3.0, timing.FEWEST_ROUNDS), (9.5, 9), (1e6, timing.MOST_ROUNDS)],
)
def test_the_budget_sets_the_rounds(
    budget: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick_by_seconds(monkeypatch)
    one = Contestant("one", lambda: 0, None)
    assert len(timing.time_together([one], budget)["one"]) == rounds
