from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pycdgkd.data.faces import FaceDetector, _nms, largest_faces, track_crops, weight_file
from pycdgkd.data.synthetic_faces import Scene, draw_face, draw_identity
from pycdgkd.data.video import sample_frames
from pycdgkd.errors import InputError

Frames = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector(60)


def clip(path: Path, stride: int = 1) -> Frames:
    return np.stack(list(sample_frames(path, stride=stride)))


def overlap(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = float(np.prod(np.maximum(high - low, 0)))
    areas = [float(np.prod(box[2:] - box[:2])) for box in (one, other)]
    return shared / (sum(areas) - shared)


def portrait(seed: int, size: float = 44.0, x: float = 120.0, y: float = 94.0) -> Frames:
    rng = np.random.default_rng(seed)
    scene = Scene(0.5, 0.2, 0.0, x, y, size, 0.0, 0.3, 1.0, (120.0, 130.0, 140.0))
    grain = 3 * rng.standard_normal((192, 240), dtype=np.float32)
    return draw_face(240, 192, draw_identity(rng), scene, grain)


def test_the_real_face_is_found_in_all_72_frames(real: Path, detector: FaceDetector) -> None:
    found = detector.detect_batch(clip(real / "single_face.mp4"))
    assert [len(boxes) for boxes, _ in found] == [1] * 72
    # The face as it lies in the first picture (by eye: chin at 300, hairline at 85).
    assert overlap(found[0][0][0], np.array([222, 84, 368, 300], np.float32)) > 0.85
    assert min(float(scores[0]) for _, scores in found) > 0.95


def test_nothing_is_found_where_nothing_is(real: Path, detector: FaceDetector) -> None:
    frames = clip(real / "no_face.mp4")
    assert sum(len(boxes) for boxes, _ in detector.detect_batch(frames)) == 0
    assert track_crops(frames[:10], detector, size=48, margin=0.1) is None


def test_a_face_that_leaves_is_tracked_by_its_last_box(real: Path, detector: FaceDetector) -> None:
    frames = clip(real / "face_then_no_face.mov", stride=8)
    boxes, found = largest_faces(frames, detector)
    assert found.tolist() == [True] * 9 + [False] * (len(frames) - 9)
    np.testing.assert_array_equal(boxes[9:], np.repeat(boxes[8:9], len(frames) - 9, 0))
    tracked = track_crops(frames, detector, size=64, margin=0.1)
    assert tracked is not None
    assert tracked[0].shape == (len(frames), 3, 64, 64)
    np.testing.assert_array_equal(tracked[1], found)


def test_one_image_and_a_batch_agree(real: Path, detector: FaceDetector) -> None:
    frames = clip(real / "single_face.mp4", stride=16)
    for frame, (boxes, scores) in zip(frames, detector.detect_batch(frames), strict=True):
        alone = detector.detect(frame)
        np.testing.assert_allclose(alone[0], boxes, atol=1e-2)
        np.testing.assert_allclose(alone[1], scores, atol=1e-5)


def test_the_box_moves_with_the_face(detector: FaceDetector) -> None:
    boxes = [detector.detect(portrait(3, x=x, y=y))[0][0] for x, y in ((100, 90), (130, 102))]
    np.testing.assert_allclose(boxes[1] - boxes[0], [30, 12, 30, 12], atol=5)


def test_drawn_faces_are_found(detector: FaceDetector) -> None:
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(60):
        smile, arousal = rng.uniform(-1, 1, 2)
        scene = Scene(
            smile, arousal, float(rng.random() < 0.1),
            120 + rng.normal(0, 8), 94 + rng.normal(0, 4), 44 * rng.uniform(0.9, 1.1),
            rng.normal(0, 0.06), rng.uniform(-0.8, 0.8), rng.uniform(0.8, 1.1),
            tuple(rng.uniform(80, 170, 3)),
        )  # fmt: skip
        grain = 3 * rng.standard_normal((192, 240), dtype=np.float32)
        frames.append(draw_face(240, 192, draw_identity(rng), scene, grain))
    counts = np.array([len(boxes) for boxes, _ in detector.detect_batch(np.stack(frames))])
    assert (counts == 1).mean() >= 0.95
    assert counts.max() == 1


def test_the_largest_of_two_faces_is_taken(detector: FaceDetector) -> None:
    both = np.concatenate([portrait(1, size=40), portrait(2, size=52)], axis=1)
    boxes, _ = detector.detect(both)
    assert len(boxes) == 2
    chosen, found = largest_faces(both[None], detector)
    assert found.tolist() == [True]
    assert chosen[0, 0] > 240  # the right one


def test_the_nearest_frame_lends_its_box_the_earlier_of_two(detector: FaceDetector) -> None:
    blank = np.full((192, 240, 3), 120, np.uint8)
    left, right = portrait(1, x=90), portrait(1, x=150)
    boxes, found = largest_faces(np.stack([blank, left, blank, right, blank]), detector)
    assert found.tolist() == [False, True, False, True, False]
    assert [bool(box[0] > 85) for box in boxes] == [False, False, False, True, True]


def test_crops_are_square_padded_at_the_border_and_follow_the_margin() -> None:
    class Fixed(FaceDetector):
        def __init__(self, box: tuple[float, ...]) -> None:
            self.box = np.array([box], np.float32)

        def detect_batch(self, frames: Frames) -> list[tuple[npt.NDArray[np.float32], ...]]:  # type: ignore[override]  # a fixed answer
            return [(self.box, np.ones(1, np.float32)) for _ in frames]

    # A picture whose red is its column and whose green is its row.
    rows, columns = np.mgrid[0:100, 0:120]
    image = np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)[None]
    tracked = track_crops(image, Fixed((40, 30, 60, 70)), size=48, margin=0.1)
    assert tracked is not None
    crop = tracked[0][0].astype(int)
    # Centre (50, 50), edge 40 widened by 4 on either side: columns 26..73.
    np.testing.assert_allclose(crop[0, 24], 26 + np.arange(48), atol=1)
    np.testing.assert_allclose(crop[1, :, 24], 26 + np.arange(48), atol=1)
    tracked = track_crops(image, Fixed((-20, 30, 20, 70)), size=40, margin=0.0)
    assert tracked is not None
    crop = tracked[0][0].astype(int)
    np.testing.assert_allclose(crop[0, 20], np.maximum(np.arange(-20, 20), 0), atol=1)


def test_without_a_detector_the_centre_is_cut() -> None:
    rows, columns = np.mgrid[0:100, 0:120]
    image = np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)[None]
    tracked = track_crops(image, None, size=100, margin=0.1)
    assert tracked is not None
    np.testing.assert_array_equal(tracked[0][0, 0, 0], np.arange(10, 110))
    assert tracked[1].tolist() == [False]


def test_suppression_keeps_the_best_of_each_cluster() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [30, 30, 40, 40], [4, 4, 6, 6]], np.float32)
    scores = np.array([0.8, 0.9, 0.7, 0.6], np.float32)
    assert _nms(boxes, scores, 0.5) == [1, 2, 3]
    assert _nms(boxes, scores, 0.5, least=True) == [1, 2]


def test_wrong_input_is_named(detector: FaceDetector) -> None:
    with pytest.raises(ValueError, match=r"\(T, H, W, 3\) uint8; got \(1, 4, 4, 4\)"):
        detector.detect_batch(np.zeros((1, 4, 4, 4), np.uint8))
    with pytest.raises(InputError, match="min_face must be at least 12 pixels; got 5"):
        FaceDetector(5)
    assert detector.detect_batch(np.zeros((2, 20, 20, 3), np.uint8))[1][0].shape == (0, 4)


def test_missing_weights_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install \"pycdgkd\[train\]\""):
        weight_file("pnet")


def test_the_detector_never_imports_the_package_of_its_weights() -> None:
    code = (
        "import sys; from pycdgkd.data import FaceDetector; FaceDetector();"
        "print('mtcnn' in sys.modules, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
