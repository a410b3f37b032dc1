from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from pycdgkd.errors import InputError
from pycdgkd.models.presets import PRESETS as NETWORK_PRESETS
from pycdgkd.training.config import (
    PRESETS,
    OptimConfig,
    SplitConfig,
    TrainConfig,
    config_differences,
    config_values,
    load_config,
    preset_config,
    to_toml,
)


def test_defaults_are_those_of_the_paper() -> None:
    config = load_config()
    assert config.preset == "paper"
    assert (config.optim.lr, config.optim.batch_size) == (1e-4, 128)
    assert (config.optim.epochs, config.optim.patience) == (100, 15)
    assert (config.teacher.proto_weight, config.teacher.momentum, config.teacher.scale) == (
        0.5,
        0.2,
        1.0,
    )
    distill = config.distill
    assert (distill.kd_weight, distill.temperature, distill.direction) == (0.5, 2.0, "reverse")
    assert (distill.strategy, distill.drop_prob, distill.temperature_power) == ("subset", 0.5, 0)
    assert (config.assistants, config.thresholds, config.split.fractions) == (
        2,
        (5.0,),
        (0.8, 0.1, 0.1),
    )
    assert config.roles == ("teacher", "assistant_1", "assistant_2", "student", "control")


def test_every_preset_has_networks() -> None:
    assert set(PRESETS) == set(NETWORK_PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_toml_round_trip(tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(
        preset_config(name),
        encoder_weights='C:\\weights "best"\n\u00e9.pth',
        optim=OptimConfig(lr=3.3e-7, micro_batch=4),
        split=SplitConfig(fractions=(0.7, 0.2, 0.1), seed=9),
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert config_differences(config, load_config(path)) == []


def test_override_beats_file_and_file_beats_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('preset = "nano"\n[optim]\nepochs = 7\nlr = 1\n', encoding="utf-8")
    nano = preset_config("nano")
    config = load_config(path, ["optim.epochs = 9", "split.fractions=[0.6, 0.2, 0.2]"])
    assert (config.preset, config.optim.epochs, config.optim.lr) == ("nano", 9, 1.0)
    assert config.optim.batch_size == nano.optim.batch_size
    assert config.split.fractions == (0.6, 0.2, 0.2)
    paper = load_config(path, preset="paper")
    assert (paper.preset, paper.optim.batch_size, paper.optim.epochs) == ("paper", 128, 7)
    assert load_config(None, ["preset=nano"], "paper") == nano


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.batchsize=1", "unknown configuration key .* nearest known: 'optim.batch_size'"),
        ("lr=1", "nearest known: 'optim.lr'"),
        ("distil.kd_weigth=1", "nearest known: 'distill.kd_weight'"),
        ("sed=1", "nearest known: 'seed'"),
        ("optim.lr", "must read key=value"),
        ("optim.lr=fast", "optim.lr must be a number; got 'fast'"),
        ("optim.epochs=1.5", "optim.epochs must be a whole number; got '1.5'"),
        ("optim.lr=nan", "optim.lr must be a finite number above 0"),
        ("optim.lr=0", "optim.lr must be a finite number above 0"),
        ("optim.epochs=0", "optim.epochs must be a finite number of at least 1"),
        ("optim.micro_batch=129", "optim.micro_batch must be a finite number from 0 to 128"),
        ("optim.weight_decay=-1", "optim.weight_decay"),
        ("optim.warmup=-1", "optim.warmup must be a finite number of at least 0"),
        ("teacher.proto_weight=1.1", "teacher.proto_weight must be a finite number from 0 to 1"),
        ("teacher.momentum=1", "teacher.momentum must be a number from 0 to below 1"),
        ("teacher.scale=0", "teacher.scale must be a finite number above 0"),
        ("distill.kd_weight=-0.1", "distill.kd_weight"),
        ("distill.temperature=0", "distill.temperature"),
        ("distill.temperature_power=-1", "distill.temperature_power"),
        ("distill.direction=backward", "must be one of reverse, forward; got 'backward'"),
        ("distill.strategy=some", "must be one of subset, all, bernoulli_sum, drop_one"),
        ("distill.drop_prob=1", "distill.drop_prob must be a number from 0 to below 1"),
        ("split.fractions=0.9,0.1", "three positive numbers that sum to 1; got 0.9, 0.1"),
        ("split.fractions=0.9,0.1,x", "split.fractions must be a list of numbers"),
        ("split.seed=-1", "split.seed"),
        ("preset=huge", "preset must be one of paper, nano; got 'huge'"),
        ("label=", "label must name a column of the cache"),
        ("ties=middle", "ties must be one of low, high, drop"),
        ("split.kind=random", "split.kind must be one of trial, stratified"),
        ("split.fold=0", "split.fold"),
        ("thresholds=6,5", "thresholds must be finite numbers in ascending order; got 6, 5"),
        ("threshold=5", "nearest known: 'thresholds'"),
        ("assistants=-1", "assistants"),
        ("threads=-1", "threads"),
        ("backbone=resnet", "backbone must be 'pvt' or 'timm:NAME'"),
        ("device=tpu", "device must be auto, cpu, cuda or cuda:N"),
        ("seed=-3", "seed must be a finite number of at least 0"),
    ],
)
def test_bad_override_is_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed = [", "is not valid TOML"),
        ("sed = 1", "nearest known: 'seed'"),
        ("[optim]\nlr = true", "optim.lr must be a number; got True"),
        ("[optim]\nepochs = 2.0", "optim.epochs must be a whole number; got 2.0"),
        ("[optim]\nlr = 'x'", "optim.lr must be a number"),
        ("label = 3", "label must be text; got 3"),
        ("optim = 3", "unknown configuration key 'optim'"),
        ("[split]\nfractions = 3", "split.fractions must be a list of numbers; got 3"),
        ("[split]\nfractions = ['a']", "split.fractions must be a number; got 'a'"),
    ],
)
def test_bad_file_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the configuration .*No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"label = '\xe9'")
    with pytest.raises(InputError, match="is not valid TOML"):
        load_config(tmp_path / "latin.toml")


def test_differences_name_key_and_both_values() -> None:
    other = dataclasses.replace(TrainConfig(), optim=OptimConfig(lr=0.5))
    assert config_differences(TrainConfig(), other) == ["optim.lr: 0.0001 instead of 0.5"]
    assert config_values(other)["optim.lr"] == 0.5


def test_configuration_needs_the_standard_library_only() -> None:
    code = (
        "import sys; from pycdgkd.training.config import load_config; load_config(); "
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
