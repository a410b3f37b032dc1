from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from pycdgkd.training import metrics

LABELS = np.array([0, 0, 0, 1, 1, 0, 1, 1, 0, 0])
PREDICTED = np.array([0, 1, 0, 1, 0, 0, 1, 1, 1, 0])


def test_figures_computed_by_hand() -> None:
    confusion = metrics.confusion_matrix(LABELS, PREDICTED, 2)
    assert confusion.tolist() == [[4, 2], [1, 3]]
    assert metrics.accuracy(confusion) == pytest.approx(7 / 10)
    assert metrics.balanced_accuracy(confusion) == pytest.approx((4 / 6 + 3 / 4) / 2)
    assert metrics.f1(confusion) == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_figures_agree_with_scikit_learn(num_classes: int) -> None:
    rng = np.random.default_rng(num_classes)
    labels, predicted = rng.integers(0, num_classes, (2, 200))
    confusion = metrics.confusion_matrix(labels, predicted, num_classes)
    average = "binary" if num_classes == 2 else "macro"
    assert metrics.accuracy(confusion) == pytest.approx(accuracy_score(labels, predicted))
    expected = balanced_accuracy_score(labels, predicted)
    assert metrics.balanced_accuracy(confusion) == pytest.approx(expected)
    assert metrics.f1(confusion) == pytest.approx(f1_score(labels, predicted, average=average))


def test_absent_classes() -> None:
    only_low = metrics.confusion_matrix(np.zeros(4, int), np.array([0, 0, 0, 1]), 2)
    assert metrics.balanced_accuracy(only_low) == pytest.approx(0.75)
    assert metrics.f1(only_low) == 0.0
    assert metrics.f1(metrics.confusion_matrix(np.zeros(4, int), np.zeros(4, int), 2)) == 0.0


def test_trial_confusions_keep_trials_apart_and_sum_to_the_whole() -> None:
    trials = [(2, 1), (1, 1), (1, 1), (1, 2), (2, 1), (1, 2), (1, 1), (1, 2), (2, 1), (1, 1)]
    each = metrics.trial_confusions(LABELS, PREDICTED, trials, 2)
    assert each.sum(0).tolist() == metrics.confusion_matrix(LABELS, PREDICTED, 2).tolist()
    first = np.array([trial == (1, 1) for trial in trials])
    expected = metrics.confusion_matrix(LABELS[first], PREDICTED[first], 2)
    assert each[0].tolist() == expected.tolist()
    assert len(each) == 3


def test_interval_has_the_width_of_independent_trials() -> None:
    """100 trials of 20 equal windows, 70 right: the error is that of 100 answers, not of 2000."""
    right = np.repeat(np.arange(100) < 70, 20)
    labels = np.zeros(2000, int)
    trials = [(1, int(t)) for t in np.repeat(np.arange(100), 20)]
    each = metrics.trial_confusions(labels, 1 - right.astype(int), trials, 2)
    figures = metrics.score(each, seed=0)["accuracy"]
    assert figures["value"] == pytest.approx(0.7)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 100)
    assert figures["low"] == pytest.approx(0.7 - half, abs=0.015)
    assert figures["high"] == pytest.approx(0.7 + half, abs=0.015)


def test_same_seed_same_interval() -> None:
    each = metrics.trial_confusions(LABELS, PREDICTED, [(1, i // 2) for i in range(10)], 2)
    assert metrics.score(each, 3) == metrics.score(each, 3)
    assert metrics.score(each, 3) != metrics.score(each, 4)


def test_paired_difference() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    trials = [(1, i // 4) for i in range(400)]
    ours = np.where(rng.random(400) < 0.9, labels, 1 - labels)
    theirs = np.where(rng.random(400) < 0.6, labels, 1 - labels)
    a, b = (metrics.trial_confusions(labels, answer, trials, 2) for answer in (ours, theirs))
    gain = metrics.accuracy_difference(a, b, 0)
    assert gain["value"] == pytest.approx((ours == labels).mean() - (theirs == labels).mean())
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert metrics.accuracy_difference(a, a, 0) == {"value": 0.0, "low": 0.0, "high": 0.0}
