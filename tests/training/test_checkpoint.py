from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import Split
from pycdgkd.errors import InputError
from pycdgkd.files import write_atomically
from pycdgkd.models.networks import MultimodalNet, VisualNet
from pycdgkd.training.checkpoint import load_network, save_network
from pycdgkd.training.logs import CsvLog
from pycdgkd.training.recordings import eeg_statistics

Run: TypeAlias = tuple[Path, dict[str, Any]]


def test_header_describes_the_network_and_its_video(finished: Run, cache: Path) -> None:
    net, meta = load_network(finished[0] / "student")
    assert isinstance(net, VisualNet)
    assert not net.training
    opened, split = Cache.open(cache), Split.load(finished[0] / "split.json")
    expected = {
        "role": "student",
        "preset": "nano",
        "level": None,
        "num_classes": 2,
        "n_chans": 28,
        "n_times": 128,
        "sfreq": 64.0,
        "img_size": 24,
        "frames": 2,
        "backbone": "pvt",
        "label": "valence",
        "thresholds": [5.0],
        "split_hash": split.hash,
        "cache_hash": opened.hash,
        "faces": "mtcnn",
        "min_face": 60,
        "margin": 0.1,
        "fps": 50.0,
        "frame_stride": 40,
        "window": 2.0,
    }
    assert {name: meta[name] for name in expected} == expected
    assert meta["channels"] == list(opened.channels)


def test_levels_and_statistics_come_back(finished: Run, cache: Path) -> None:
    train = Split.load(finished[0] / "split.json").train
    eeg = Cache.open(cache).eeg[train].astype(np.float64)
    for level, role in enumerate(("teacher", "assistant_1")):
        net, meta = load_network(finished[0] / role)
        assert isinstance(net, MultimodalNet)
        assert meta["level"] == level
        assert np.allclose(net.eeg.eeg_mean.numpy(), eeg.mean((0, 2)), atol=1e-4)
        assert np.allclose(net.eeg.eeg_std.numpy(), eeg.std((0, 2)), rtol=1e-5)


def test_round_trip_is_exact_and_leaves_the_generator_alone(finished: Run, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    net, meta = load_network(finished[0] / "teacher")
    assert torch.equal(torch.get_rng_state(), state)
    save_network(tmp_path / "copy", net, meta)
    first = finished[0] / "teacher" / "model.safetensors"
    second = tmp_path / "copy" / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (second, tmp_path / "plain")]
    assert modes[0] == modes[1], "others may read the weights that may read any file"


def test_missing_damaged_and_foreign_weights(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no trained network: .* expected the folder of one"):
        load_network(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes((finished[0] / "student" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="is no readable safetensors file"):
        load_network(tmp_path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"was not written by this version of pycdgkd: .*backbone"):
        load_network(tmp_path)
    _, meta = load_network(finished[0] / "student")
    tensors = load_file(finished[0] / "student" / "model.safetensors")
    tensors.pop("head.1.weight")
    save_file(tensors, path, metadata={"pycdgkd": json.dumps(meta)})
    with pytest.raises(InputError, match=r"does not fit the network .*head.1.weight"):
        load_network(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "new")]


def test_log_cuts_off_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = CsvLog(path, ["a", "b"])
    log.append([{"a": 1, "b": "x"}, {"a": 2}])
    size = log.size
    log.append([{"a": 3, "b": "lost"}])
    resumed = CsvLog(path, ["a", "b"], size)
    resumed.append([{"b": "kept", "a": 4}])
    assert path.read_text() == "a,b\n1,x\n2,\n4,kept\n"
    assert resumed.size == path.stat().st_size
    with pytest.raises(InputError, match="its checkpoint expects at least 999"):
        CsvLog(path, ["a", "b"], 999)


def test_statistics_use_the_given_samples_only(cache: Path) -> None:
    opened = Cache.open(cache)
    indices = np.arange(30, 50)
    mean, std = eeg_statistics(opened, indices)
    eeg = opened.eeg[indices].astype(np.float64)
    assert np.allclose(mean.numpy(), eeg.mean((0, 2)), atol=1e-4)
    assert np.allclose(std.numpy(), eeg.std((0, 2)), rtol=1e-5)
    assert not np.allclose(mean.numpy(), opened.eeg.mean((0, 2)), atol=1e-4)


@pytest.mark.parametrize("value", [5.3, np.nan])
def test_flat_channel_is_named(cache: Path, value: float) -> None:
    opened = Cache.open(cache)
    eeg = np.array(opened.eeg)
    eeg[:, 3] = value
    flat = Cache(opened.path, opened.manifest, opened.video, opened.frame_mask, eeg, opened.samples)
    with pytest.raises(InputError, match="EEG channel C3 is flat or not finite"):
        eeg_statistics(flat, np.arange(len(flat)))
