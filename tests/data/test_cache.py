from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pycdgkd.data import Cache
from pycdgkd.data.cache import read_samples, sample_columns, write_samples
from pycdgkd.errors import InputError

LABELS = ("valence", "arousal", "dominance", "liking")


def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_contents(cache: Cache) -> None:
    assert len(cache) == 16
    assert cache.video.shape == (16, 5, 3, 48, 48)
    assert cache.frame_mask.shape == (16, 5)
    assert cache.frame_mask.all()
    assert cache.eeg.shape == (16, 28, 512)
    assert (cache.video.dtype, cache.eeg.dtype) == (np.uint8, np.float32)
    assert isinstance(cache.video, np.memmap)
    assert isinstance(cache.eeg, np.memmap)
    assert tuple(cache.samples) == sample_columns(LABELS)
    assert cache.labels == {name: [] for name in LABELS}
    assert cache.spectra.shape == (2, 2, 65)
    assert np.isfinite(cache.spectra).all()
    assert cache.face_found.sum(axis=1).tolist() == cache.samples["faces_found"].tolist()
    assert cache.samples["sample"].tolist() == list(range(16))
    assert cache.sfreq == 128.0
    assert cache.channels[:3] == ("Fp1", "AF3", "F3")
    assert len(cache.channels) == 28
    assert cache.synthetic
    assert len(cache.hash) == 64


def test_nothing_unfinished_is_left(cache_folder: Path) -> None:
    assert sorted(path.name for path in cache_folder.iterdir()) == [
        "eeg.npy", "face_found.npy", "frame_mask.npy", "manifest.json", "samples.csv",
        "spectra.npy", "video.npy",
    ]  # fmt: skip


def test_arrays_cannot_be_written(cache: Cache) -> None:
    with pytest.raises(ValueError, match="read-only"):
        cache.eeg[0, 0, 0] = 1.0


def test_floats_of_the_table_read_back_exactly(tmp_path: Path) -> None:
    row = {
        "sample": 0, "subject": 1, "trial": 2, "experiment_id": 3, "segment": 4,
        "start_s": 0.1 + 0.2, "valence": 1 / 3, "arousal": 9.0, "dominance": 5.01, "liking": 1.0,
        "faces_found": 5,
    }  # fmt: skip
    write_samples(tmp_path / "samples.csv", [row], LABELS)
    read = read_samples(tmp_path / "samples.csv", LABELS)
    assert {name: column[0] for name, column in read.items()} == row


def test_not_a_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder; remedy: pycdgkd prepare"):
        Cache.open(tmp_path / "none")
    with pytest.raises(InputError, match=r"is not a cache: it has no manifest.json"):
        Cache.open(tmp_path)


def test_an_unfinished_cache_names_its_state_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"trials": [[1, 1], [1, 2], [1, 3]]}))
    (tmp_path / "parts" / "001").mkdir(parents=True)
    (tmp_path / "journal.jsonl").write_text('{"subject": 1, "trial": 1}\n')
    (tmp_path / "parts/001/journal.jsonl").write_text('{"subject": 1, "trial": 2}\n')
    with pytest.raises(
        InputError, match=r"unfinished \(2 of 3 trials done\); remedy: run the same"
    ):
        Cache.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_manifest(cache_folder: Path, tmp_path: Path, content: str) -> None:
    folder = copy(cache_folder, tmp_path)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest.json is damaged"):
        Cache.open(folder)


def test_another_format(cache_folder: Path, tmp_path: Path) -> None:
    folder = copy(cache_folder, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(InputError, match="has format 99; expected 2"):
        Cache.open(folder)


def test_damaged_arrays_are_named(cache_folder: Path, tmp_path: Path) -> None:
    folder = copy(cache_folder, tmp_path)
    whole = (folder / "eeg.npy").read_bytes()
    (folder / "eeg.npy").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot read .*eeg.npy"):
        Cache.open(folder)
    np.save(folder / "eeg.npy", np.zeros((16, 28, 512)))
    with pytest.raises(InputError, match=r"eeg.npy holds float64 with 3 axes; expected float32"):
        Cache.open(folder)
    np.save(folder / "eeg.npy", np.zeros((15, 28, 512), np.float32))
    with pytest.raises(InputError, match="manifest promises 16 samples"):
        Cache.open(folder)
    (folder / "eeg.npy").unlink()
    with pytest.raises(InputError, match=r"cannot read .*eeg.npy"):
        Cache.open(folder)


def test_a_damaged_table_is_named(cache_folder: Path, tmp_path: Path) -> None:
    folder = copy(cache_folder, tmp_path)
    text = (folder / "samples.csv").read_text()
    (folder / "samples.csv").write_text(text.replace("valence", "value"))
    with pytest.raises(InputError, match="column 'valence' is missing or holds no numbers"):
        Cache.open(folder)
