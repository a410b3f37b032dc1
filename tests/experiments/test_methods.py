"""Every method of the tables trains on the small cache, and is better than chance there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pycdgkd.data.splits import trial_split
from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.method import Method
from pycdgkd.experiments.methods import distilled, multimodal
from pycdgkd.training.recordings import Recordings

from .conftest import QUICK

METHODS = [
    *(distilled.ALONE, distilled.KD, distilled.TAKD, distilled.DGKD),
    *(distilled.CDGKD_ALL, distilled.CDGKD),
    *(multimodal.VIDEO, multimodal.EEG, multimodal.FUSION, multimodal.REBALANCED),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_learns(method: Method, open_bench: Callable[..., Bench], data: Recordings) -> None:
    bench = open_bench(method)
    classifier = method.train(bench, method.settings)
    test = trial_split(data.cache.samples, seed=0, fractions=QUICK.split.fractions).test
    right = classifier.logits(data, test).argmax(1).numpy() == data.labels[test]
    assert right.mean() > 0.7
    assert classifier.val_accuracy > 0.6
    with pytest.raises(InputError, match="leakage: a method asked for samples of the test split"):
        bench.data.batch(test[:1])
