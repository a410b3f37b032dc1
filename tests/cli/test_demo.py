"""The demo for real, at the smallest size; then the commands on what it left."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import pytest

from pycdgkd.cli import demo as demo_module
from pycdgkd.cli import main
from pycdgkd.report.table import SYNTHETIC_NOTE

# mtcnn is only looked for: its import needs TensorFlow, its weight files do not.
for package in ("mne", "edfio", "av", "mtcnn", "jinja2", "matplotlib", "safetensors"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

TINY = demo_module.Size(
    {"subjects": 2, "trials": 10, "trial_seconds": 4.0},
    ("threads=1", "optim.epochs=2", "assistants=1"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of one tiny demo that was cut off while it wrote its recordings."""
    out = tmp_path_factory.mktemp("demo") / "here"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo_module.SIZES, "small", TINY)
        patch.setattr(demo_module.os, "cpu_count", lambda: 1)
        (out / "study.partial" / "face_video").mkdir(parents=True)
        marker = {"size": "small", "seed": 3, "pycdgkd": demo_module.__version__}
        (out / "demo.json").write_text(json.dumps(marker), encoding="utf-8")
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            status = main(["demo", "--out", str(out), "--size", "small", "--seed", "3"])
    assert status == 0, text.getvalue()
    return out, text.getvalue()


def test_the_demo_leaves_everything(finished: tuple[Path, str]):
    out, text = finished
    assert not (out / "study.partial").exists()
    assert (out / "study" / "truth.csv").is_file()
    assert (out / "cache" / "manifest.json").is_file()
    report = (out / "report.html").read_text(encoding="utf-8")
    assert SYNTHETIC_NOTE in report
    assert report == (out / "run" / "report.html").read_text(encoding="utf-8")
    results = json.loads((out / "run" / "results.json").read_text(encoding="utf-8"))
    assert (results["seed"], results["synthetic"]) == (3, True)
    assert list(results["networks"]) == ["teacher", "assistant_1", "student", "control"]
    for name, entry in results["networks"].items():
        accuracy = f"{entry['test']['accuracy']['value']:.3f}"
        line = next(s for s in text.splitlines() if s.startswith(name.replace("_", " ")))
        assert accuracy in line
    assert SYNTHETIC_NOTE in text


def test_a_finished_demo_is_shown_again(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(demo_module.SIZES, "small", TINY)
    out, first = finished
    assert main(["demo", "--out", str(out), "--size", "small", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{out} holds this demo already; delete the folder to run it again")
    assert text.split("valence above")[1] == first.split("valence above")[1]


def test_another_demos_folder_is_refused(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
):
    assert main(["demo", "--out", str(finished[0]), "--seed", "4"]) == 2
    error = capsys.readouterr().err
    assert "holds another demo (size small instead of full, seed 3 instead of 4)" in error


def test_a_damaged_marker_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "demo.json").write_text("[1", encoding="utf-8")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "demo.json is damaged" in capsys.readouterr().err


def test_prepare_tells_a_finished_cache(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
):
    out = finished[0]
    options = ["--trial-seconds", "4", "--img-size", "48"]
    assert main(["prepare", "deap", str(out / "study"), str(out / "cache"), *options]) == 0
    text = capsys.readouterr().out
    assert "prepared 20 samples of 20 trials (20 done before), skipped 0" in text
    assert f"next     pycdgkd train {out / 'cache'} --out runs/NAME" in text
    assert main(["prepare", "deap", str(out / "study"), str(out / "cache")]) == 2
    assert "img_size" in capsys.readouterr().err


def test_train_names_a_used_folder_and_resumes_a_finished_run(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
):
    cache, run = str(finished[0] / "cache"), str(finished[0] / "run")
    assert main(["train", cache, "--out", run]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", cache, "--out", run, "--resume"]) == 0
    text = capsys.readouterr().out
    assert "student minus control" in text
    assert f"report   {Path(run) / 'report.html'}" in text
    assert main(["train", cache, "--out", run, "--resume", "--seed", "9"]) == 2
    assert "seed: 9 instead of 3" in capsys.readouterr().err


def test_evaluate_agrees_or_says_where_not(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
):
    run = finished[0] / "run"
    assert main(["evaluate", str(run)]) == 0
    assert "are those of results.json" in capsys.readouterr().out
    path = run / "results.json"
    right = path.read_text(encoding="utf-8")
    results = json.loads(right)
    results["networks"]["student"]["test"]["accuracy"]["value"] = 0.123
    try:
        path.write_text(json.dumps(results), encoding="utf-8")
        assert main(["evaluate", str(run)]) == 1
    finally:
        path.write_text(right, encoding="utf-8")
    text = capsys.readouterr().out
    assert "differs  networks/student/test/accuracy/value: 0.123 in results.json" in text
    assert "are not those of results.json" in text


def test_the_student_judges_a_clip_of_the_study(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    out = finished[0]
    clip = out / "study" / "face_video" / "s02" / "s02_trial05.avi"
    stem = tmp_path / "mood"
    assert main(["predict", str(out / "run" / "student"), str(clip), "--out", str(stem)]) == 0
    assert "4.0 s, 1 windows, 0 without a face" in capsys.readouterr().out
    cells = (tmp_path / "mood.csv").read_text(encoding="utf-8").splitlines()[1].split(",")
    predictions = finished[0] / "run" / "student" / "predictions.csv"
    assert predictions.is_file()
    assert cells[-1] == "5"
    assert main(["predict", str(out / "run" / "teacher"), str(clip)]) == 2
    assert "needs EEG" in capsys.readouterr().err
