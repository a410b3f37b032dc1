"""Every method learns on a synthetic study, from raw recordings to the tables that show it.

A trial has one window, so that test samples are independent and the binomial test is exact.
"""

from __future__ import annotations

import csv
import html
import math
from pathlib import Path

import pytest

from pycdgkd.cli import main
from pycdgkd.data import PrepareConfig, StudyConfig, prepare, write_study
from pycdgkd.experiments.catalogue import METHODS, TABLES

# Faces and EEG that show the emotion clearly: a hundred trials must do to learn it.
STUDY = StudyConfig(
    subjects=6, trials=36, trial_seconds=4.0,
    video_strength=8.0, eeg_strength=4.0, label_noise=0.0, rating_noise=0.2, seed=3,
)  # fmt: skip
PREPARE = PrepareConfig(trial_seconds=4.0, img_size=24, frame_stride=100)
# The same for all methods, at the preset's learning rate; half of the trials to learn from, a third
# to be judged by.
SETTINGS = (
    *("optim.epochs=18", "optim.patience=18", "optim.warmup=20"),
    *("split.fractions=0.5,0.15,0.35", "threads=1"),
)
# Six networks of a method that has fifteen: there they take as long as all other methods.
OWN_SETTINGS = ("cdgkd-noisy.distill.folds=2", "cdgkd-noisy.assistants=1")
LEVEL = 1e-3 / len(METHODS)  # that any of them passes by luck: one in a thousand


def by_luck(right: int, count: int, share: float) -> float:
    """Probability of as many right answers or more where each is right with probability share."""
    return sum(
        math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(right, count + 1)
    )


def test_luck_is_told_from_skill() -> None:
    assert by_luck(0, 7, 0.3) == pytest.approx(1.0)
    assert by_luck(7, 7, 0.5) == pytest.approx(2**-7)
    assert by_luck(44, 76, 0.5) > 0.05  # 58 %
    assert by_luck(56, 76, 0.5) < LEVEL < by_luck(53, 76, 0.5)  # 74 and 70 %


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all methods' runs and all tables, by the command."""
    folder = tmp_path_factory.mktemp("nano")
    write_study(folder / "study", STUDY)
    prepare(folder / "study", folder / "cache", PREPARE)
    command = ["experiment", "all", str(folder / "cache"), "--out", str(folder / "out")]
    command += ["--seeds", "1", "--labels", "valence", "--preset", "nano"]
    command += ["--methods", ",".join(METHODS)]
    command += [word for setting in SETTINGS for word in ("--set", setting)]
    command += [word for setting in OWN_SETTINGS for word in ("--setting", setting)]
    assert main(command) == 0
    return folder / "out"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_clearly_above_chance(method: str, out: Path) -> None:
    (path,) = out.glob(f"runs/valence/seed_00/fold_01/{method}/predictions.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["subject"], row["trial"]) for row in rows}) == len(rows) == 76
    labels = [row["label"] for row in rows]
    right = sum(row["label"] == row["predicted"] for row in rows)
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    assert majority < 0.6
    assert by_luck(right, len(rows), majority) < LEVEL, f"{right} of {len(rows)} right"


@pytest.mark.parametrize("table", TABLES)
def test_every_method_stands_in_its_tables(table: str, out: Path) -> None:
    with (out / f"{table}.csv").open(newline="") as file:
        shown = [row["method"] for row in csv.DictReader(file)]
    assert shown == [*TABLES[table].rows, "cdgkd-noisy"]
    page = html.unescape((out / f"{table}.html").read_text(encoding="utf-8"))
    for name in shown:
        assert METHODS[name].title in page, name
