"""DEAP's preprocessed files: pickles, so read by an unpickler that knows NumPy arrays and no more.

sNN.dat is a Python 2 pickle of data (40, 40, 8064) and labels (40, 4). Row k belongs to
Experiment_id k + 1, not to the k-th trial. Channels 0-31 are EEG in Geneva's order; 63 s at 128 Hz,
of which the first 3 s precede the video. It is filtered (4-45 Hz) and average-referenced already.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pycdgkd.errors import InputError

from .config import PrepareConfig
from .eeg import channel_names, check_rate, cut, resample
from .spectra import spectrum
from .study import EegTrial, ReadTrial, Trial

GENEVA = (
    "Fp1", "AF3", "F3", "F7", "FC5", "FC1", "C3", "T7", "CP5", "CP1", "P3", "P7", "PO3", "O1", "Oz",
    "Pz", "Fp2", "AF4", "Fz", "F4", "F8", "FC6", "FC2", "Cz", "C4", "T8", "CP6", "CP2", "P4", "P8",
    "PO4", "O2",
)  # fmt: skip
RATE, BASELINE = 128, 384
SHAPE = (40, 40, 8064)
LABELS = ("valence", "arousal", "dominance", "liking")
MAX_BYTES = 256 << 20

Array = npt.NDArray[np.float64]


class _Type:
    """A plain numeric type such as 'f8', as a pickle builds it."""

    def __init__(self, name: Any, align: Any = False, copy: Any = False) -> None:
        del align, copy
        if not isinstance(name, str) or not re.fullmatch(r"[fiu][1248]", name):
            raise pickle.UnpicklingError(f"the type {str(name)[:20]!r} is not a number's")
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("an unknown byte order")
        self.order = state[1]


class _Array:
    """An array as a pickle builds it: made of its bytes here, never by NumPy's own unpickling."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Type) or not isinstance(content, bytes | str):
            raise pickle.UnpicklingError("an array of numbers was expected")
        raw = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(raw, np.dtype(kind.order + kind.name))
        self.values = flat.reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """NumPy's helper of this name, for plain arrays only."""
    del shape, code
    if kind is not _Array:
        raise pickle.UnpicklingError("only plain arrays are expected")
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding[:20]!r} is not expected")
    return text.encode("latin1")


# What reading a NumPy array needs; no other name in a file is ever looked up.
ALLOWED: dict[tuple[str, str], Callable[..., Any] | type] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}


class _Unpickler(pickle._Unpickler):
    """Python's own: the compiled one reserves whatever memory a file asks for."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no data file needs"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        del pid
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_dat(path: Path) -> tuple[Array, Array]:
    """Data (40, 40, 8064) in microvolts and labels (40, 4) of a .dat file.

    Raises ``InputError`` for a file that is missing, too large, no such pickle, or that asks for
    anything but NumPy arrays (the name is told, and nothing of it runs).
    """
    data, labels = read_arrays(path)
    if data.shape != SHAPE or labels.shape != (SHAPE[0], len(LABELS)):
        raise InputError(
            f"{path} holds data {data.shape} and labels {labels.shape}; expected {SHAPE} and "
            f"{(SHAPE[0], len(LABELS))}; remedy: copy it again from its source"
        )
    return data, labels


def read_arrays(path: Path) -> tuple[Array, Array]:
    """The arrays 'data' and 'labels' of a pickle, of whatever shapes."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{path} has {size} bytes; expected at most {MAX_BYTES}")
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        data, labels = (content[name].values.astype(np.float64) for name in ("data", "labels"))
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; remedy: check the path"
        ) from error
    except Exception as error:  # whatever a damaged pickle makes NumPy or pickle raise
        raise InputError(
            f"{path} is not one of DEAP's preprocessed files: {error}; expected a pickle of NumPy "
            "arrays 'data' and 'labels'; remedy: copy it again from its source"
        ) from error
    return data, labels


def open_dat(path: Path, trials: Sequence[Trial], config: PrepareConfig) -> ReadTrial:
    """One subject's file. Its labels must be those of the ratings, else its rows are others.

    Raises ``InputError`` for options that cannot apply to data that is filtered already.
    """
    data, labels = read_dat(path)
    check_rate(float(RATE), config, path)
    _check_order(path, labels, trials)
    row_of = {name.casefold(): row for row, name in enumerate(GENEVA)}
    missing = [name for name in channel_names(config) if name.casefold() not in row_of]
    if missing:
        raise InputError(f"{path} has no electrode {', '.join(missing)}; expected some of its 32")
    rows = [row_of[name.casefold()] for name in channel_names(config)]

    def read(trial: Trial) -> EegTrial:
        raw = data[trial.experiment_id - 1][rows]
        bad = [
            name
            for name, signal in zip(channel_names(config), raw, strict=True)
            if not np.isfinite(signal).all() or np.ptp(signal) == 0
        ]
        if bad:
            raise InputError(
                f"{path} experiment {trial.experiment_id}: {', '.join(bad)} flat or not finite; "
                "expected a signal; remedy: leave the electrode out, or the trial"
            )
        before = round(config.baseline_seconds * RATE) if config.baseline == "mean" else 0
        if before > BASELINE:
            raise InputError(f"{path} has 3 s of baseline; got baseline_seconds={before / RATE:g}")
        begin = BASELINE - before
        signal = resample(raw, begin, raw.shape[1], float(RATE), config)
        windows = cut(signal, round(before / RATE * config.sfreq), config, trial.seconds)
        return EegTrial(windows, np.stack([spectrum(raw, RATE), spectrum(signal, config.sfreq)]))

    return read


def _check_order(path: Path, labels: Array, trials: Sequence[Trial]) -> None:
    for trial in trials:
        if not 1 <= trial.experiment_id <= SHAPE[0]:
            raise InputError(
                f"experiment {trial.experiment_id} of subject {trial.subject} is not in {path}; "
                "expected 1 to 40; remedy: mend the ratings"
            )
        row = labels[trial.experiment_id - 1]
        for name, value in zip(LABELS, row.tolist(), strict=True):
            if name in trial.labels and abs(trial.labels[name] - value) > 0.011:
                raise InputError(
                    f"{path} rates {name} of experiment {trial.experiment_id} {value:g}, "
                    f"participant_ratings {trial.labels[name]:g} (trial {trial.trial}); expected "
                    "the same; remedy: use the ratings and files of one source"
                )
