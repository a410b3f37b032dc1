from __future__ import annotations

import numpy as np
import pytest

from pycdgkd.experiments.late_fusion import LateFusion, best_weight, fuse
from pycdgkd.training.recordings import Indices, Recordings


def one_hot(labels: np.ndarray, sure: float = 0.9) -> np.ndarray:
    table = np.full((len(labels), 3), (1 - sure) / 2)
    table[np.arange(len(labels)), labels] = sure
    return table


def test_the_better_classifier_gets_the_weight() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    good, bad = one_hot(labels), one_hot((labels + 1) % 3)
    assert best_weight(good, bad, labels) == (1.0, 1.0)
    assert best_weight(bad, good, labels) == (0.0, 1.0)


def test_classifiers_that_err_apart_do_better_together() -> None:
    labels = np.array([0, 0, 1, 1])
    video = np.array([[0.9, 0.1], [0.45, 0.55], [0.2, 0.8], [0.55, 0.45]])
    eeg = np.array([[0.45, 0.55], [0.9, 0.1], [0.55, 0.45], [0.2, 0.8]])
    weight, accuracy = best_weight(video, eeg, labels)
    assert (video.argmax(1) == labels).mean() == (eeg.argmax(1) == labels).mean() == 0.5
    assert accuracy == 1.0
    # Ties of accuracy are settled by the likelihood of the labels, which a finer grid confirms.
    likelihood = [
        np.log(fuse(video, eeg, w)[np.arange(4), labels]).sum() for w in np.linspace(0, 1, 1001)
    ]
    assert weight == pytest.approx(np.argmax(likelihood) / 1000, abs=0.006)


def test_logits_are_the_logarithms_of_the_fused_probabilities(data: Recordings) -> None:
    indices = np.arange(8)

    def guess(recordings: Recordings, places: Indices) -> np.ndarray:
        return np.tile([0.25, 0.75], (len(recordings.labels[places]), 1))

    def sure(recordings: Recordings, places: Indices) -> np.ndarray:
        return np.eye(2)[recordings.labels[places]]

    fusion = LateFusion.fit(guess, sure, data, indices)
    assert fusion.val_accuracy == 1.0
    expected = fuse(guess(data, indices), sure(data, indices), fusion.weight)
    logits = fusion.logits(data, indices)
    assert logits.isfinite().all()  # a certain zero has no logarithm
    np.testing.assert_allclose(logits.exp().numpy(), expected, atol=1e-6)
