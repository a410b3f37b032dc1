from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from pycdgkd.errors import InputError
from pycdgkd.experiments.bands import log_band_power
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.methods import cnn_svm
from pycdgkd.experiments.methods.cnn_svm import (
    BANDS,
    ELECTRODES,
    BandSVM,
    CNNSVMSettings,
    FaceCNN,
    Platt,
    Series,
    share_out,
)
from pycdgkd.training.recordings import Recordings

from .conftest import LEARNING


def face_cnn(classes: int = 3) -> FaceCNN:
    torch.manual_seed(0)
    return FaceCNN(classes, 0.5).eval()


def test_a_sample_is_the_mean_over_its_valid_frames() -> None:
    net = face_cnn()
    video = torch.randint(0, 256, (2, 3, 3, 30, 30), dtype=torch.uint8)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    single = [net(video[i : i + 1, t : t + 1]).logits.exp() for i, t in ((0, 0), (0, 1), (0, 2))]
    p = net(video, mask).logits.exp()
    torch.testing.assert_close(p[0], torch.cat(single).mean(0))
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    shorter = net(video[1:, [0, 2]]).logits.exp()
    torch.testing.assert_close(p[1], shorter[0])


def test_masked_frames_are_not_read_and_carry_no_gradient() -> None:
    net = face_cnn()
    video = torch.rand(2, 2, 3, 20, 20)
    video[0, 1] = math.nan
    mask = torch.tensor([[True, False], [True, True]])
    net(video, mask).logits[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with pytest.raises(InputError, match=r"samples \[1\] of the batch .* no valid frame"):
        net(video, torch.tensor([[True, True], [False, False]]))


def test_faces_are_grey_minus_the_mean_face_of_training(data: Recordings) -> None:
    net = face_cnn(2)
    train = np.arange(40)
    net.set_mean(data, train, 16)
    frames = np.asarray(data.cache.video[train])[data.cache.frame_mask[train]]
    grey = np.tensordot(frames.astype(np.float64), [0.299, 0.587, 0.114], (1, 0)) / 255
    mean = torch.from_numpy(grey.mean(0))[None, None]
    resized = torch.nn.functional.interpolate(mean, (48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(net.mean_face.double(), resized[0], atol=1e-6, rtol=1e-5)
    # What every frame shows alike is taken off: a grey tint of all of them changes nothing.
    tinted = FaceCNN(2, 0.5).eval()
    tinted.load_state_dict(net.state_dict())
    tinted.mean_face += 0.1
    video = torch.rand(3, 2, 3, 24, 24)
    torch.testing.assert_close(tinted(video + 0.1).logits, net(video).logits, atol=1e-5, rtol=1e-5)


def test_the_published_electrodes_are_taken_by_name() -> None:
    channels = ["CZ ", "Fz", *(name for name in ELECTRODES if name != "Cz")]
    series = Series.of(channels)
    assert series.published
    assert [channels[i].strip().casefold() for i in series.electrodes] == [
        name.casefold() for name in ELECTRODES
    ]
    eeg = torch.randn(2, len(channels), 64)
    features = series.features(eeg, 64.0)
    assert features.shape == (2, 85)  # 17 series x 5 bands
    difference = eeg[:, channels.index("T7")] - eeg[:, channels.index("T8")]
    expected = log_band_power(difference[:, None], 64.0, BANDS)[:, 0]
    torch.testing.assert_close(features.view(2, 17, 5)[:, 14], expected)


def test_without_them_all_electrodes_are_taken() -> None:
    series = Series.of(["Fp1", "Fp2", "T7", "O1"])
    assert not series.published
    assert series.electrodes == [0, 1, 2, 3]
    assert series.pairs == [(0, 1)]
    assert Series.of(["C0", "C1"]).features(torch.randn(3, 2, 64), 64.0).shape == (3, 10)


def test_platt_minimises_the_cross_entropy_of_smoothed_targets() -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(60) < 0.4
    decisions = rng.normal(size=60) + positive
    platt = Platt.fit(decisions, positive)
    high, low = (positive.sum() + 1) / (positive.sum() + 2), 1 / ((~positive).sum() + 2)
    # At the minimum the residuals vanish in sum, and in sum weighted by the decisions.
    residual = platt(decisions) - np.where(positive, high, low)
    assert abs(residual.sum()) < 1e-3
    assert abs((residual * decisions).sum()) < 1e-3


@pytest.mark.parametrize("outcome", [True, False])
def test_platt_does_with_a_single_class(outcome: bool) -> None:
    platt = Platt.fit(np.linspace(-1, 1, 9), np.full(9, outcome))
    np.testing.assert_allclose(platt(np.zeros(1)), 10 / 11 if outcome else 1 / 11, atol=1e-3)
    assert np.isfinite(platt(np.array([-1e6, 1e6]))).all()


def test_one_versus_rest_is_shared_out() -> None:
    np.testing.assert_allclose(share_out([np.array([0.3])]), [[0.7, 0.3]])
    ones = [np.array([0.2, 0.0]), np.array([0.2, 0.0]), np.array([0.4, 0.0])]
    np.testing.assert_allclose(share_out(ones), [[0.25, 0.25, 0.5], [1 / 3, 1 / 3, 1 / 3]])


def test_machines_are_standardised_on_training_and_scaled_on_validation(
    open_bench: Callable[..., Bench],
) -> None:
    bench = open_bench(cnn_svm.METHOD)
    machine = BandSVM.fit(bench, CNNSVMSettings())
    assert len(machine.machines) == 1
    eeg = torch.from_numpy(np.array(bench.data.cache.eeg))
    table = machine.series.features(eeg, bench.data.cache.sfreq).double().numpy()
    train, val = bench.split.train, bench.split.val
    mean, std = table[train].mean(0), table[train].std(0)
    scores = (table - mean) / std
    svc = SVC(C=15.0).fit(scores[train], bench.data.labels[train] == 1)
    decisions = svc.decision_function(scores[val])
    expected = Platt.fit(decisions, bench.data.labels[val] == 1)(decisions)
    p = machine.probabilities(bench.data, val)
    np.testing.assert_allclose(p[:, 1], expected, atol=1e-4)
    np.testing.assert_allclose(p.sum(1), 1.0)
    assert (p.argmax(1) == bench.data.labels[val]).mean() > 0.7


def test_three_classes_have_three_machines(open_bench: Callable[..., Bench]) -> None:
    bench = open_bench(cnn_svm.METHOD, replace(LEARNING, label="mood"))
    machine = BandSVM.fit(bench, CNNSVMSettings())
    assert len(machine.machines) == len(machine.scales) == 3
    p = machine.probabilities(bench.data, bench.split.train)
    np.testing.assert_allclose(p.sum(1), 1.0)
    assert (p.argmax(1) == bench.data.labels[bench.split.train]).mean() > 0.9


def test_both_modalities_are_fused(
    open_bench: Callable[..., Bench], data: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench(cnn_svm.METHOD)
    bench.config = replace(bench.config, optim=replace(bench.config.optim, epochs=1))
    # A face network that knows nothing: the machines carry the decision alone.
    monkeypatch.setattr(Bench, "logits", lambda *args: torch.zeros(len(args[3]), 2))
    classifier = cnn_svm.train(bench, CNNSVMSettings())
    assert any("weight of the face 0" in note for note in classifier.notes)
    assert any("all electrodes" in note for note in classifier.notes)
    test = np.setdiff1d(np.arange(len(data.labels)), [*bench.split.train, *bench.split.val])
    logits = classifier.logits(data, test)
    assert (logits.argmax(1).numpy() == data.labels[test]).mean() > 0.7
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(len(test)))


def test_settings_that_cannot_be_meant() -> None:
    with pytest.raises(InputError, match="c: expected a finite number above 0; got 0"):
        CNNSVMSettings(c=0)
    with pytest.raises(InputError, match="dropout: expected a number from 0 to below 1; got 1"):
        CNNSVMSettings(dropout=1)
