"""The GPU benchmark's plan, contestants and verdicts, tried on the CPU in small sizes."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with the CPU in the device's place."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def timed(one: Any, _: Any = None) -> float:
        began = time.perf_counter()
        for _ in range(one.calls):
            one.call()
        return (time.perf_counter() - began) / (one.calls * one.steps)

    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "events", timed)
    monkeypatch.setattr(module, "replayed", lambda step, _: module.Sampled(step))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(module, "kernels", lambda _: {"launches": 2.0, "seconds": 1e-6})
    return module


def test_every_case_is_measured_and_judged(gpu: ModuleType) -> None:
    results: dict[str, Any] = {}
    for case, goals in gpu.CASES:
        small = case.shrunk()
        results[case.name] = gpu.measure(small, 1e12, 0.01, torch.empty(1))
        measured = results[case.name]
        assert {gpu.OURS} < set(measured["eager"]) or case.skipped
        lines = gpu.judged(measured, goals, results)
        assert len(lines) == len(goals)
        compiled = [line for line in lines if "default" in line]
        assert all("not measured" in line for line in compiled)  # shrunk cases compile nothing
        optional = [line for line in lines if "lce" in line or "Liger" in line]
        assert all("not measured" not in line for line in lines
                   if line not in compiled + optional)  # fmt: skip


def test_compiled_peers_take_part(gpu: ModuleType) -> None:
    case = next(case for case, _ in gpu.CASES if case.compiled)
    steps = gpu.contestants(gpu.make_inputs(case), ("default",))
    assert "T4 default" in steps


def test_verdicts(gpu: ModuleType) -> None:
    def entry(seconds: float, ratio: float = 1.0) -> dict[str, float]:
        return {"seconds": seconds, "ratio": ratio}

    result = {
        "floor": 9e-6,
        "eager": {gpu.OURS: entry(2e-5), "T4": entry(1e-4, 5.0)},
        "graph": {gpu.OURS: entry(1e-5)},
    }
    goals = [gpu.Goal("eager", "T4", 8.0), gpu.Goal("bandwidth", "", 0.8),
             gpu.Goal("graph us", "", 12.0), gpu.Goal("graph", "T4", 1.5)]  # fmt: skip
    lines = gpu.judged(result, goals, {})
    assert "5.00, goal >= 8: MISSED" in lines[0]
    assert "0.90, goal >= 0.8: met" in lines[1]
    assert "10.00, goal <= 12: met" in lines[2]
    assert "not measured" in lines[3]


def test_a_wrong_result_is_not_timed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "largest_error", lambda *_: 1.0)
    case = gpu.CASES[0][0].shrunk()
    with pytest.raises(AssertionError, match="ours is wrong"):
        gpu.measure(case, 1e12, 0.01, torch.empty(1))


def test_the_table_of_a_record(gpu: ModuleType) -> None:
    spec = importlib.util.spec_from_file_location("gpu_table", SCRIPT.with_name("gpu_table.py"))
    assert spec is not None
    assert spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    case, goals = gpu.CASES[0]
    result = gpu.measure(case.shrunk(), 1e12, 0.01, torch.empty(1))
    result["goals"] = gpu.judged(result, goals, {})
    record = {"versions": {"gpu": "A GPU", "torch": "2"}, "copy": 1e12, "failed": ["x: broke"],
              "cases": {case.name: result}}  # fmt: skip
    assert table.is_gpu_record(record)
    assert not table.is_gpu_record({"versions": {"torch": "2"}})
    text = table.report(record)
    assert f"| `{case.name}` |" in text
    assert "not measured: x: broke" in text
    met, judged = table.verdicts(record)
    assert 0 <= met <= judged == len(goals) - 2  # compiled peers are not there in small


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_claimed(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 1
    assert "nothing was measured" in capsys.readouterr().out
