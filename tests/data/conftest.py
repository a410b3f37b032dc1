from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pycdgkd.data import Cache, PrepareConfig, StudyConfig, prepare, write_study

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"

# Strong evidence and little rating noise: with eight trials every one must come out right.
STUDY = StudyConfig(
    subjects=2,
    trials=4,
    video_strength=2.0,
    eeg_strength=2.0,
    label_noise=0.0,
    rating_noise=0.2,
    seed=5,
)
PREPARE = PrepareConfig(trial_seconds=8.0, img_size=48)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study") / "root"
    write_study(root, STUDY)
    return root


@pytest.fixture(scope="session")
def cache_folder(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "cache"
    prepare(study, folder, PREPARE)
    return folder


@pytest.fixture(scope="session")
def cache(cache_folder: Path) -> Cache:
    return Cache.open(cache_folder)


@pytest.fixture(scope="session")
def real() -> Path:
    """Folder of the real recordings."""
    if not SHARED.is_dir():
        pytest.skip("real recordings not found: ../shared/data")
    return SHARED


def frontal_asymmetry(eeg: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(n, 28, 512) -> (n,) mean log ratio of right to left alpha power, six frontal pairs."""
    frequency = np.fft.rfftfreq(eeg.shape[-1], 1 / 128)
    power = np.abs(np.fft.rfft(eeg * np.hanning(eeg.shape[-1]))) ** 2
    alpha = np.log(power[..., (frequency >= 8) & (frequency <= 13)].sum(-1))
    return (alpha[:, 14:20] - alpha[:, :6]).mean(axis=1)
