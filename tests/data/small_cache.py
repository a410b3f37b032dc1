"""A small cache in the format of ``pycdgkd prepare``, whose labels can be learned in seconds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from pycdgkd.data.cache import FORMAT, MANIFEST, cache_hash, write_samples
from pycdgkd.data.config import PrepareConfig, config_to_dict, parameter_hash
from pycdgkd.training.config import OptimConfig, SplitConfig, preset_config

SUBJECTS, TRIALS, SEGMENTS = 6, 10, 2
FRAMES, SIZE, CHANNELS, SFREQ, WINDOW = 2, 24, 28, 64, 2.0

RATINGS = ("valence", "arousal", "dominance", "liking")
LABELS: dict[str, list[str]] = {name: [] for name in RATINGS} | {"mood": ["calm", "glad", "sad"]}

# The whole chain in a few seconds.
QUICK = replace(
    preset_config("nano"),
    assistants=1,
    optim=OptimConfig(epochs=3, batch_size=16, lr=2e-3, warmup=6, patience=3),
    split=SplitConfig(fractions=(0.6, 0.2, 0.2)),
)


def write_cache(folder: Path, *, seed: int = 0, strength: float = 1.0) -> Path:
    """Valence shows in the brightness of the lower half of the face and in left-right EEG power."""
    rng = np.random.default_rng(seed)
    n = SUBJECTS * TRIALS * SEGMENTS
    shape = (SUBJECTS, TRIALS, SEGMENTS)
    subject, trial, segment = (axis.ravel() for axis in np.indices(shape))
    side = np.repeat(rng.permuted(np.tile([-1.0, 1.0], SUBJECTS * TRIALS // 2)), SEGMENTS)
    video = rng.normal(120.0, 25.0, (n, FRAMES, 3, SIZE, SIZE))
    video[:, :, :, SIZE // 2 :] += 30.0 * strength * side[:, None, None, None, None]
    n_times = int(WINDOW * SFREQ)
    eeg = rng.normal(0.0, 10.0, (n, CHANNELS, n_times)) + rng.normal(0.0, 3.0, (CHANNELS, 1))
    wave = 10.0 * strength * np.sin(2 * np.pi * 10.0 * np.arange(n_times) / SFREQ)
    eeg[:, : CHANNELS // 2] += (side > 0)[:, None, None] * wave
    eeg[:, CHANNELS // 2 :] += (side < 0)[:, None, None] * wave
    mask = np.ones((n, FRAMES), dtype=bool)
    mask[rng.random(n) < 0.1, -1] = False
    video[~mask] = 0.0
    folder.mkdir(parents=True)
    np.save(folder / "video.npy", video.clip(0, 255).astype(np.uint8))
    np.save(folder / "frame_mask.npy", mask)
    np.save(folder / "eeg.npy", eeg.astype(np.float32))
    columns = {
        "sample": np.arange(n),
        "subject": subject + 1,
        "trial": trial + 1,
        "experiment_id": trial + 1,
        "segment": segment,
        "start_s": segment * WINDOW,
        "valence": 5.0 + 2.0 * side,
        "arousal": np.full(n, 5.0),
        "dominance": np.full(n, 6.0),
        "liking": 5.0 - 2.0 * side,
        "mood": trial % 3,
        "faces_found": mask.sum(1),
    }
    rows = [{name: column[i].item() for name, column in columns.items()} for i in range(n)]
    write_samples(folder / "samples.csv", rows, tuple(LABELS))
    _write_manifest(folder, n, f"toy {seed} {strength}")
    return folder


def _write_manifest(folder: Path, n: int, inputs: str) -> None:
    config = PrepareConfig(
        sfreq=SFREQ, high=25.0, window=WINDOW, stride=WINDOW, trial_seconds=4.0, img_size=SIZE
    )
    manifest = {
        "format": FORMAT,
        "samples": n,
        "parameters": config_to_dict(config),
        "channels": [f"C{index}" for index in range(CHANNELS)],
        "labels": LABELS,
        "dataset": "folder",
        "skipped": [],
        "subjects": {},
        "stimuli": {},
        "face_miss_rate": 0.1,
        "face_miss_rates": {},
        "synthetic": True,
        "hash": cache_hash(parameter_hash(config), hashlib.sha256(inputs.encode()).hexdigest()),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
