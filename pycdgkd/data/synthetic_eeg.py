"""Drawn EEG: 1/f background, rhythms that carry the emotion, and a recorder's artefacts.

What is put in, and what an honest pipeline can get out again:

* valence: the alpha rhythm (8-13 Hz) of the right minus the left hemisphere, strongest over the
  frontal pairs (F4/F3, AF4/AF3, F8/F7, ...), grows with the valence evidence of the trial;
* arousal: beta power (14-30 Hz) grows and alpha power falls on every electrode;
* nuisance: 1/f noise (partly common to the scalp), alpha frequency, size and resting asymmetry of
  each subject, blinks, white noise, 50 Hz mains, and an electrode offset of up to 15 mV as
  DC-coupled BioSemi amplifiers record it.

Recordings are in microvolts at 512 Hz; events carry DEAP's codes in the low byte of Status, over
the high bits found in real files (idle 0x19FF00, with an event 0x18FF00).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import require

from .config import StudyConfig

Signal = npt.NDArray[np.float32]

RATE = 512
# The order of the DEAP recordings made in Twente (subjects 1-22).
EEG_NAMES = (
    "Fp1", "AF3", "F7", "F3", "FC1", "FC5", "T7", "C3",
    "CP1", "CP5", "P7", "P3", "Pz", "PO3", "O1", "Oz", "O2", "PO4", "P4", "P8",
    "CP6", "CP2", "C4", "T8", "FC6", "FC2", "F4", "F8", "AF4", "Fp2", "Fz", "Cz",
)  # fmt: skip
PERIPHERALS = (
    "EXG1", "EXG2", "EXG3", "EXG4", "EXG5", "EXG6", "EXG7", "EXG8",
    "GSR1", "GSR2", "Erg1", "Erg2", "Resp", "Plet", "Temp",
)  # fmt: skip
IDLE, EVENT = 0x19FF00, 0x18FF00
PULSE = 4  # samples for which an event code stands
START, SYNC, FIXATION, VIDEO, POST, END = 1, 2, 3, 4, 5, 7
# Share of the valence effect by the electrode's letters: frontal most, occipital none.
ASYMMETRY = {"Fp": 0.8, "AF": 1.0, "F": 1.0, "FC": 0.9, "C": 0.5, "T": 0.6, "CP": 0.3, "P": 0.15}
VALENCE_GAIN = 1.3  # log ratio of right to left frontal alpha power at full evidence
AROUSAL_GAIN = 0.9  # log gain of beta power, and half of it loss of alpha power, at full evidence
BITS = 1 / 32  # microvolts per step of the 24-bit converter (2**19 uV over 2**24 steps)


@dataclass(frozen=True)
class Timeline:
    """Sample numbers of one recording: (sample, code) events, trial starts and the length."""

    events: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    length: int


def plan_timeline(config: StudyConfig, rng: np.random.Generator) -> Timeline:
    """DEAP's sequence of screens: 1 start, 1 rest, 2 sync, per trial 3 4 5 1, then 2 and 7.

    Rest, sync and rating screens are shortened; the time that a rating takes differs each time.
    """
    events: list[tuple[int, int]] = [(RATE, START), (2 * RATE, START), (4 * RATE, SYNC)]
    starts: list[int] = []
    now = 5 * RATE
    for _ in range(config.trials):
        events.append((now, FIXATION))
        now += round(config.fixation * RATE)
        starts.append(now)
        events.append((now, VIDEO))
        now += round(config.trial_seconds * RATE)
        events.append((now, POST))
        now += round(0.6 * config.fixation * RATE)
        events.append((now, START))
        now += int(rng.integers(RATE // 2, RATE))
    events += [(now, SYNC), (now + RATE, END)]
    return Timeline(tuple(events), tuple(starts), -(-(now + 2 * RATE) // RATE) * RATE)


def write_recording(
    path: Path,
    config: StudyConfig,
    timeline: Timeline,
    valence: Sequence[float],
    arousal: Sequence[float],
    rng: np.random.Generator,
) -> None:
    """Write one subject's BDF: 32 EEG electrodes, 15 peripheral channels, Status.

    valence, arousal: evidence of each trial in presentation order, -1 to 1.
    """
    edfio = require("edfio", "train")
    eeg = draw_eeg(config, timeline, valence, arousal, rng)
    rest = _draw_peripherals(timeline.length, rng)
    limits = (-(2**23), 2**23 - 1)
    signals = []
    for name, signal in zip(EEG_NAMES + PERIPHERALS, [*eeg, *rest], strict=True):
        digital = np.clip(np.rint(signal / np.float32(BITS)), *limits).astype(np.int32)
        signals.append(
            edfio.BdfSignal.from_digital(
                digital,
                RATE,
                label=name,
                transducer_type="Active Electrode" if name in EEG_NAMES else "",
                physical_dimension="uV",
                physical_range=(limits[0] * BITS, limits[1] * BITS),
                digital_range=limits,
                prefiltering="HP: DC; LP: 104 Hz",
            )
        )
    status = edfio.BdfSignal.from_digital(
        draw_status(timeline),
        RATE,
        label="Status",
        transducer_type="Triggers and Status",
        physical_dimension="Boolean",
        physical_range=limits,
        digital_range=limits,
    )
    edfio.Bdf([*signals, status], data_record_duration=1).write(path)


def draw_status(timeline: Timeline) -> npt.NDArray[np.int32]:
    """The 24-bit Status channel (length,)."""
    status = np.full(timeline.length, IDLE, np.int32)
    for sample, code in timeline.events:
        status[sample : sample + PULSE] = EVENT | code
    return status


def draw_eeg(
    config: StudyConfig,
    timeline: Timeline,
    valence: Sequence[float],
    arousal: Sequence[float],
    rng: np.random.Generator,
) -> Signal:
    """(32, length) float32 in microvolts; see the module for its contents."""
    length = timeline.length
    pleasant = _envelope(config, timeline, valence)
    excited = _envelope(config, timeline, arousal)
    peak, strength = rng.uniform(9.3, 10.7), rng.uniform(0.85, 1.2)
    common = _noise(length, rng, slope=1.0)
    halves = [_noise(length, rng, band=(peak, 1.0)) for _ in range(3)]
    blinks = _blinks(length, rng)
    mains = np.sin(2 * np.pi * 50 / RATE * np.arange(length) + rng.uniform(0, 6)).astype(np.float32)
    rest = rng.normal(0, 0.1)  # the subject's own resting asymmetry
    eeg = np.empty((len(EEG_NAMES), length), np.float32)
    for row, name in enumerate(EEG_NAMES):
        side = _side(name)
        share = 0.5 * side * ASYMMETRY.get(name.rstrip("0123456789z"), 0.0)
        log_alpha = share * (np.float32(VALENCE_GAIN) * pleasant + np.float32(rest))
        log_alpha -= np.float32(0.5 * AROUSAL_GAIN) * excited
        alpha = 0.7 * halves[int(side) + 1] + 0.7 * _noise(length, rng, band=(peak, 1.0))
        beta = _noise(length, rng, band=(20.0, 4.0))
        signal = 8 * common + 8 * _noise(length, rng, slope=1.0)
        signal += (
            np.float32(5.5 * strength * rng.uniform(0.9, 1.1)) * np.exp(0.5 * log_alpha) * alpha
        )
        signal += np.float32(2.2 * rng.uniform(0.9, 1.1)) * (
            np.exp(np.float32(0.5 * AROUSAL_GAIN) * excited) * beta
        )
        signal += np.float32(1.2) * rng.standard_normal(length, dtype=np.float32)
        signal += np.float32(rng.uniform(1, 4)) * mains
        signal += np.float32({"Fp": 1.0, "AF": 0.5}.get(name[:2], 0.05)) * blinks
        eeg[row] = signal + np.float32(rng.uniform(-15000, 15000))
    return eeg


def _side(name: str) -> float:
    """-1 for an electrode on the left (odd number), 1 on the right, 0 on the midline."""
    return 0.0 if name.endswith("z") else (1.0 if int(name[-1]) % 2 == 0 else -1.0)


def _envelope(config: StudyConfig, timeline: Timeline, values: Sequence[float]) -> Signal:
    """(length,) course of a trial quantity: zero between trials, ramps of 0.25 s at either end."""
    track = np.zeros(timeline.length, np.float32)
    span = round(config.trial_seconds * RATE)
    ramp = np.minimum(np.arange(span), np.arange(span)[::-1]) / (0.25 * RATE)
    shape = np.clip(ramp, 0, 1).astype(np.float32)
    for start, value in zip(timeline.starts, values, strict=True):
        track[start : start + span] = np.float32(value) * shape
    return track


def _noise(
    length: int,
    rng: np.random.Generator,
    *,
    slope: float = 0.0,
    band: tuple[float, float] | None = None,
) -> Signal:
    """Gaussian noise (length,) of unit variance: power 1/f**slope, or a band (centre, sd) in Hz."""
    size = 1 << (length - 1).bit_length()  # a power of two keeps the transform quick
    bins = size // 2 + 1
    frequency = np.arange(bins, dtype=np.float32) * np.float32(RATE / size)
    if band is None:
        gain = np.maximum(frequency, 0.3) ** np.float32(-slope / 2)
        gain[0] = 0
    else:
        gain = np.exp(-0.5 * ((frequency - np.float32(band[0])) / np.float32(band[1])) ** 2)
    spectrum = rng.standard_normal((bins, 2), dtype=np.float32) * gain[:, None]
    signal = np.fft.irfft(spectrum.view(np.complex64)[:, 0], size)[:length]
    # Scaled by the expected, not the drawn, variance.
    scale = size / np.sqrt(4 * np.sum(gain.astype(np.float64) ** 2))
    scaled: Signal = (signal * scale).astype(np.float32)
    return scaled


def _blinks(length: int, rng: np.random.Generator) -> Signal:
    """(length,) bumps of about 100 uV and 0.3 s, one every 3 to 8 s."""
    bump = 100 * np.hanning(round(0.3 * RATE)).astype(np.float32)
    track = np.zeros(length + bump.size, np.float32)
    now = float(rng.uniform(1, 5))
    while now * RATE < length:
        start = int(now * RATE)
        track[start : start + bump.size] += bump * np.float32(rng.uniform(0.7, 1.3))
        now += float(rng.uniform(3, 8))
    return track[:length]


def _draw_peripherals(length: int, rng: np.random.Generator) -> list[Signal]:
    """Plausible stand-ins for the 15 peripheral channels; nothing reads their content."""
    time = np.arange(length, dtype=np.float32) / RATE
    rates = {"Resp": 0.25, "Plet": 1.2, "GSR1": 0.02, "GSR2": 0.02, "Temp": 0.005}
    signals = []
    for name in PERIPHERALS:
        wave = np.sin(np.float32(2 * np.pi * rates.get(name, 0.1)) * time)
        noise = 5 * rng.standard_normal(length, dtype=np.float32)
        signals.append(np.float32(rng.uniform(-3000, 3000)) + 200 * wave + noise)
    return signals
