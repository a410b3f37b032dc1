"""``pycdgkd demo``: made-up recordings through the same chain that reads DEAP, in one folder."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycdgkd import __version__
from pycdgkd.errors import InputError

from .commands import show_results
from .progress import Progress, shown_progress

if TYPE_CHECKING:
    from pycdgkd.data.config import PrepareConfig, StudyConfig
    from pycdgkd.training.config import TrainConfig

MARKER = "demo.json"
IMG_SIZE = 48  # pixels: the face crops that the nano networks are made for


@dataclass(frozen=True)
class Size:
    """How much is recorded and how long is trained: fields of StudyConfig, training overrides."""

    study: dict[str, Any]
    training: tuple[str, ...]


# The nano networks are too small to gain much from a second thread, and on a busy machine threads
# that wait for one another cost far more: measured 15 s with one thread, 68 to 97 s with two.
SIZES = {
    "full": Size({"trials": 40, "trial_seconds": 4.0}, ("threads=1",)),
    "small": Size(
        {"subjects": 4, "trials": 10, "trial_seconds": 4.0}, ("threads=1", "optim.epochs=3")
    ),
}


@dataclass(frozen=True)
class Steps:
    """The parameters of the three steps."""

    study: StudyConfig
    prepare: PrepareConfig
    train: TrainConfig


def demo(arguments: argparse.Namespace) -> int:
    """Record, prepare, train and report; a demo that was cut off goes on where it stopped."""
    out: Path = arguments.out
    steps = _plan(SIZES[arguments.size], arguments.seed)
    _claim_folder(out, {"size": arguments.size, "seed": arguments.seed, "pycdgkd": __version__})
    run = out / "run"
    from pycdgkd.report.results import load_results

    if (run / "results.json").is_file():
        print(f"{out} holds this demo already; delete the folder to run it again")
    else:
        with shown_progress() as progress:
            _run_steps(out, run, steps, progress)
    show_results(load_results(run))
    from pycdgkd.report import write_report

    write_report(run)
    print(f"report   {write_report(run, out / 'report.html')}")
    print(f"student  {run / 'student'}")
    for clip in sorted((out / "study" / "face_video").glob("*/*.avi"))[:1]:
        print(f"try      pycdgkd predict {run / 'student'} {clip}")
    return 0


def _plan(size: Size, seed: int) -> Steps:
    from pycdgkd.data.config import PrepareConfig, StudyConfig
    from pycdgkd.training.config import load_config

    study = StudyConfig(seed=seed, **size.study)
    prepare = PrepareConfig(
        trial_seconds=study.trial_seconds, fps=float(study.fps), img_size=IMG_SIZE
    )
    return Steps(study, prepare, load_config(None, [f"seed={seed}", *size.training], "nano"))


def _claim_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or check that it is this very demo's; foreign folders stay untouched."""
    marker = out / MARKER
    if marker.is_file():
        before = _read_marker(marker)
        differing = [
            f"{key} {before.get(key)} instead of {value}"
            for key, value in settings.items()
            if before.get(key) != value
        ]
        if differing:
            raise InputError(
                f"{out} holds another demo ({', '.join(differing)}); "
                "remedy: choose another folder with --out, or delete this one"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out} exists and was not made by pycdgkd demo; expected a new or empty folder; "
            "remedy: choose another one with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _read_marker(marker: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(marker.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{marker} is damaged; expected the settings of a demo; remedy: delete {marker.parent}"
        ) from error


def _run_steps(out: Path, run: Path, steps: Steps, progress: Progress) -> None:
    """The steps that a user of DEAP takes, each skipped or resumed if it was done before."""
    from pycdgkd.data.pipeline import prepare
    from pycdgkd.data.synthetic import write_study
    from pycdgkd.training.run import train

    study, draft = out / "study", out / "study.partial"
    if not study.is_dir():
        if draft.exists():
            shutil.rmtree(draft)
        write_study(draft, steps.study, workers=min(4, os.cpu_count() or 1), progress=progress)
        draft.rename(study)
    report = prepare(study, out / "cache", steps.prepare, progress=progress)
    progress(
        f"prepared {report.samples} samples of {report.trials} trials, "
        f"skipped {len(report.skipped)}, frames without a face {report.face_miss_rate:.1%}"
    )
    train(out / "cache", run, steps.train, resume=True, progress=progress)
