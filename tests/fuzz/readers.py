"""Every reader of outside files, and files to damage for it. One more: an entry in READERS."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import archives

from pycdgkd.data import Cache, PrepareConfig, StudyConfig, prepare, write_study
from pycdgkd.data.boxes import read_boxes
from pycdgkd.data.cache import unfinished_state
from pycdgkd.data.cache_plan import read_plan
from pycdgkd.data.cache_writer import read_journal
from pycdgkd.data.deap import read_ratings
from pycdgkd.data.deap_dat import read_arrays
from pycdgkd.data.eeg import ALL32, eeg_trial, open_any, open_bdf, read_events, trial_starts
from pycdgkd.data.folder import scan as scan_folder
from pycdgkd.data.mahnob_session import movie_span, read_session
from pycdgkd.data.splits import Split, trial_split
from pycdgkd.data.tables import read_table
from pycdgkd.data.video import check_video, read_frames, read_frames_at, video_fps
from pycdgkd.errors import InputError
from pycdgkd.report.results import load_results
from pycdgkd.training.checkpoint import load_network, load_state
from pycdgkd.training.config import load_config

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
SAMPLES = {name: np.arange(9) for name in ("subject", "trial", "segment", "experiment_id")}
CONFIG = PrepareConfig(trial_seconds=4.0, low=8.0, notch=0.0)


@dataclass(frozen=True)
class Reader:
    """read: what is done with a file. share: how often it is chosen beside the others."""

    seeds: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    share: int = 1


def _cache(folder: Path) -> Path:
    """The cache of a small synthetic study, made once."""
    root, cache = folder / "study", folder / "cache"
    if not root.exists():
        config = StudyConfig(
            subjects=1, trials=1, trial_seconds=4.0, fixation=0.5, width=128, height=128, fps=10
        )
        write_study(root, config)
        options = PrepareConfig(
            trial_seconds=4.0, fps=10.0, frame_stride=20, faces="none", img_size=16
        )
        prepare(root, cache, options)
    return cache


def _real(*names: str) -> list[Path]:
    return [REAL / name for name in names if (REAL / name).is_file()]


def _bdf(folder: Path) -> list[Path]:
    noise = np.random.default_rng(0).integers(-900, 900, (32, 12 * 64), dtype=np.int32)
    status = np.full(12 * 64, 0x19FF00, np.int32)
    status[4 * 64] = 0x18FF04
    path = archives.write_bdf(
        folder / "small.bdf", dict(zip(ALL32, noise, strict=True)), status, 64
    )
    return [path]


def _read_bdf(path: Path) -> None:
    recording = open_bdf(path)
    for start in trial_starts(recording)[:2].tolist():
        config = PrepareConfig(
            trial_seconds=4.0, sfreq=recording.sfreq, low=8.0, high=20.0, notch=0.0
        )
        eeg_trial(recording, start, 4.0, config)


def _edf(folder: Path) -> list[Path]:
    import edfio

    rng = np.random.default_rng(1)
    signals = [edfio.EdfSignal(rng.normal(0, 9, 640), 64, label=name) for name in ALL32]
    edfio.Edf(signals).write(folder / "small.edf")
    return [folder / "small.edf"]


def _videos(folder: Path) -> list[Path]:
    paths = []
    for name, codec in (("a.avi", "mpeg4"), ("b.mp4", "libx264"), ("c.avi", "libx264")):
        paths.append(
            archives.write_video(
                folder / name, 30, lambda n: archives.grey(n * 8, 64, 64), codec=codec
            )
        )
    return [*paths, *_real("no_face.mp4")]


def _read_video(path: Path) -> None:
    for read in (
        lambda: check_video(path),
        lambda: video_fps(path),
        lambda: read_frames(path, [0, 7, 25]),
        lambda: read_frames_at(path, [0.0, 0.2, 0.5], 0.1),
    ):
        refused(read)


def refused(read: Callable[[], object]) -> None:
    """Bad input is told; whatever else comes out of a reader is a finding."""
    with contextlib.suppress(InputError):
        read()


def _dat(folder: Path) -> list[Path]:
    content = {"data": np.zeros((2, 3)), "labels": np.ones((2, 4), ">f4")}
    (folder / "py2.dat").write_bytes(archives.python2_pickle(content))
    paths = [folder / "py2.dat"]
    for protocol in (0, 2, 4):
        paths.append(folder / f"p{protocol}.dat")
        paths[-1].write_bytes(pickle.dumps(content, protocol=protocol))
    return paths


def _xml(folder: Path) -> list[Path]:
    (folder / "session.xml").write_text(archives.session_xml(3, 5, "69.avi"))
    return [folder / "session.xml"]


def _log(folder: Path) -> list[Path]:
    session = archives.write_mahnob_session(folder / "log", 1, 1, "107", gaze=1.0)
    return list(session.glob("*.tsv"))


def _read_log(path: Path) -> None:
    session = path.with_name("session.xml")
    session.write_text(archives.session_xml(1, 1, "107.avi"))
    log = path.with_name("P1-Rec1-All-Data-New_Section_2.tsv")
    shutil.copy(path, log)
    movie_span(read_session(session), [log])


def _tables(folder: Path) -> list[Path]:
    rows = [archives.RATINGS_HEADER, *archives.deap_ratings(1)]
    import xlwt

    book = xlwt.Workbook()
    sheet = book.add_sheet("a")
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            sheet.write(i, j, value)
    book.save(str(folder / "ratings.xls"))
    return [archives.write_csv(folder / "ratings.csv", rows, ";"), folder / "ratings.xls"]


def _trials(folder: Path) -> list[Path]:
    (folder / "v.avi").touch()
    rows = [("subject", "trial", "video", "eeg", "seconds", "mood")]
    rows += [("anna", "1", "v.avi", "v.avi", "30", "glad"), ("2", "7", "v.avi", "v.avi", "9", "3")]
    return [archives.write_csv(folder / "trials.csv", rows)]


def _read_trials(path: Path) -> None:
    root = path.parent / "root"
    root.mkdir(exist_ok=True)
    (root / "v.avi").touch()
    shutil.copy(path, root / "trials.csv")
    scan_folder(root, PrepareConfig.of("folder"))


def _box_table(folder: Path) -> list[Path]:
    rows = [("video", "second", "x1", "y1", "x2", "y2"), ("v.avi", "1", "2", "3", "40", "50")]
    return [archives.write_csv(folder / "boxes.csv", rows)]


def _read_boxes(path: Path) -> None:
    shutil.copy(path, path.with_name("boxes.csv"))
    read_boxes(path.parent)


def _cache_file(name: str) -> Callable[[Path], list[Path]]:
    return lambda folder: [_cache(folder.parent) / name]


def _read_cache_file(name: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        folder = _cache(path.parents[1])
        whole = (folder / name).read_bytes()
        try:
            shutil.copy(path, folder / name)
            cache = Cache.open(folder)
            for look in (lambda: cache.spectra, lambda: cache.face_found, lambda: cache.sfreq):
                refused(look)
            np.asarray(cache.eeg[:1]), np.asarray(cache.video[:1])
        finally:
            (folder / name).write_bytes(whole)

    return read


def _unfinished(folder: Path) -> list[Path]:
    plan = {"format": 2, "parameters": {}, "inputs": {}, "trials": [[1, 1], [1, 2]], "skipped": []}
    (folder / "plan.json").write_text(json.dumps(plan))
    entries = [{"subject": 1, "trial": 1, "rows": [{"a": 1}]}, {"subject": 1, "trial": None}]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "journal.jsonl").write_text(lines)
    return [folder / "plan.json", folder / "journal.jsonl"]


def _read_unfinished(path: Path) -> None:
    folder = path.parent / "unfinished"
    folder.mkdir(exist_ok=True)
    for name in ("plan.json", "journal.jsonl"):
        (folder / name).write_text('{"trials": [[1, 1]]}\n')
        shutil.copy(path, folder / name)
        unfinished_state(folder)
        refused(lambda: read_plan(folder))
        refused(lambda: read_journal(folder))


def _run(folder: Path) -> list[Path]:
    """Weights and checkpoint of a tiny network, a split and a configuration."""
    import torch

    from pycdgkd.models.networks import build_visual
    from pycdgkd.training.checkpoint import save_network, save_state
    from pycdgkd.training.config import preset_config, to_toml

    meta = {"role": "student", "preset": "nano", "level": None, "num_classes": 2}
    more = {"n_chans": 4, "n_times": 64, "sfreq": 64.0, "img_size": 48, "backbone": "pvt"}
    more |= {"label": "valence", "split_hash": "0", "cache_hash": "0"}
    net = build_visual("nano", num_classes=2, img_size=48)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    save_network(run, net, {**meta, **more})
    save_state(run, {"fit": {"epoch": 1}, "t": torch.ones(3)})
    (run / "config.toml").write_text(to_toml(preset_config("nano")))
    trial_split(SAMPLES, seed=0).save(run / "split.json")
    return sorted(path for path in run.iterdir() if path.is_file())


def _run_file(suffix: str) -> Callable[[Path], list[Path]]:
    return lambda folder: [path for path in _run(folder) if path.suffix == suffix]


def _read_weights(path: Path) -> None:
    folder = path.parent / "net"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / "model.safetensors")
    load_network(folder)


def _read_state(path: Path) -> None:
    folder = path.parent / "net"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / "checkpoint.pt")
    load_state(folder)


def _read_split(path: Path) -> None:
    Split.load(path).check(SAMPLES)


def _results(folder: Path) -> list[Path]:
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    figures = dict.fromkeys(("accuracy", "balanced_accuracy", "f1"), interval)
    test = {"samples": 4, "trials": 2, **figures, "confusion": [[1, 1], [1, 1]]}
    network = {
        "modalities": ["video"], "sources": [], "parameters": 3, "epochs": 1, "best_epoch": 1,
        "seconds": 1.0, "val_accuracy": 0.5, "test": test,
    }  # fmt: skip
    counts = {"samples": 4, "trials": 2, "classes": [2, 2]}
    content = {
        "pycdgkd": "0.1.0", "torch": "2", "label": "valence", "thresholds": [5.0],
        "classes": ["low", "high"], "seed": 0, "preset": "nano", "split_hash": "a",
        "cache_hash": "b", "synthetic": True, "majority": {"class": 0, "accuracy": interval},
        "counts": dict.fromkeys(("train", "val", "test"), counts), "networks": {"student": network},
        "sources": {}, "comparison": {"student_minus_control": interval}, "warnings": [],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content))
    return [folder / "results.json"]


def _read_results(path: Path) -> None:
    shutil.copy(path, path.with_name("results.json"))
    load_results(path.parent)


READERS: dict[str, Reader] = {
    "bdf": Reader(_bdf, _read_bdf, 4),
    "edf": Reader(_edf, lambda path: open_any(path, ALL32).read(0, 64), 2),
    "video": Reader(_videos, _read_video, 4),
    "dat": Reader(_dat, read_arrays, 4),
    "session.xml": Reader(_xml, read_session, 2),
    "gaze log": Reader(_log, _read_log),
    "table": Reader(_tables, read_table, 2),
    "ratings": Reader(lambda folder: _tables(folder)[:1], read_ratings, 2),
    "trials.csv": Reader(_trials, _read_trials, 2),
    "boxes.csv": Reader(_box_table, _read_boxes),
    "manifest.json": Reader(_cache_file("manifest.json"), _read_cache_file("manifest.json"), 2),
    "samples.csv": Reader(_cache_file("samples.csv"), _read_cache_file("samples.csv")),
    "eeg.npy": Reader(_cache_file("eeg.npy"), _read_cache_file("eeg.npy")),
    "frame_mask.npy": Reader(_cache_file("frame_mask.npy"), _read_cache_file("frame_mask.npy")),
    "face_found.npy": Reader(_cache_file("face_found.npy"), _read_cache_file("face_found.npy")),
    "spectra.npy": Reader(_cache_file("spectra.npy"), _read_cache_file("spectra.npy")),
    "unfinished cache": Reader(_unfinished, _read_unfinished),
    "split.json": Reader(_run_file(".json"), _read_split),
    "config.toml": Reader(_run_file(".toml"), load_config),
    "weights": Reader(_run_file(".safetensors"), _read_weights, 2),
    "checkpoint": Reader(_run_file(".pt"), _read_state, 2),
    "results.json": Reader(_results, _read_results),
}
if REAL.is_dir():
    READERS["bdf events"] = Reader(
        lambda _: _real("bdf_9_events.bdf", "biosemi_256hz_status.bdf"), read_events, 2
    )
