"""The cases: their names, what they need at least, and that goals and plots find them."""

from __future__ import annotations

import fnmatch

import pytest

from pycdgkd.bench import plots
from pycdgkd.bench.cases import CASES, MIB, OPS, Case, select
from pycdgkd.bench.goals import GOALS
from pycdgkd.bench.lineup import RIVALS
from pycdgkd.errors import InputError

NAMES = [case.name for case in CASES]


def test_names_are_unique_and_tell_the_sizes() -> None:
    assert len(set(NAMES)) == len(NAMES)
    case = Case("distillation_loss", 4, 7, sources=8, inactive=4, layout="strided")
    assert case.name == "distillation_loss/N4-K7-S8-4off-strided"
    assert Case("teacher_loss", 8, 2, 16, modalities=2).name == "teacher_loss/N8-D16-K2"


@pytest.mark.parametrize(
    ("case", "least", "exps", "bound"),
    [
        (Case("prototype_loss", 16384, 2, 1024), 2 * 64 * MIB, 0, "bytes"),
        (Case("prototype_loss", 4096, 1000, 512), 2 * 8 * MIB, 0, "flops"),
        # Batch means read the features twice, unless they fit the cache.
        (Case("teacher_loss", 16384, 2, 1024, 2), 3 * 128 * MIB, 0, "bytes"),
        (Case("teacher_loss", 128, 2, 512, 2), MIB, 0, "overhead"),
        # Inactive sources are not read; one exponential a distribution, one for cross-entropy.
        (
            Case("distillation_loss", 1024, 1024, sources=8, inactive=4),
            6 * 4 * MIB,
            6 * MIB,
            "exps",
        ),
        (Case("multi_source_kl", 1024, 1024, sources=2), 4 * 4 * MIB, 3 * MIB, "exps"),
        (Case("convergence_rates", 1024, 2, 1024, 2), 2 * 4 * MIB, 0, "bytes"),
        (Case("teacher_loss", 16384, 2, 1024, 2, dtype="bfloat16"), 3 * 64 * MIB, 0, "bytes"),
    ],
)
def test_the_least_work(case: Case, least: int, exps: int, bound: str) -> None:
    assert (case.bytes, case.exps, case.bound) == (least, exps, bound)


def test_every_goal_and_every_panel_finds_its_cases() -> None:
    patterns = [goal.cases for goal in GOALS]
    patterns += [pattern for panel in plots.PANELS for pattern in panel.cases]
    for pattern in patterns:
        assert fnmatch.filter(NAMES, pattern), pattern
    compiled = {(c.name, f"{peer} compile") for c in CASES for peer in c.compiled}
    for goal in GOALS:
        if goal.peer.endswith(" compile"):
            assert (goal.cases, goal.peer) in compiled
        if goal.measure == "neighbour":
            assert all(c.neighbour for c in CASES if fnmatch.fnmatchcase(c.name, goal.cases))


def test_neighbours_are_plain_and_of_about_the_same_size() -> None:
    beside = [case for case in CASES if case.neighbour is not None]
    assert len(beside) >= 8
    for case in beside:
        assert case.neighbour is not None
        assert case.neighbour.layout == "contiguous"
        assert case.neighbour.inactive == 0
        assert 0.9 < case.neighbour.bytes / case.bytes < 1.1


def test_every_op_has_a_case_and_a_rival() -> None:
    assert {case.op for case in CASES} == set(OPS) == set(RIVALS)


def test_selection() -> None:
    assert select() == list(CASES)
    assert [c.name for c in select("*-S8-*", "distillation_loss")] == fnmatch.filter(
        NAMES, "*-S8-*"
    )
    quick = select(quick=True)
    assert 0 < len(quick) < len(CASES)
    assert all(case.quick for case in quick)
    assert len(select("teacher_loss/N33*", quick=True)) == 1


def test_a_selection_of_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no case matches 'x' of op 'teacher_loss'.*--list"):
        select("x", "teacher_loss")
    with pytest.raises(InputError, match="unknown op 'kl'; expected one of class_prototypes"):
        select(op="kl")
