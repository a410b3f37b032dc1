"""Every method of the tables is loaded instead of trained again, and gets no test sample.

What they learn is for test_nano_study.py to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass, replace

import pytest
import torch

from pycdgkd.data.splits import trial_split
from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.catalogue import METHODS, TABLES, find_method, shown_in
from pycdgkd.experiments.method import Method
from pycdgkd.training.recordings import Recordings

from .conftest import LEARNING

IN_TABLES = {row: METHODS[row] for table in TABLES.values() for row in table.rows}


@pytest.mark.parametrize("method", IN_TABLES.values(), ids=IN_TABLES)
def test_is_loaded_instead_of_trained_again(
    method: Method, open_bench: Callable[..., Bench], data: Recordings
) -> None:
    config = replace(LEARNING, optim=replace(LEARNING.optim, epochs=2))
    bench = open_bench(method, config)
    classifier = method.train(bench, method.settings)
    test = trial_split(data.cache.samples, seed=0, fractions=LEARNING.split.fractions).test
    logits = classifier.logits(data, test)
    assert logits.shape == (len(test), 2)
    assert classifier.parameters > 0
    with pytest.raises(InputError, match="leakage: a method asked for samples of the test split"):
        bench.data.batch(test[:1])
    # What was trained is taken up again, not trained anew, and gives the same answers.
    said: list[str] = []
    again = method.train(replace(open_bench(method, config), progress=said.append), method.settings)
    assert not [line for line in said if "epoch" in line]
    torch.testing.assert_close(again.logits(data, test), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", IN_TABLES.values(), ids=IN_TABLES)
def test_three_classes(method: Method, open_bench: Callable[..., Bench]) -> None:
    config = replace(LEARNING, label="mood", optim=replace(LEARNING.optim, epochs=1))
    bench = open_bench(method, config)
    classifier = method.train(bench, method.settings)
    assert classifier.logits(bench.data, bench.split.val).shape == (len(bench.split.val), 3)


def test_settings_are_frozen_and_described() -> None:
    for method in METHODS.values():
        assert is_dataclass(method.settings)
        assert method.settings.__dataclass_params__.frozen, method.name
        assert (type(method.settings).__doc__ or "").strip(), method.name


def test_tables_name_methods_that_there_are() -> None:
    for table in TABLES.values():
        assert set(table.rows) <= set(METHODS)
        assert table.interest in table.rows
        assert {name for name, _, _ in table.printed} <= set(table.rows)
    assert set(METHODS) - set(IN_TABLES) == {"cdgkd-noisy"}
    chosen = [METHODS[name] for name in ("cdgkd-noisy", "cdgkd", "eeg", "none")]
    assert shown_in(TABLES["table2"], chosen) == ["none", "cdgkd", "cdgkd-noisy"]
    with pytest.raises(InputError, match=r"unknown method 'fitnet'; nearest of .*: 'fitnets'"):
        find_method("fitnet")
