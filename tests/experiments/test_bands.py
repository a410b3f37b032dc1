from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import signal

from pycdgkd.errors import InputError
from pycdgkd.experiments.bands import BandPowers, log_band_power
from pycdgkd.training.recordings import Recordings

BANDS = ((0.0, 4.0), (4.0, 8.0), (8.0, 12.0), (12.0, math.inf))


@pytest.mark.parametrize(("length", "sfreq"), [(128, 64.0), (125, 100.0), (512, 128.0)])
def test_is_the_mean_of_the_periodogram_of_scipy(length: int, sfreq: float) -> None:
    eeg = np.random.default_rng(0).normal(3.0, 10.0, (2, 5, length))
    frequencies, density = signal.periodogram(eeg, sfreq, "hann", detrend="constant")
    expected = [
        np.log(
            density[..., (frequencies > 0) & (frequencies >= low) & (frequencies < high)].mean(-1)
        )
        for low, high in BANDS
    ]
    powers = log_band_power(torch.from_numpy(eeg), sfreq, BANDS)
    np.testing.assert_allclose(powers.numpy(), np.stack(expected, -1), rtol=1e-9)


def test_a_wave_shows_in_its_band_and_doubling_it_adds_log_four() -> None:
    time = torch.arange(256, dtype=torch.float64) / 128
    wave = (10 * (2 * math.pi * 10 * time).sin()).view(1, 1, -1)
    powers = log_band_power(wave, 128.0, BANDS)
    assert powers.argmax() == 2
    louder = log_band_power(2 * wave + 50, 128.0, BANDS)  # an offset tells nothing
    assert float(louder[0, 0, 2] - powers[0, 0, 2]) == pytest.approx(math.log(4))


def test_flat_segments_have_finite_powers() -> None:
    assert log_band_power(torch.zeros(1, 2, 64), 64.0, BANDS).isfinite().all()


@pytest.mark.parametrize("band", [(8.2, 8.9), (40.0, 50.0), (0.0, 0.5)])
def test_a_band_without_frequencies_is_refused(band: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="no frequency in it; expected a multiple of 1 up to 32"):
        log_band_power(torch.ones(1, 1, 64), 64.0, (band,))


def test_windows_slide_and_leave_the_remainder_out() -> None:
    eeg = torch.randn(2, 3, 150, dtype=torch.float64)
    powers = BandPowers(3, 64.0, BANDS, window=1.0, step=0.5)
    assert powers.count(150) == 3
    expected = [log_band_power(eeg[:, :, start : start + 64], 64.0, BANDS) for start in (0, 32, 64)]
    torch.testing.assert_close(powers.powers(eeg), torch.stack(expected, 1))
    with pytest.raises(InputError, match=r"segments of 63 samples .* hold no window of 64 samples"):
        powers(eeg[:, :, :63])


def test_statistics_standardise_the_train_split(data: Recordings) -> None:
    train = np.arange(0, 60)
    powers = BandPowers(28, data.cache.sfreq, BANDS, window=0.5, step=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        powers.set_statistics(data, train, 7)
    scores = powers(torch.from_numpy(data.cache.eeg[train])).double()
    torch.testing.assert_close(scores.mean((0, 1)), torch.zeros(28, 4).double(), atol=1e-4, rtol=0)
    deviation = scores.std((0, 1), correction=0)
    torch.testing.assert_close(deviation, torch.ones(28, 4).double(), atol=1e-4, rtol=0)
