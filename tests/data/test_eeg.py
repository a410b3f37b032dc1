from __future__ import annotations

from pathlib import Path

import edfio
import numpy as np
import numpy.typing as npt
import pytest

from pycdgkd.data import PrepareConfig
from pycdgkd.data.eeg import (
    ALL32,
    TSCEPTION28,
    Recording,
    clean_span,
    eeg_trial,
    filter_reach,
    open_any,
    open_bdf,
    read_events,
    trial_starts,
)
from pycdgkd.errors import InputError

RATE, SECONDS, START = 512, 30, 8 * 512 + 137
CONFIG = PrepareConfig(trial_seconds=8.0)
TIME = np.arange(SECONDS * RATE) / RATE
GENEVA = (
    "Fp1", "AF3", "F3", "F7", "FC5", "FC1", "C3", "T7", "CP5", "CP1", "P3", "P7", "PO3", "O1", "Oz",
    "Pz", "Fp2", "AF4", "Fz", "F4", "F8", "FC6", "FC2", "Cz", "C4", "T8", "CP6", "CP2", "P4", "P8",
    "PO4", "O2",
)  # fmt: skip


def write_bdf(
    path: Path,
    signals: dict[str, npt.NDArray[np.float64]],
    *,
    names: tuple[str, ...] = GENEVA,
    rate: int = RATE,
    seconds: int = SECONDS,
    status_name: str = "Status",
) -> Path:
    """A BDF of these microvolts by electrode (the last bit elsewhere), a video start at START."""
    limits = {"physical_range": (-262144, 262143.96875), "digital_range": (-(2**23), 2**23 - 1)}
    channels = []
    for name in names:
        idle = np.arange(rate * seconds) % 2 / 32  # no amplifier is silent
        microvolts = signals.get(name.strip().casefold(), idle)
        digital = np.rint(microvolts * 32).astype(np.int32)
        channels.append(
            edfio.BdfSignal.from_digital(
                digital, rate, label=name, physical_dimension="uV", **limits
            )
        )
    status = np.full(rate * seconds, 0x19FF00, np.int32)
    status[START] = 0x18FF04  # a single sample long
    status[START + 4000] = 0x58FF05
    limits = {"physical_range": (-(2**23), 2**23 - 1), "digital_range": (-(2**23), 2**23 - 1)}
    channels.append(
        edfio.BdfSignal.from_digital(
            status, rate, label=status_name, physical_dimension="Boolean", **limits
        )
    )
    edfio.Bdf(channels, data_record_duration=1).write(path)
    return path


def windows_of(path: Path, config: PrepareConfig = CONFIG) -> npt.NDArray[np.float32]:
    recording = open_bdf(path)
    start = int(trial_starts(recording)[0])
    assert start == START
    return eeg_trial(recording, start, config.trial_seconds, config).windows


def test_real_biosemi_status_needs_the_low_byte(real: Path) -> None:
    """The file holds 0x1FFFF over and over; only the low byte tells 254 from 255."""
    events, rate = read_events(real / "biosemi_256hz_status.bdf")
    assert rate == 256
    assert events[events[:, 0] > 0].shape == (40, 2)
    assert set(events[:, 1].tolist()) == {255}


def test_real_triggers_of_another_amplifier(real: Path) -> None:
    events, rate = read_events(real / "bdf_9_events.bdf")
    assert rate == 500
    assert events[:, 1].tolist().count(1) == 7
    assert sorted(set(events[:, 1].tolist())) == [1, 2, 4]
    assert events[0].tolist() == [242, 4]


def test_a_real_recording_without_the_electrodes_is_refused(real: Path) -> None:
    with pytest.raises(InputError, match=r"lacks the electrodes Fp1, AF3, .*expected 32 "):
        open_bdf(real / "bdf_9_events.bdf")


def test_windows_start_on_the_right_sample_with_the_right_size(tmp_path: Path) -> None:
    """A 20 Hz burst on F3 from 4.0 to 4.5 s after the start, over a large electrode offset."""
    burst = np.zeros(SECONDS * RATE)
    first = START + 4 * RATE
    burst[first : first + RATE // 2] = 50 * np.sin(2 * np.pi * 20 * np.arange(RATE // 2) / RATE)
    signals = {"f3": burst + 14672, "oz": np.arange(SECONDS * RATE) % 2 - 9000.0}
    windows = windows_of(write_bdf(tmp_path / "a.bdf", signals))
    assert windows.shape == (2, 28, 512)
    assert windows.dtype == np.float32
    f3 = windows[:, TSCEPTION28.index("F3")].astype(np.float64)
    assert (f3[1, :64] ** 2).sum() > 0.95 * (f3**2).sum()
    # One sample is 56 degrees at 20 Hz: a shift by one would leave 0.56 of the correlation.
    expected = 50 * 31 / 32 * np.sin(2 * np.pi * 20 * np.arange(64) / 128)
    assert np.corrcoef(f3[1, 8:56], expected[8:56])[0, 1] > 0.99
    np.testing.assert_allclose(f3[1, 8:56].std(), expected[8:56].std(), rtol=0.05)
    # The average reference puts -1/32 of it on every other electrode.
    p4 = windows[1, TSCEPTION28.index("P4"), 8:56]
    np.testing.assert_allclose(p4, -f3[1, 8:56] / 31, atol=0.02)


def test_what_lies_outside_the_band_is_gone(tmp_path: Path) -> None:
    signals = {
        "o1": 30 * np.sin(2 * np.pi * 50 * TIME),
        "p3": 100 * np.sin(2 * np.pi * 1.0 * TIME),
        "p4": 40 * np.sin(2 * np.pi * 100 * TIME),
        "c3": 20 * np.sin(2 * np.pi * 10 * TIME),
    }
    windows = windows_of(write_bdf(tmp_path / "a.bdf", signals))
    rms = {name: windows[:, TSCEPTION28.index(name)].std() for name in ("O1", "P3", "P4", "C3")}
    assert rms["C3"] == pytest.approx(20 / np.sqrt(2) * 31 / 32, rel=0.01)
    floor = 20 / np.sqrt(2) / 32  # the 10 Hz that the average reference hands out
    for name in ("O1", "P3", "P4"):
        assert rms[name] < floor + 0.15


def test_electrodes_are_picked_by_name(tmp_path: Path) -> None:
    """Blanks, letter case and order in the file do not matter; amplitudes name the electrode."""
    size = {name.casefold(): 2.0 * (row + 1) for row, name in enumerate(ALL32)}
    wave = np.sin(2 * np.pi * 12 * TIME)
    signals = {name: amplitude * wave for name, amplitude in size.items()}
    odd = tuple(name.upper() + " " for name in reversed(GENEVA))
    path = write_bdf(tmp_path / "a.bdf", signals, names=odd)
    mean = np.mean(list(size.values()))
    for channels, order in (("tsception28", TSCEPTION28), ("all32", ALL32)):
        windows = windows_of(path, PrepareConfig(trial_seconds=8.0, channels=channels))
        phase = np.sin(2 * np.pi * 12 * (START / RATE + np.arange(512) / 128))
        got = 2 * (windows[0] * phase).mean(axis=1)
        expected = [size[name.casefold()] - mean for name in order]
        np.testing.assert_allclose(got, expected, atol=0.05)


def test_tsception_order_is_left_then_mirrored_right() -> None:
    assert len(set(TSCEPTION28)) == 28
    assert set(ALL32) == set(GENEVA)
    for left, right in zip(TSCEPTION28[:14], TSCEPTION28[14:], strict=True):
        assert left.rstrip("0123456789") == right.rstrip("0123456789")
        assert int(left[-1]) + 1 == int(right.removeprefix(left[:-1]))


@pytest.mark.parametrize("count", [1, 2])
def test_trigger_channels_without_a_name(tmp_path: Path, count: int) -> None:
    """DEAP's s24-s28 leave the trigger channel's name empty, s29-s32 have two such channels."""
    names = (*GENEVA, "EXG1") if count == 2 else GENEVA
    path = write_bdf(tmp_path / "a.bdf", {}, names=names)
    content = bytearray(path.read_bytes())
    labels = [*names, "Status"]
    for name in ("Status", "EXG1")[:count]:
        at = 256 + 16 * labels.index(name)
        content[at : at + 16] = b" " * 16
    path.write_bytes(content)
    assert open_bdf(path).events(4).tolist() == [[START, 4], [START + 4000, 5]]


class Memory:
    """Stands for mne's reader."""

    def __init__(self, signal: npt.NDArray[np.float64]) -> None:
        self.signal = signal

    def __getitem__(self, key: tuple[list[int], slice]) -> tuple[npt.NDArray[np.float64], None]:
        return self.signal[key[0]][:, key[1]] * 1e-6, None


def recording_of(signal: npt.NDArray[np.float64], rate: float) -> Recording:
    return Recording(
        Path("x.bdf"), Memory(signal), ALL32, list(range(32)), [], rate, signal.shape[1]
    )


def noise(seconds: int, rate: int) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(3)
    return 20 * rng.standard_normal((32, seconds * rate)) + rng.uniform(-9000, 9000, (32, 1))


def test_windows_past_the_end_are_left_out() -> None:
    recording = recording_of(noise(20, RATE), float(RATE))
    for start, count in ((12, 2), (13, 1), (19, 0)):
        windows = eeg_trial(recording, start * RATE, 8.0, CONFIG).windows
        assert windows.shape == (count, 28, 512)


def test_a_trial_filtered_alone_is_what_the_whole_recording_filtered_gives() -> None:
    """The filters are finite: what lies beyond their reach cannot matter."""
    signal = noise(60, RATE)
    recording = recording_of(signal, float(RATE))
    _, whole = clean_span(recording, 0, signal.shape[1], CONFIG)
    start = 25 * RATE
    windows = eeg_trial(recording, start, 8.0, CONFIG).windows
    expected = whole[:, start // 4 : start // 4 + 1024].reshape(28, 2, 512).transpose(1, 0, 2)
    np.testing.assert_allclose(windows, expected, atol=2e-5)
    # Neither is it so by chance: with less than their reach the edges differ.
    assert filter_reach(CONFIG) > 3
    _, short = clean_span(recording_of(signal[:, start:][:, : 10 * RATE], 512.0), 0, 4096, CONFIG)
    assert np.abs(short[:, :64] - expected[0, :, :64]).max() > 0.1


def test_memory_is_bounded_by_the_trial() -> None:
    class Counted(Memory):
        most = 0

        def __getitem__(self, key: tuple[list[int], slice]) -> tuple[npt.NDArray[np.float64], None]:
            self.most = max(self.most, key[1].stop - key[1].start)
            return super().__getitem__(key)

    reader = Counted(noise(120, RATE))
    recording = Recording(Path("x"), reader, ALL32, list(range(32)), [], 512.0, 120 * RATE)
    eeg_trial(recording, 50 * RATE, 8.0, CONFIG)
    assert 0 < reader.most <= (8 + 2 * 6) * RATE


@pytest.mark.parametrize("rate", [500, 200, 1000])
def test_rates_that_are_no_multiple_are_resampled(rate: int) -> None:
    time = np.arange(40 * rate) / rate
    signal = noise(40, rate) * 0.01
    start = 11 * rate + 37
    signal[ALL32.index("C3")] += 20 * np.sin(2 * np.pi * 10 * (time - start / rate))
    config = PrepareConfig(trial_seconds=8.0)
    windows = eeg_trial(recording_of(signal, float(rate)), start, 8.0, config).windows
    assert windows.shape == (2, 28, 512)
    got = windows[:, TSCEPTION28.index("C3")].reshape(-1)
    expected = 20 * 31 / 32 * np.sin(2 * np.pi * 10 * np.arange(1024) / 128)
    # The start is rounded to a sample of the cache's rate at most: 28 degrees at 10 Hz.
    assert np.corrcoef(got, expected)[0, 1] > 0.9
    assert got.std() == pytest.approx(expected.std(), rel=0.02)


def test_a_baseline_is_taken_off_each_electrode() -> None:
    signal = noise(40, RATE)
    with_baseline = PrepareConfig(trial_seconds=8.0, baseline="mean", baseline_seconds=3.0)
    recording = recording_of(signal, float(RATE))
    plain = eeg_trial(recording, 20 * RATE, 8.0, CONFIG).windows
    corrected = eeg_trial(recording, 20 * RATE, 8.0, with_baseline).windows
    _, whole = clean_span(recording, 0, signal.shape[1], CONFIG)
    mean = whole[:, 17 * 128 : 20 * 128].mean(axis=1)
    np.testing.assert_allclose(plain - corrected, np.tile(mean[:, None], (2, 1, 512)), atol=2e-5)
    with pytest.raises(InputError, match=r"begins 1.0 s too late for a trial at 2.0 s"):
        eeg_trial(recording, 2 * RATE, 8.0, with_baseline)


def test_own_channels_are_their_own_reference() -> None:
    names = ("Cz", "Fz", "Pz")
    signal = noise(30, RATE)[:3]
    recording = Recording(Path("x"), Memory(signal), names, [0, 1, 2], [], 512.0, 30 * RATE)
    config = PrepareConfig(trial_seconds=8.0, channels="Fz, Cz,Pz")
    windows = eeg_trial(recording, 10 * RATE, 8.0, config).windows
    assert windows.shape == (2, 3, 512)
    np.testing.assert_allclose(windows.sum(axis=1), 0, atol=1e-3)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "not finite"), (5.0, "flat")])
def test_a_dead_electrode_is_named(value: float, word: str) -> None:
    signal = noise(30, RATE)
    signal[ALL32.index("T7"), 12 * RATE : 20 * RATE] = value
    recording = recording_of(signal, 512.0)
    with pytest.raises(InputError, match=rf"x.bdf: T7 is {word} during the trial"):
        eeg_trial(recording, 12 * RATE, 8.0, CONFIG)


def test_any_format_that_mne_reads(tmp_path: Path) -> None:
    import mne

    signal = noise(20, 256)
    info = mne.create_info([name.upper() for name in ALL32], 256, "eeg")
    raw = mne.io.RawArray(signal * 1e-6, info, verbose="error")
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    recording = open_any(tmp_path / "a_raw.fif", ALL32)
    assert (recording.sfreq, recording.length) == (256.0, 20 * 256)
    np.testing.assert_allclose(recording.read(100, 200), signal[:, 100:200], rtol=1e-5)
    (tmp_path / "b.edf").write_bytes(b"0" * 300)
    with pytest.raises(InputError, match=r"cannot read .*b.edf"):
        open_any(tmp_path / "b.edf", ALL32)


def test_bad_recordings_are_named(tmp_path: Path) -> None:
    whole = write_bdf(tmp_path / "whole.bdf", {}).read_bytes()
    (tmp_path / "cut.bdf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "head.bdf").write_bytes(whole[:100])
    (tmp_path / "text.bdf").write_text("hello")
    (tmp_path / "empty.bdf").write_bytes(b"")
    for name, words in (
        ("none.bdf", "no recording at"),
        ("cut.bdf", r"cut.bdf is truncated: its header promises \d+ bytes, the file has \d+"),
        ("head.bdf", "head.bdf is not a BDF recording"),
        ("text.bdf", "text.bdf is not a BDF recording"),
        ("empty.bdf", "empty.bdf is not a BDF recording"),
    ):
        with pytest.raises(InputError, match=words):
            open_bdf(tmp_path / name)
    write_bdf(tmp_path / "a.bdf", {}, status_name="Trig")
    with pytest.raises(InputError, match="has no trigger channel"):
        open_bdf(tmp_path / "a.bdf")


def test_a_recording_that_cannot_be_brought_to_the_rate() -> None:
    with pytest.raises(InputError, match=r"recorded at 100 Hz; expected at least sfreq=128"):
        eeg_trial(recording_of(noise(30, 100), 100.0), 1000, 8.0, CONFIG)
    with pytest.raises(InputError, match=r"lasts 5.0 s; expected at least 10 s"):
        eeg_trial(recording_of(noise(5, 512), 512.0), 0, 8.0, CONFIG)
