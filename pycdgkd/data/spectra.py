"""Power spectra that a cache keeps of its EEG, before and after filtering."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BINS = 65  # 0 to 64 Hz

Spectrum = npt.NDArray[np.float64]


def spectrum(signal: npt.NDArray[np.floating], rate: float) -> Spectrum:
    """Power (BINS,) at 0, 1, ..., 64 Hz of a signal (C, n), in its unit squared per hertz.

    Welch's mean over whole seconds under a Hann window, then the median over the channels, which
    one bad electrode does not move. NaN above half the rate, or when there is no whole second.
    """
    length = round(rate)
    count = signal.shape[1] // length
    power = np.full(BINS, np.nan)
    if count == 0 or signal.shape[0] == 0:
        return power
    window = np.hanning(length + 1)[:-1]
    seconds = signal[:, : count * length].reshape(signal.shape[0], count, length)
    seconds = (seconds - seconds.mean(axis=2, keepdims=True)) * window
    density = np.abs(np.fft.rfft(seconds, axis=2)) ** 2 * (2 / (length * np.square(window).sum()))
    mean = np.median(density.mean(axis=1), axis=0)
    bins = min(BINS, mean.size)
    power[:bins] = mean[:bins]
    return power
