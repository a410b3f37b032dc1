"""Raw BDF recordings to filtered EEG trials (mne does the reading and the filtering)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError, require

from .config import PrepareConfig

Signal = npt.NDArray[np.float32]
Events = npt.NDArray[np.int64]
Samples = npt.NDArray[np.int64]

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
CHUNK_SECONDS = 60
BLOCK = 8  # channels filtered together, in float64


@dataclass(frozen=True)
class Recording:
    """One BDF in memory.

    eeg: (32, n) float32 microvolts, unfiltered, each electrode's offset removed.
    names: electrode of each row. events: (k, 2) sample number and code (low byte of Status).
    """

    path: Path
    eeg: Signal
    names: tuple[str, ...]
    events: Events
    sfreq: float


def read_recording(path: Path | str) -> Recording:
    """Read the 32 EEG electrodes and the events of a BDF, in one pass through the file.

    Electrodes are found by name, blanks stripped and letter case ignored. The trigger channel is
    called Status, or in some DEAP files nothing at all, which mne shows as '', '-0' or '-1'.
    Raises ``InputError`` when the file is missing, truncated, no BDF, or lacks one of them.
    """
    path = Path(path)
    _check_length(path)
    mne = require("mne", "train")
    raw, stims = _open_with_triggers(mne, path)
    rows, names = _electrodes(raw.ch_names, path)
    picks = [*rows, *stims]
    rate = float(raw.info["sfreq"])
    eeg = np.empty((len(rows), raw.n_times), np.float32)
    triggers = np.empty((len(stims), raw.n_times))
    step = round(CHUNK_SECONDS * rate)
    offset = np.zeros((len(rows), 1))
    for start in range(0, raw.n_times, step):
        part = raw[picks, start : min(start + step, raw.n_times)][0]
        if start == 0:
            # Electrode offsets reach tens of millivolts; without them float32 loses nothing.
            offset = part[: len(rows)].mean(axis=1, keepdims=True)
        eeg[:, start : start + step] = (part[: len(rows)] - offset) * 1e6
        triggers[:, start : start + step] = part[len(rows) :]
    return Recording(path, eeg, names, _find_events(mne, triggers, rate), rate)


def read_events(path: Path | str) -> tuple[Events, float]:
    """Events (k, 2) (sample number, low byte of Status) and sampling rate of any BDF.

    Raises ``InputError`` when the file is missing, truncated, no BDF, or has no trigger channel.
    """
    path = Path(path)
    _check_length(path)
    mne = require("mne", "train")
    raw, stims = _open_with_triggers(mne, path)
    rate = float(raw.info["sfreq"])
    return _find_events(mne, raw[stims, :][0], rate), rate


def clean(recording: Recording, config: PrepareConfig) -> Signal:
    """Filter a whole recording: (C, n) float32 microvolts at the recording's own rate.

    Notch, band-pass (zero phase) and average reference over all 32 electrodes, then the channels of
    ``config.channels`` in their order. It is filtered before anything is cut, since the electrode
    offsets of a DC-coupled amplifier would ring at every edge.
    """
    mne = require("mne", "train")
    rate = recording.sfreq
    _decimation(recording, config)
    if recording.eeg.shape[1] < 10 * rate:
        raise InputError(
            f"{recording.path} lasts {recording.eeg.shape[1] / rate:.1f} s; expected at least 10 s "
            "(less cannot be filtered); remedy: check the recording"
        )
    filtered = np.empty_like(recording.eeg)
    for start in range(0, len(filtered), BLOCK):
        block = recording.eeg[start : start + BLOCK].astype(np.float64)
        if config.notch > 0:
            block = mne.filter.notch_filter(block, rate, config.notch, verbose="error")
        filtered[start : start + BLOCK] = mne.filter.filter_data(
            block, rate, config.low, config.high, verbose="error"
        )
    filtered -= filtered.mean(axis=0, dtype=np.float64).astype(np.float32)
    row_of = {name.casefold(): row for row, name in enumerate(recording.names)}
    order = [row_of[name.casefold()] for name in CHANNEL_ORDER[config.channels]]
    cleaned: Signal = filtered[order]
    return cleaned


def trial_starts(recording: Recording) -> Samples:
    """Sample numbers (k,) at which a video starts (code 4), in presentation order."""
    starts: Samples = recording.events[recording.events[:, 1] == VIDEO_START, 0]
    return starts


def cut_windows(cleaned: Signal, start: int, recording: Recording, config: PrepareConfig) -> Signal:
    """Windows (w, C, L) float32 of the trial that starts at sample ``start``.

    The band-pass leaves nothing above half the new rate, so taking every m-th sample is exact
    resampling, without the edge effects that a transform of each trial would bring. Windows that
    the recording no longer covers are left out.
    """
    every = _decimation(recording, config)
    windows = []
    for second in config.window_starts:
        first = start + round(second * recording.sfreq)
        last = first + config.n_times * every
        if last <= cleaned.shape[1]:
            windows.append(cleaned[:, first:last:every])
    shape = (0, len(CHANNEL_ORDER[config.channels]), config.n_times)
    return np.stack(windows) if windows else np.zeros(shape, np.float32)


def _decimation(recording: Recording, config: PrepareConfig) -> int:
    every = recording.sfreq / config.sfreq
    if abs(every - round(every)) > 1e-9 or every < 1:
        raise InputError(
            f"{recording.path} was recorded at {recording.sfreq:g} Hz; expected a whole multiple "
            f"of sfreq={config.sfreq:g}; remedy: choose an sfreq that divides it"
        )
    return round(every)


def _check_length(path: Path) -> None:
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
    try:
        return mne.io.read_raw_bdf(
            path, stim_channel=stims or False, preload=False, verbose="error"
        )
    except Exception as error:  # mne raises whatever its parser runs into
        raise InputError(
            f"cannot read {path}: {type(error).__name__}: {error}; expected a BDF recording; "
            "remedy: copy it again from its source"
        ) from error


def _electrodes(names: list[str], path: Path) -> tuple[list[int], tuple[str, ...]]:
    row_of = {name.strip().casefold(): row for row, name in reversed(list(enumerate(names)))}
    missing = [name for name in ALL32 if name.casefold() not in row_of]
    if missing:
        raise InputError(
            f"{path} lacks the electrode{'s' * (len(missing) > 1)} {', '.join(missing)}; expected "
            f"the 32 of the 10-20 system; remedy: use the original recording"
        )
    return [row_of[name.casefold()] for name in ALL32], ALL32


def _find_events(mne: Any, triggers: npt.NDArray[np.float64], sfreq: float) -> Events:
    """Events of the first trigger channel that knows a video start, else of the first channel."""
    info = mne.create_info(["Status"], sfreq, ["stim"])
    every: list[Events] = []
    for trigger in triggers:
        found = mne.find_events(
            mne.io.RawArray(trigger[None], info, verbose="error"),
            stim_channel="Status",
            shortest_event=1,
            initial_event=True,
            mask=EVENT_MASK,
            mask_type="and",
            verbose="error",
        )
        every.append(np.asarray(found[:, [0, 2]], dtype=np.int64))
    return next((events for events in every if VIDEO_START in events[:, 1]), every[0])
