"""benchmarks/README.md says what the stored records say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pycdgkd.bench import records
from pycdgkd.bench.records import Run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def render_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", BENCHMARKS / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_in_step_with_the_records() -> None:
    assert render_module().main(["--check"]) == 0


def test_a_record_changes_the_table(
    record: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = render_module()
    (tmp_path / "results").mkdir()
    text = f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert "No results are stored yet." in render.rendered(tmp_path)
    records.save(record, tmp_path / "results" / "some-cpu.json")
    found = render.rendered(tmp_path)
    assert found.startswith("before\n")
    assert found.endswith("\nafter\n")
    assert "## some-cpu\n" in found
    assert "Goals: 2 of 5 met" in found
    assert "old" not in found
    monkeypatch.setattr(render, "HERE", tmp_path)
    assert render.main(["--check"]) == 1
    pytest.importorskip("matplotlib")
    assert render.main([]) == 0
    assert render.main(["--check"]) == 0
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "![some-cpu-ratios](results/some-cpu-ratios.svg)" in written
