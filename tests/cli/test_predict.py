"""Prediction on clips: which frames are read, what the network says of them, what has no face."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pycdgkd.cli import main
from pycdgkd.errors import InputError
from pycdgkd.models.networks import build_multimodal, build_visual
from pycdgkd.predict import (
    Prediction,
    Sampling,
    Window,
    _window_frames,
    check_inputs,
    predict_clip,
    write_picture,
    write_table,
)
from pycdgkd.training.checkpoint import save_network

av = pytest.importorskip("av")
pytest.importorskip("safetensors")

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
META: dict[str, Any] = {
    "role": "student",
    "preset": "nano",
    "level": None,
    "num_classes": 2,
    "classes": ["low", "high"],
    "n_chans": 28,
    "n_times": 512,
    "sfreq": 128.0,
    "img_size": 48,
    "backbone": "pvt",
    "label": "arousal",
    "split_hash": "0",
    "cache_hash": "0",
    "frames": 5,
    "frame_stride": 40,
    "fps": 50.0,
    "window": 4.0,
    "margin": 0.1,
    "min_face": 60,
    "faces": "mtcnn",
}


def shared(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} of the shared recordings is not there")
    return path


def save_student(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    meta = {**META, **changes}
    save_network(folder, build_visual("nano", img_size=meta["img_size"]), meta)
    return folder


def write_clip(path: Path, frames: int, fps: int) -> Path:
    """A clip whose frame n is grey of brightness 2n."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "rgb24"
        for number in range(frames):
            pixels = np.full((64, 96, 3), 2 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers_of(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 2) for frame in frames]


@pytest.mark.parametrize(
    ("fps", "numbers", "stride"),
    [
        (50.0, [0, 40, 80, 120, 160], 40),
        (30.0, [0, 24, 48, 72, 96], 24),
        (25.0, [0, 20, 40, 60, 80], 20),
        (30000 / 1001, [0, 24, 48, 72, 96], 1),
    ],
)
def test_frames_keep_the_spacing_of_training(fps: float, numbers: list[int], stride: int):
    sampling = Sampling(fps, window=4.0, frames=5, spacing=0.8)
    assert sampling.numbers(0) == numbers
    assert sampling.stride == stride


@given(fps=st.floats(0.5, 240), window=st.integers(0, 2000))
def test_each_frame_is_the_nearest_in_time(fps: float, window: int):
    sampling = Sampling(fps, window=4.0, frames=5, spacing=0.8)
    numbers = sampling.numbers(window)
    wanted = [4.0 * window + 0.8 * j for j in range(5)]
    assert numbers == sorted(numbers)
    for number, time in zip(numbers, wanted, strict=True):
        assert abs(number / fps - time) <= 0.5 / fps + 1e-9
        assert number % sampling.stride == 0


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (102, [[0, 20, 40, 60, 80]]),  # one frame of the second window is too little
        (125, [[0, 20, 40, 60, 80]]),
        (127, [[0, 20, 40, 60, 80]]),
        (50, [[0, 20, 40]]),  # the only window counts, whatever it has
        (1, [[0]]),
    ],
)
def test_windows_of_a_clip(tmp_path: Path, frames: int, expected: list[list[int]]):
    clip = write_clip(tmp_path / "clip.mov", frames, fps=25)
    sampling = Sampling(25.0, window=4.0, frames=5, spacing=0.8)
    assert [numbers_of(window) for window in _window_frames(clip, sampling)] == expected


def test_a_last_window_with_half_of_its_frames_counts(tmp_path: Path):
    clip = write_clip(tmp_path / "clip.mov", 125, fps=10)
    sampling = Sampling(10.0, window=5.0, frames=4, spacing=1.25)
    found = [numbers_of(window) for window in _window_frames(clip, sampling)]
    assert found == [[0, 13, 25, 38], [50, 63, 75, 88], [100, 113]]


def test_a_clip_with_few_frames_a_second_repeats_them(tmp_path: Path):
    clip = write_clip(tmp_path / "clip.mov", 9, fps=1)
    sampling = Sampling(1.0, window=4.0, frames=5, spacing=0.8)
    found = [numbers_of(window) for window in _window_frames(clip, sampling)]
    assert found == [[0, 1, 2, 2, 3], [4, 5, 6, 6, 7]]


def test_probabilities_are_the_networks(tmp_path: Path):
    from pycdgkd.data.faces import track_crops
    from pycdgkd.data.video import read_frames
    from pycdgkd.training.checkpoint import load_network

    student = save_student(tmp_path / "student", faces="none")
    clip = write_clip(tmp_path / "clip.mov", 120, fps=25)
    prediction = predict_clip(student, clip)
    frames, _ = read_frames(clip, [0, 20, 40, 60, 80])
    tracked = track_crops(frames, None, size=48, margin=0.1)
    assert tracked is not None
    with torch.no_grad():
        logits = load_network(student)[0](torch.from_numpy(tracked[0])[None]).logits[0]
    assert len(prediction.windows) == 1
    assert prediction.windows[0].probabilities == pytest.approx(
        logits.double().softmax(0).tolist(), abs=1e-6
    )
    assert (prediction.windows[0].start, prediction.windows[0].end) == (0.0, 4.0)


def test_the_given_rate_wins_over_the_files(tmp_path: Path):
    student = save_student(tmp_path / "student", faces="none")
    clip = write_clip(tmp_path / "clip.mov", 100, fps=25)
    assert [window.end for window in predict_clip(student, clip, fps=12.5).windows] == [4.0, 8.0]


def test_a_real_face_is_found_and_a_short_clip_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    clip = shared("single_face.mp4")
    student = save_student(tmp_path / "student")
    assert main(["predict", str(student), str(clip), "--out", str(tmp_path / "new" / "x")]) == 0
    assert "2.4 s, 1 windows, 0 without a face; arousal: " in capsys.readouterr().out
    with (tmp_path / "new" / "x.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["start_s"], row["end_s"], row["faces_found"]) == ("0.000", "2.400", "3")
    low, high = float(row["probability_low"]), float(row["probability_high"])
    assert low + high == pytest.approx(1.0, abs=2e-6)
    assert row["predicted"] == ("high" if high > low else "low")
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_face_that_leaves_is_a_gap(tmp_path: Path):
    prediction = predict_clip(save_student(tmp_path / "s"), shared("face_then_no_face.mov"))
    first, second = prediction.windows
    assert len(first.probabilities) == 2
    assert first.faces_found >= 3
    assert (second.probabilities, second.predicted, second.faces_found) == ((), None, 0)


def test_no_face_at_all_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"no face found in .*no_face\.mp4 .*at least 60 pixels"):
        predict_clip(save_student(tmp_path / "s"), shared("no_face.mp4"))


def test_a_network_that_needs_eeg_is_refused(tmp_path: Path):
    folder = tmp_path / "run" / "teacher"
    net = build_multimodal("nano", level=0)
    save_network(folder, net, {**META, "role": "teacher", "level": 0})
    clip = write_clip(tmp_path / "clip.mov", 5, fps=25)
    with pytest.raises(InputError, match=r"teacher, which needs EEG .* remedy: use .*run/student"):
        predict_clip(folder, clip)


def test_wrong_inputs_are_named(tmp_path: Path):
    student = save_student(tmp_path / "run" / "student")
    clip = tmp_path / "clip.avi"
    clip.write_bytes(b"not a video")
    with pytest.raises(InputError, match=r"no network at .* remedy: give .*student"):
        check_inputs(tmp_path / "run", clip)
    with pytest.raises(InputError, match=r"no network at .* check the path"):
        check_inputs(tmp_path, clip)
    with pytest.raises(InputError, match="no video at"):
        check_inputs(student, tmp_path / "none.avi")
    with pytest.raises(InputError, match="cannot open video"):
        predict_clip(student, clip)
    with pytest.raises(InputError, match="fps must be"):
        predict_clip(student, write_clip(tmp_path / "clip.mov", 5, fps=25), fps=0.0)
    (student / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="no readable safetensors"):
        predict_clip(student, clip)


def test_a_network_without_sampling_facts_is_refused(tmp_path: Path):
    meta = {key: value for key, value in META.items() if key != "margin"}
    save_network(tmp_path / "s", build_visual("nano"), meta)
    with pytest.raises(InputError, match=r"how its videos were sampled \(margin\)"):
        predict_clip(tmp_path / "s", write_clip(tmp_path / "clip.mov", 5, fps=25))


WINDOWS = (
    Window(0.0, 4.0, (0.1, 0.9), 5),
    Window(4.0, 8.0, (), 0),
    Window(8.0, 9.6, (0.7, 0.3), 2),
)


def test_the_table_leaves_gaps_empty(tmp_path: Path):
    write_table(Prediction("a.avi", "valence", ("low", "high"), True, WINDOWS), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "start_s,end_s,probability_low,probability_high,predicted,faces_found",
        "0.000,4.000,0.100000,0.900000,high,5",
        "4.000,8.000,,,,0",
        "8.000,9.600,0.700000,0.300000,low,2",
    ]


def test_the_table_of_centre_crops_counts_no_faces(tmp_path: Path):
    prediction = Prediction(
        "a.avi", "mood", ("a", "b", "c"), False, (Window(0.0, 4.0, (0.2, 0.5, 0.3), 0),)
    )
    write_table(prediction, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines()[1] == (
        "0.000,4.000,0.200000,0.500000,0.300000,b,"
    )


def colour_share(picture: Path, rgb: tuple[int, int, int], left: float, right: float) -> float:
    image = pytest.importorskip("matplotlib.image").imread(picture)[..., :3]
    part = image[:, round(left * image.shape[1]) : round(right * image.shape[1])]
    return float((np.abs(part - np.array(rgb) / 255).max(-1) < 0.02).mean())


def test_the_picture_shows_high_low_and_gaps(tmp_path: Path):
    path = tmp_path / "t.png"
    write_picture(Prediction("$a_{.avi", "valence", ("low", "high"), True, WINDOWS), path)
    blue, vermilion, hatch = (0, 114, 178), (213, 94, 0), (196, 202, 209)
    assert colour_share(path, vermilion, 0.08, 0.40) > 0.002
    assert colour_share(path, blue, 0.85, 0.98) > 0.002
    assert colour_share(path, hatch, 0.50, 0.80) > 0.02
    for rgb in (blue, vermilion):
        assert colour_share(path, rgb, 0.50, 0.80) == 0.0
