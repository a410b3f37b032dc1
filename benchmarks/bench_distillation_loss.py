"""distillation_loss: raw kernels, op, public function, timed apart."""

from __future__ import annotations

from harness import every_layer, time_layer
from pytest_benchmark.fixture import BenchmarkFixture

from pycdgkd.bench.cases import Case


@every_layer("distillation_loss")
def test_distillation_loss(benchmark: BenchmarkFixture, case: Case, layer: str, phase: str) -> None:
    time_layer(benchmark, case, layer, phase)
