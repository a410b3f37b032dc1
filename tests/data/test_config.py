from __future__ import annotations

import subprocess
import sys

import pytest

from pycdgkd.data.config import (
    PrepareConfig,
    StudyConfig,
    config_from_dict,
    config_to_dict,
    parameter_hash,
)
from pycdgkd.errors import InputError


def test_deap_window_holds_five_frames_and_fifteen_windows() -> None:
    config = PrepareConfig()
    assert config.frames_per_window == 5
    assert config.n_times == 512
    assert len(config.window_starts(60.0)) == 15
    assert config.window_starts(60.0)[-1] == 56.0


def test_windows_may_overlap_and_a_rest_is_left_out() -> None:
    config = PrepareConfig(trial_seconds=9.0, window=4.0, stride=2.0)
    assert config.window_starts(8.0) == (0.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "edf"}, "source must be one of bdf, dat; got 'edf'"),
        ({"channels": "28"}, "tsception28, all32"),
        ({"faces": "haar"}, "mtcnn, boxes, none"),
        ({"channels": "Fz,,Cz"}, "separated by commas, each once; got 'Fz,,Cz'"),
        ({"channels": "Fz,fz"}, "each once"),
        ({"labels": "5"}, "labels must be columns"),
        ({"subjects": "1,x"}, "subjects must be 'all' or numbers as in 1,2,7"),
        ({"timing": "fps"}, "count, stamps"),
        ({"baseline": "z"}, "none, mean"),
        ({"sfreq": 0.0}, "sfreq"),
        ({"low": 50.0}, "low must be below high"),
        ({"sfreq": 100.0}, "at least 112.5"),
        ({"window": 61.0}, "longer than trial_seconds"),
        ({"window": 0.3, "stride": 0.3}, "no whole number of samples"),
        ({"img_size": 4}, "img_size"),
        ({"frame_stride": 0}, "frame_stride"),
        ({"min_face": 11}, "min_face"),
        ({"margin": float("nan")}, "margin"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        PrepareConfig(**change)  # type: ignore[arg-type]  # the wrong types are the point
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subjects": 0}, "subjects"),
        ({"trials": 100}, "at most 99"),
        ({"label_noise": 0.6}, "label_noise"),
        ({"width": 101}, "width"),
        ({"eeg_strength": -1.0}, "eeg_strength"),
    ],
)
def test_a_wrong_study_is_refused(change: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        StudyConfig(**change)  # type: ignore[arg-type]  # the wrong values are the point


def test_round_trip_and_unknown_key() -> None:
    config = PrepareConfig(img_size=48, trial_seconds=8.0)
    assert config_from_dict(PrepareConfig, config_to_dict(config)) == config
    with pytest.raises(InputError, match=r"unknown key 'img_sice'.*nearest known: 'img_size'"):
        config_from_dict(PrepareConfig, {"img_sice": 48})


def test_the_hash_sees_every_parameter() -> None:
    base = PrepareConfig()
    other = {
        "sfreq": 256.0, "channels": "all32", "notch": 60.0, "low": 1.0, "high": 40.0, "window": 2.0,
        "stride": 2.0, "trial_seconds": 30.0, "fps": 25.0, "frame_stride": 20, "img_size": 48,
        "margin": 0.2, "faces": "none", "min_face": 40, "video_offset": 3.0,
        "source": "dat", "subjects": "1", "labels": "liking", "baseline": "mean",
        "baseline_seconds": 1.0, "timing": "stamps", "frames": 3,
    }  # fmt: skip
    assert set(other) == set(config_to_dict(base))
    values = [config_from_dict(PrepareConfig, {name: value}) for name, value in other.items()]
    hashes = {parameter_hash(config) for config in [base, *values]}
    assert len(hashes) == len(other) + 1
    assert parameter_hash(PrepareConfig()) == parameter_hash(base)


def test_configuration_and_package_import_nothing_heavy() -> None:
    code = (
        "import sys, pycdgkd.data, pycdgkd.data.config as c; c.PrepareConfig();"
        "print([m for m in ('numpy','torch','mne','av','edfio','mtcnn','tensorflow') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
