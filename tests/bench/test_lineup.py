"""Every contestant of every case, in a small size, computes what the reference says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pycdgkd.bench import inputs as inputs_module
from pycdgkd.bench import run
from pycdgkd.bench.cases import CASES, Case
from pycdgkd.bench.contestants import Contestant
from pycdgkd.bench.inputs import exact_result, largest_error, make_inputs
from pycdgkd.bench.lineup import installed_peers, lineup
from pycdgkd.bench.table import WHO

EAGER = {
    "teacher_loss": {"T1", "T2", "T3", "T4"},
    "prototype_loss": {"literal", "cdist", "addmm"},
    "class_prototypes": {"one-hot", "index_add"},
    "convergence_rates": {"addmm"},
    "multi_source_kl": {"D1", "D3", "D4"},
    "distillation_loss": {"D1", "D3", "D4"},
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contestants_agree_with_the_reference(case: Case) -> None:
    small = dataclasses.replace(case.shrunk(), skipped=())
    inputs = make_inputs(small)
    contestants = lineup(inputs, compiled=False)
    names = {one.name for one in contestants}
    assert {"pycdgkd", "op"} | EAGER[case.op] <= names
    assert names - {"pycdgkd", "op", "kernel"} <= set(WHO)
    assert {f"{name} compile" for name in case.compiled} <= set(WHO)
    assert ("kernel" in names) == (case.dtype != "bfloat16")
    limit = 1e-4 if case.dtype == "float32" else 1e-2
    for one, error in run.checked(small, inputs, contestants):
        assert isinstance(error, float), (one.name, error)
        assert error < limit, one.name


def test_installed_packages_and_new_torch_take_part() -> None:
    def names(case: Case) -> set[str]:
        return {one.name for one in lineup(make_inputs(case), compiled=False)}

    prototypes = names(Case("prototype_loss", 8, 3, 5))
    assert ("ProxyNCA" in prototypes) == installed_peers()["pytorch_metric_learning"]
    has_fused = hasattr(torch.nn.functional, "linear_cross_entropy")
    assert ({"lce", "lce auto"} <= prototypes) == has_fused
    distilled = names(Case("distillation_loss", 8, 3, sources=2, direction="forward"))
    assert ("torchdistill" in distilled) == installed_peers()["torchdistill"]
    assert "D2" in distilled


def test_a_bound_is_timed_but_computes_no_loss_to_check() -> None:
    case = Case("prototype_loss", 8192, 100, 64)
    inputs = make_inputs(case)
    contestants = lineup(inputs, compiled=False)
    errors = {one.name: error for one, error in run.checked(case, inputs, contestants)}
    assert case.bound == "flops"
    assert errors["gemm"] is None
    assert run._may_be_timed(case, errors["gemm"])


def test_a_neighbour_is_checked_on_its_own_inputs() -> None:
    case = Case("prototype_loss", 8, 3, 5, neighbour=Case("prototype_loss", 9, 3, 5))
    ((one, error),) = run._with_neighbour(case, 1)
    assert (one.name, one.layer) == ("neighbour", "neighbour")
    assert one.backward is not None
    assert one.backward(one.forward())[0].shape == (9, 5)
    assert isinstance(error, float)
    assert error < 1e-5


def test_compiled_peers_agree_with_the_reference() -> None:
    case = Case("distillation_loss", 16, 3, sources=2, compiled=("D1",))
    inputs = make_inputs(case)
    (compiled,) = (one for one in lineup(inputs) if one.name.endswith("compile"))
    assert compiled.name == "D1 compile"
    assert largest_error(compiled.result(), exact_result(inputs, case.op)) < 1e-5


@pytest.mark.parametrize("layout", ["strided", "unaligned"])
def test_layouts_change_the_memory_and_not_the_numbers(layout: str) -> None:
    case = Case("teacher_loss", 16, 2, 24, 2)
    plain, other = make_inputs(case), make_inputs(dataclasses.replace(case, layout=layout))
    for a, b in zip(plain.features, other.features, strict=True):
        assert torch.equal(a, b)
        assert b.is_leaf
        assert b.requires_grad
        assert b.is_contiguous() == (layout == "unaligned")
        assert (b.data_ptr() % 64 == a.data_ptr() % 64) == (layout == "strided")


@pytest.mark.parametrize("value_of", ["teacher_loss", "teacher_loss through means"])
def test_the_matrix_form_is_the_reference(value_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large cases are held against equals the broadcast differences of the reference."""
    inputs = make_inputs(Case("teacher_loss", 40, 3, 24, 2))
    exact = exact_result(inputs, value_of)
    monkeypatch.setattr(inputs_module, "BROADCAST_LIMIT", 5 * 3 * 24)  # five rows are compared
    assert largest_error(exact_result(inputs, value_of), exact) < 1e-10


def test_the_teacher_equals_the_whole_reference() -> None:
    from pycdgkd import reference

    inputs = make_inputs(Case("teacher_loss", 40, 3, 24, 2)).double()
    loss = reference.teacher_loss(inputs.logits, inputs.features, inputs.labels)[0]
    grads = torch.autograd.grad(loss, inputs.leaves)
    assert largest_error((loss, grads), exact_result(inputs, "teacher_loss")) < 1e-12


def test_a_wrong_result_of_ours_stops_and_a_peers_is_left_out() -> None:
    case = Case("distillation_loss", 16, 3, sources=2)
    inputs = make_inputs(case)
    wrong = Contestant("off", lambda: torch.tensor(1.0), lambda _: [torch.zeros(16, 3)])
    (_, error), *_ = run.checked(case, inputs, [wrong])
    assert isinstance(error, float)
    assert error > run.tolerance(case)
    entry = run._entry(wrong, error, {})
    assert (entry.seconds, entry.ratio) == ({}, {})
    with pytest.raises(RuntimeError, match=r"distillation_loss/N16-K3-S2: off: wrong result"):
        run.checked(case, inputs, [dataclasses.replace(wrong, layer="op")])


def test_a_failing_peer_is_told_and_ours_stops() -> None:
    def broken() -> None:
        raise OSError("no compiler here")

    case = Case("distillation_loss", 16, 3, sources=2)
    inputs = make_inputs(case)
    peer = Contestant("D1 compile", broken, None)
    ((_, verdict),) = run.checked(case, inputs, [peer])
    assert verdict == "OSError: no compiler here"
    assert not run._may_be_timed(case, verdict)
    assert run._entry(peer, verdict, {}).failure == verdict
    with pytest.raises(OSError, match="no compiler here"):
        run.checked(case, inputs, [dataclasses.replace(peer, layer="public")])


def test_errors_count_nan_and_missing_gradients() -> None:
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert largest_error((torch.tensor([1.0, float("nan")]), []), (one, [])) == float("inf")
    assert largest_error((one, [None]), (one, [zero])) == 0.0
    assert largest_error((one, [None]), (one, [one])) == 1.0
    assert largest_error((1.5 * one, []), (one, [])) == 0.5
