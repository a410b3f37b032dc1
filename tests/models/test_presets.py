from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest

from pycdgkd import models
from pycdgkd.errors import InputError
from pycdgkd.models.presets import EEG_LEVELS, PRESETS, eeg_level, get_preset


def test_presets_come_without_torch_and_numpy() -> None:
    code = (
        "import sys\n"
        "from pycdgkd.models.presets import PRESETS\n"
        "assert set(PRESETS) == {'paper', 'nano'}\n"
        "print([m for m in ('torch', 'numpy', 'timm', 'safetensors') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_models_never_import_timm_unasked() -> None:
    code = "import sys, pycdgkd.models.networks; print('timm' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_paper_preset_is_pvt_tiny_with_equal_feature_widths() -> None:
    paper = PRESETS["paper"]
    assert (paper.img_size, paper.patch_size) == (224, 4)
    assert paper.embed_dims == (64, 128, 320, 512)
    assert paper.depths == (2, 2, 2, 2)
    assert (paper.feature_dim, paper.num_temporal, paper.num_spatial) == (768, 15, 15)
    assert (paper.hidden, paper.dropout) == (128, 0.5)


def test_preset_names_match_and_presets_are_frozen() -> None:
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert get_preset(name) is preset
        assert get_preset(preset) is preset
        with pytest.raises(dataclasses.FrozenInstanceError):
            preset.hidden = 1  # type: ignore[misc]  # the point of the test


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown network preset 'nanno'.*did you mean 'nano'"):
        get_preset("nanno")


def test_levels_simplify_and_the_last_repeats() -> None:
    assert EEG_LEVELS[0] == ((0.5, 0.25, 0.125), ("global", "hemisphere"))
    assert EEG_LEVELS[-1] == ((0.5,), ())
    assert [eeg_level(i) for i in range(len(EEG_LEVELS))] == list(EEG_LEVELS)
    assert eeg_level(99) == EEG_LEVELS[-1]
    for (windows, spatial), (fewer_windows, fewer_spatial) in itertools.pairwise(EEG_LEVELS):
        assert set(fewer_windows) <= set(windows)
        assert set(fewer_spatial) <= set(spatial)


def test_negative_level_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be 0 \(teacher\) or more; got -1"):
        eeg_level(-1)


def test_every_public_name_resolves() -> None:
    for name in models.__all__:
        assert getattr(models, name) is not None
    assert set(models.__all__) <= set(dir(models))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = models.nothing
