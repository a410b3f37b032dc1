"""Log band powers of EEG: what networks and machines are given that do not see raw EEG."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pycdgkd.errors import InputError
from pycdgkd.training.recordings import Indices, Recordings

Bands = tuple[tuple[float, float], ...]

# Of a segment that is flat (a digital zero), whose power has no logarithm. Amplifiers' noise is
# orders above.
_FLOOR = 1e-12  # microvolts squared per hertz


def log_band_power(eeg: Tensor, sfreq: float, bands: Bands) -> Tensor:
    """Natural logarithm of the mean power density in each band, (..., L) -> (..., F).

    eeg: microvolts at ``sfreq`` Hz. bands: [low, high) in Hz; an infinite high reaches to half the
    rate. The density (microvolts squared per hertz) is the one-sided periodogram of the segment
    without its mean under a Hann window. Up to a factor and a constant this is the differential
    entropy of a Gaussian signal in the band, so that standardised they are one.

    ``InputError`` for a band without any frequency, which a longer segment or higher rate has.
    """
    length = eeg.shape[-1]
    frequencies = torch.fft.rfftfreq(length, 1 / sfreq, dtype=torch.float64).tolist()
    window = torch.hann_window(length, dtype=eeg.dtype, device=eeg.device)
    spectrum = torch.fft.rfft((eeg - eeg.mean(-1, keepdim=True)) * window)
    density = spectrum.abs().square() * (2 / (sfreq * window.square().sum()))
    if length % 2 == 0:
        density[..., -1] /= 2  # half the rate has no negative twin
    powers = []
    for low, high in bands:
        # The mean is gone, and with it what 0 Hz could tell.
        bins = [i for i, f in enumerate(frequencies) if max(low, 1e-9) <= f < high]
        if not bins:
            raise InputError(
                f"band {low:g} to {high:g} Hz: {length} EEG samples at {sfreq:g} Hz have no "
                f"frequency in it; expected a multiple of {sfreq / length:g} up to {sfreq / 2:g}; "
                "remedy: a longer window, or a cache with longer segments or a higher rate"
            )
        powers.append(density[..., bins[0] : bins[-1] + 1].mean(-1))
    return torch.stack(powers, dim=-1).clamp(min=_FLOOR).log()


class BandPowers(nn.Module):
    """Standardised log band powers in sub-windows: (B, C, L) microvolts -> (B, W, C, F).

    W windows of ``window`` seconds begin ``step`` seconds apart; a remainder is left out. Mean and
    deviation of each channel and band belong to the state dict (``set_statistics``; until then 0
    and 1).

    ``InputError`` for a segment shorter than the window.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, n_chans: int, sfreq: float, bands: Bands, *, window: float, step: float
    ) -> None:
        super().__init__()
        self.sfreq, self.bands = sfreq, bands
        self.length, self.step = round(window * sfreq), max(1, round(step * sfreq))
        self.register_buffer("mean", torch.zeros(n_chans, len(bands)))
        self.register_buffer("std", torch.ones(n_chans, len(bands)))

    def count(self, n_times: int) -> int:
        """W for segments of ``n_times`` samples."""
        if not 1 <= self.length <= n_times:
            raise InputError(
                f"EEG segments of {n_times} samples at {self.sfreq:g} Hz hold no window of "
                f"{self.length} samples; expected windows that fit; remedy: another window, or a "
                "cache with longer segments"
            )
        return (n_times - self.length) // self.step + 1

    def powers(self, eeg: Tensor) -> Tensor:
        """Log band powers as they are, (B, W, C, F)."""
        self.count(eeg.shape[2])
        windows = eeg.unfold(2, self.length, self.step).transpose(1, 2)
        return log_band_power(windows, self.sfreq, self.bands)

    def forward(self, eeg: Tensor) -> Tensor:
        """Log band powers standardised for each channel and band, (B, W, C, F)."""
        return (self.powers(eeg) - self.mean) / self.std

    @torch.no_grad()
    def set_statistics(self, data: Recordings, indices: Indices, size: int) -> None:
        """Mean and deviation over the windows of these samples, ``size`` samples at a time."""
        total = torch.zeros(self.mean.shape, dtype=torch.float64)
        squares, count = torch.zeros_like(total), 0
        for _, batch in data.batches(indices, size):
            powers = self.powers(batch.eeg).flatten(0, 1).cpu().double()
            total += powers.sum(0)
            squares += powers.square().sum(0)
            count += len(powers)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0.0).sqrt()
        self.mean.copy_(mean)
        # What does not vary tells nothing, and stays near 0.
        self.std.copy_(std.where(std > 1e-6, torch.ones(())))
