"""Raw EEG recordings to filtered windows, a trial at a time (mne reads and filters)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError, require

from .config import CHANNEL_SETS, PrepareConfig, split_names
from .spectra import BINS, spectrum
from .study import EegTrial, Signal

Events = npt.NDArray[np.int64]
Samples = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

# Left half, then the right half mirrored, midline left out (TSception's order; domain fact: DEAP
# names its electrodes in two orders, Twente and Geneva, so they are always picked by name).
TSCEPTION28 = (
    "Fp1", "AF3", "F3", "F7", "FC5", "FC1", "C3", "T7", "CP5", "CP1", "P3", "P7", "PO3", "O1",
    "Fp2", "AF4", "F4", "F8", "FC6", "FC2", "C4", "T8", "CP6", "CP2", "P4", "P8", "PO4", "O2",
)  # fmt: skip
# The midline is dealt out to both halves: Fz, Pz left, Cz, Oz right.
ALL32 = (*TSCEPTION28[:14], "Fz", "Pz", *TSCEPTION28[14:], "Cz", "Oz")
CHANNEL_ORDER = {"tsception28": TSCEPTION28, "all32": ALL32}
STATUS_NAMES = ("status", "", "-1", "-0")
EVENT_MASK = 0xFF  # BioSemi keeps the amplifier's own state in the bits above
VIDEO_START = 4
SHORTEST = 10.0  # seconds of recording that can be filtered
CHUNK_SECONDS = 60
HAMMING = 3.3  # length of mne's windowed filters: so many over the transition's width


def channel_names(config: PrepareConfig) -> tuple[str, ...]:
    """Electrodes of the cache, in order."""
    return CHANNEL_ORDER.get(config.channels) or split_names(config.channels)


def referenced(config: PrepareConfig) -> tuple[str, ...]:
    """Electrodes whose mean is the reference: all 32 of the cap, or those that were asked for."""
    return ALL32 if config.channels in CHANNEL_SETS else split_names(config.channels)


@dataclass(frozen=True)
class Recording:
    """An opened recording, whose samples stay in the file.

    names, rows: electrodes and their rows in ``raw``. stims: trigger rows, best candidate first.
    """

    path: Path
    raw: Any
    names: tuple[str, ...]
    rows: list[int]
    stims: list[int]
    sfreq: float
    length: int

    def read(self, start: int, stop: int) -> Doubles:
        """Samples [start, stop) of the electrodes, (C, n) float64 microvolts, unfiltered."""
        try:
            block: Doubles = self.raw[self.rows, start:stop][0] * 1e6
        except Exception as error:  # mne raises whatever its reader runs into
            raise InputError(
                f"cannot read samples {start} to {stop} of {self.path}: {type(error).__name__}: "
                f"{error}; remedy: copy it again from its source"
            ) from error
        return block

    def events(self, wanted: int | None = None) -> Events:
        """Events (k, 2): sample number and low byte of Status, of the first trigger channel that
        knows the code ``wanted``, else of the first channel.
        """
        return _find_events(self, wanted)


def open_bdf(path: Path | str, electrodes: tuple[str, ...] = ALL32) -> Recording:
    """Open a BDF with these electrodes and a trigger channel.

    Electrodes are found by name, blanks stripped and letter case ignored. The trigger channel is
    called Status, or in some DEAP files nothing at all, which mne shows as '', '-0' or '-1'.
    Raises ``InputError`` when the file is missing, truncated, no BDF, or lacks one of them.
    """
    path = Path(path)
    check_length(path)
    raw, stims = _open_with_triggers(require("mne", "train"), path)
    rows = _electrodes(raw.ch_names, electrodes, path)
    return Recording(path, raw, electrodes, rows, stims, float(raw.info["sfreq"]), raw.n_times)


def open_any(path: Path | str, electrodes: tuple[str, ...]) -> Recording:
    """Open a recording of any format that mne knows, by its suffix; it needs no trigger channel.

    Raises ``InputError`` when it cannot be read or lacks one of the electrodes.
    """
    path = Path(path)
    if path.suffix.casefold() == ".bdf":
        check_length(path)
    mne = require("mne", "train")
    if not path.is_file():
        raise InputError(f"no recording at {path}; expected a file; remedy: check the path")
    raw = _guarded(path, lambda: mne.io.read_raw(path, preload=False, verbose="error"))
    rows = _electrodes(raw.ch_names, electrodes, path)
    return Recording(path, raw, electrodes, rows, [], float(raw.info["sfreq"]), raw.n_times)


def read_events(path: Path | str) -> tuple[Events, float]:
    """Events (k, 2) (sample number, low byte of Status) and sampling rate of any BDF.

    Raises ``InputError`` when the file is missing, truncated, no BDF, or has no trigger channel.
    """
    recording = open_bdf(path, ())
    return recording.events(), recording.sfreq


def trial_starts(recording: Recording) -> Samples:
    """Sample numbers (k,) at which a video starts (code 4), in presentation order."""
    events = recording.events(VIDEO_START)
    starts: Samples = events[events[:, 1] == VIDEO_START, 0]
    return starts


def eeg_trial(recording: Recording, start: int, seconds: float, config: PrepareConfig) -> EegTrial:
    """Windows of a trial that starts at sample ``start``.

    Windows that the recording no longer covers are left out. Raises ``InputError`` for an electrode
    that is flat or not finite during the trial.
    """
    rate, starts = recording.sfreq, config.window_starts(seconds)
    before = config.baseline_seconds if config.baseline == "mean" else 0.0
    first = start - round(before * rate)
    if first < 0:
        raise InputError(
            f"{recording.path} begins {-first / rate:.1f} s too late for a trial at "
            f"{start / rate:.1f} s with a baseline of {before:g} s; remedy: check the recording"
        )
    end = start + round((starts[-1] + config.window) * rate) if starts else start
    last = min(recording.length, end)
    if last <= start:
        return EegTrial(cut(np.zeros((0, 0)), 0, config, 0.0), np.full((2, BINS), np.nan))
    raw, signal = clean_span(recording, first, last, config)
    windows = cut(signal, round(before * config.sfreq), config, seconds)
    return EegTrial(windows, np.stack([spectrum(raw, rate), spectrum(signal, config.sfreq)]))


def cut(signal: Doubles, start: int, config: PrepareConfig, seconds: float) -> Signal:
    """Whole windows of a signal (C, n) at the cache's rate, whose stimulus starts at ``start``."""
    if config.baseline == "mean" and start > 0:
        signal = signal - signal[:, :start].mean(axis=1, keepdims=True)
    firsts = [start + round(second * config.sfreq) for second in config.window_starts(seconds)]
    length = config.n_times
    return _stack(
        [signal[:, i : i + length] for i in firsts if i + length <= signal.shape[1]], config
    )


def _stack(windows: list[Doubles], config: PrepareConfig) -> Signal:
    if not windows:
        return np.zeros((0, len(channel_names(config)), config.n_times), np.float32)
    return np.stack(windows).astype(np.float32)


def clean_span(
    recording: Recording, start: int, stop: int, config: PrepareConfig
) -> tuple[Doubles, Doubles]:
    """Samples [start, stop): as recorded, and (C, n) float64 filtered at the cache's rate.

    Notch and band-pass (zero phase, finite), average reference, the cache's channels in order. It
    is filtered with so much of the recording on either side as the filters reach, so it is what
    filtering the whole recording would give. That needs the memory of one trial, not of the whole.
    """
    rate = recording.sfreq
    check_rate(rate, config, recording.path)
    if recording.length < SHORTEST * rate:
        raise InputError(
            f"{recording.path} lasts {recording.length / rate:.1f} s; expected at least "
            f"{SHORTEST:g} s (less cannot be filtered); remedy: check the recording"
        )
    reach = max(filter_reach(config), SHORTEST / 2)
    whole = np.ceil(reach)  # seconds, so that a new rate begins on a sample of the old
    low = max(0, start - int(whole * rate))
    high = min(recording.length, max(stop + int(whole * rate), low + int(SHORTEST * rate)))
    low = max(0, min(low, high - int(SHORTEST * rate)))
    block = recording.read(low, high)
    raw = block[:, start - low : stop - low].copy()
    _check_signal(raw, recording)
    block -= block.mean(axis=1, keepdims=True)  # offsets of tens of millivolts cost digits
    signal = _filter(block, rate, config)
    signal -= signal.mean(axis=0)
    row_of = {name.casefold(): row for row, name in enumerate(recording.names)}
    signal = signal[[row_of[name.casefold()] for name in channel_names(config)]]
    return raw, resample(signal, start - low, stop - low, rate, config)


def filter_reach(config: PrepareConfig) -> float:
    """Seconds by which the filters' responses reach to either side."""
    transition = min(max(0.25 * config.low, 2.0), config.low)
    reach = HAMMING / transition / 2
    return reach + (HAMMING / 0.5 / 2 if config.notch > 0 else 0.0)


def _filter(block: Doubles, rate: float, config: PrepareConfig) -> Doubles:
    mne = require("mne", "train")
    if config.notch > 0:
        block = mne.filter.notch_filter(block, rate, config.notch, verbose="error")
    filtered: Doubles = mne.filter.filter_data(
        block, rate, config.low, config.high, verbose="error"
    )
    return filtered


def resample(signal: Doubles, start: int, stop: int, rate: float, config: PrepareConfig) -> Doubles:
    """[start, stop) of a band-passed signal at the cache's rate. Of a whole multiple every m-th
    sample is taken, which is exact, the band-pass having left nothing above half the new rate.
    """
    every = rate / config.sfreq
    if every == round(every):
        return signal[:, start : stop : round(every)]
    mne = require("mne", "train")
    margin = start // round(rate)  # whole seconds, so that the stimulus begins on a sample
    begin = start - margin * round(rate)
    slower: Doubles = mne.filter.resample(
        signal[:, begin:], up=config.sfreq, down=rate, method="polyphase", verbose="error"
    )
    first = margin * round(config.sfreq)
    return slower[:, first : first + int((stop - start) / every)]


def check_rate(rate: float, config: PrepareConfig, path: Path) -> None:
    """Raise ``InputError`` when a recording cannot be brought to the cache's rate."""
    whole = rate == round(rate) and config.sfreq == round(config.sfreq)
    if rate < config.sfreq or (rate % config.sfreq != 0 and not whole):
        raise InputError(
            f"{path} was recorded at {rate:g} Hz; expected at least sfreq={config.sfreq:g}, both "
            "in whole hertz; remedy: choose another sfreq"
        )


def _check_signal(block: Doubles, recording: Recording) -> None:
    bad = ~np.isfinite(block).all(axis=1)
    kind = "not finite"
    if not bad.any():
        bad, kind = np.ptp(block, axis=1) == 0, "flat"
    if bad.any():
        names = ", ".join(np.array(recording.names)[bad])
        verb = "are" if bad.sum() > 1 else "is"
        raise InputError(
            f"{recording.path}: {names} {verb} {kind} during the trial; expected a signal; remedy: "
            "leave the electrode out by naming the channels, or the trial"
        )


def check_length(path: Path) -> None:
    """Compare the size that a BDF's header promises with the file (a copy may be truncated)."""
    if not path.is_file():
        raise InputError(f"no recording at {path}; expected a BDF file; remedy: check the path")
    with path.open("rb") as file:
        head = file.read(256)
        try:
            if head[:1] != b"\xff":
                raise ValueError("no BDF signature")
            header, records, channels = int(head[184:192]), int(head[236:244]), int(head[252:256])
            fields = file.read(256 * channels)
            counts = fields[216 * channels : 224 * channels]
            samples = sum(int(counts[8 * k : 8 * k + 8]) for k in range(channels))
        except ValueError as error:
            raise InputError(
                f"{path} is not a BDF recording ({error}); expected BioSemi's 24-bit format; "
                "remedy: copy it again from its source"
            ) from error
    size, expected = path.stat().st_size, header + 3 * samples * records
    # A recorder that was not stopped properly leaves -1 for the number of records.
    if records >= 0 and size < expected:
        raise InputError(
            f"{path} is truncated: its header promises {expected} bytes, the file has {size}; "
            "remedy: copy it again from its source"
        )


def _open_with_triggers(mne: Any, path: Path) -> tuple[Any, list[int]]:
    """The opened recording and the rows of its trigger channels, best candidate first."""
    names = list(_open(mne, path, []).ch_names)
    folded = [name.strip().casefold() for name in names]
    rows = [folded.index(wanted) for wanted in STATUS_NAMES if wanted in folded]
    if not rows:
        raise InputError(
            f"{path} has no trigger channel; expected one called Status (or without a name) among "
            f"{len(names)} channels; remedy: use the original recording"
        )
    # Opened again with the trigger channels named: only then are they read as whole numbers.
    return _open(mne, path, [names[row] for row in rows]), rows


def _open(mne: Any, path: Path, stims: list[str]) -> Any:
    def read() -> Any:
        return mne.io.read_raw_bdf(
            path, stim_channel=stims or False, preload=False, verbose="error"
        )

    return _guarded(path, read)


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # mne raises whatever its parser runs into
        raise InputError(
            f"cannot read {path}: {type(error).__name__}: {error}; expected an EEG recording; "
            "remedy: copy it again from its source"
        ) from error


def _electrodes(names: list[str], wanted: tuple[str, ...], path: Path) -> list[int]:
    row_of = {name.strip().casefold(): row for row, name in reversed(list(enumerate(names)))}
    missing = [name for name in wanted if name.casefold() not in row_of]
    if missing:
        raise InputError(
            f"{path} lacks the electrode{'s' * (len(missing) > 1)} {', '.join(missing)}; expected "
            f"{len(wanted)} by their names in the 10-20 system; remedy: use the original "
            "recording, or name the channels it has"
        )
    return [row_of[name.casefold()] for name in wanted]


def _find_events(recording: Recording, wanted: int | None) -> Events:
    if recording.length == 0:
        raise InputError(
            f"{recording.path} holds no sample; expected a recording; remedy: copy it again from "
            "its source"
        )
    mne = require("mne", "train")
    info = mne.create_info(["Status"], recording.sfreq, ["stim"])
    every: list[Events] = []
    for row in recording.stims:
        found = mne.find_events(
            mne.io.RawArray(_trigger(recording, row), info, verbose="error"),
            stim_channel="Status",
            shortest_event=1,
            initial_event=True,
            mask=EVENT_MASK,
            mask_type="and",
            verbose="error",
        )
        every.append(np.asarray(found[:, [0, 2]], dtype=np.int64))
    return next((events for events in every if wanted in events[:, 1]), every[0])


def _trigger(recording: Recording, row: int) -> Doubles:
    """The trigger channel (1, n), read in parts: mne decodes every channel of what it reads."""
    step = round(CHUNK_SECONDS * recording.sfreq)
    signal = np.empty((1, recording.length))
    for start in range(0, recording.length, step):
        stop = min(start + step, recording.length)
        signal[:, start:stop] = recording.raw[[row], start:stop][0]
    return signal
