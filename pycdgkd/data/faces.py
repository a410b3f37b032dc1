"""Face detection by MTCNN and square face crops.

Method: Zhang, Zhang, Li, Qiao, "Joint Face Detection and Alignment using Multi-task Cascaded
Convolutional Networks", IEEE Signal Processing Letters 2016: a proposal network over an image
pyramid, then a refining and an output network over the surviving boxes. The weights are read from
the files of the installed ``mtcnn`` package; that package itself is never imported, because its
import needs TensorFlow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pycdgkd.errors import InputError, require

Frames = npt.NDArray[np.uint8]
Boxes = npt.NDArray[np.float32]

CELL = 12  # receptive field of the proposal network
STEP = 2  # its stride
PYRAMID = 0.709  # about sqrt(1/2): each level halves the area
CHUNK = 16  # frames that share one pass of the networks, to bound memory


@dataclass(frozen=True)
class _Layer:
    weight: Tensor
    bias: Tensor
    slope: Tensor | None  # PReLU that follows, None for an output

    def __call__(self, x: Tensor) -> Tensor:
        apply = F.conv2d if self.weight.ndim == 4 else F.linear
        y = apply(x, self.weight, self.bias)
        return y if self.slope is None else F.prelu(y, self.slope)


def weight_file(name: str) -> Path:
    """Path of one of the ``mtcnn`` package's weight files, found without importing that package."""
    spec = importlib.util.find_spec("mtcnn")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "face detection needs the weight files of the package 'mtcnn', which is not installed; "
            'remedy: pip install "pycdgkd[train]", or prepare with faces="none"'
        )
    path = Path(spec.submodule_search_locations[0]) / "assets" / "weights" / f"{name}.lz4"
    if not path.is_file():
        raise InputError(
            f"the installed package 'mtcnn' has no {path.name}; expected version 1.0 or later; "
            'remedy: pip install --upgrade "mtcnn>=1.0"'
        )
    return path


def _load(name: str, hidden: int, outputs: int) -> list[_Layer]:
    """Layers of one network: ``hidden`` ones with a PReLU each, then ``outputs`` plain ones.

    joblib files are pickles, so reading one runs whatever it says. These come from a package that
    the user installed, hence are as trusted as its code; no other file is ever read this way.
    """
    arrays: list[npt.NDArray[Any]] = require("joblib", "train").load(weight_file(name))
    if len(arrays) != 3 * hidden + 2 * outputs:
        raise InputError(
            f"{name}.lz4 of the package 'mtcnn' holds {len(arrays)} arrays; expected "
            f"{3 * hidden + 2 * outputs}; remedy: install mtcnn 1.0"
        )
    tensors = [torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for a in arrays]
    layers = []
    for index in range(hidden + outputs):
        start = 3 * index if index < hidden else 3 * hidden + 2 * (index - hidden)
        weight, bias = tensors[start], tensors[start + 1]
        # Stored as (height, width, in, out) or (in, out).
        weight = weight.permute(3, 2, 0, 1) if weight.ndim == 4 else weight.t()
        slope = tensors[start + 2].reshape(-1) if index < hidden else None
        layers.append(_Layer(weight.contiguous(), bias, slope))
    return layers


class FaceDetector:
    """MTCNN on the CPU.

    min_face: smallest face edge that is looked for, in pixels; larger is faster.
    thresholds: least face probability after the proposal, refining and output network.
    Raises ``InputError`` when the weight files are not installed.
    """

    def __init__(
        self, min_face: int = 60, *, thresholds: tuple[float, float, float] = (0.6, 0.7, 0.8)
    ) -> None:
        if min_face < CELL:
            raise InputError(f"min_face must be at least {CELL} pixels; got {min_face}")
        self.min_face = min_face
        self.thresholds = thresholds
        self._pnet = _load("pnet", 3, 2)
        self._rnet = _load("rnet", 4, 2)
        self._onet = _load("onet", 5, 3)

    def detect(self, image: Frames) -> tuple[Boxes, Boxes]:
        """Faces of one image (H, W, 3) uint8 RGB.

        Returns boxes (n, 4) as x1, y1, x2, y2 in pixels and face probabilities (n,), best first.
        """
        return self.detect_batch(image[None])[0]

    def detect_batch(self, frames: Frames) -> list[tuple[Boxes, Boxes]]:
        """``detect`` for each of (T, H, W, 3) uint8 RGB frames, whose candidates share batches."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(
                f"frames must be (T, H, W, 3) uint8; got {frames.shape} {frames.dtype}"
            )
        found: list[tuple[Boxes, Boxes]] = []
        with _one_thread(), torch.inference_mode():
            for start in range(0, len(frames), CHUNK):
                # (T, 3, H, W) view of channels-last memory: resized without a copy.
                images = torch.from_numpy(frames[start : start + CHUNK]).permute(0, 3, 1, 2)
                found.extend(self._cascade(images))
        return found

    def _cascade(self, images: Tensor) -> list[tuple[Boxes, Boxes]]:
        boxes = self._propose(images)
        boxes, scores = self._refine(images, boxes, self._rnet, 24, self.thresholds[1])
        kept = [_nms(b, s, 0.7) for b, s in zip(boxes, scores, strict=True)]
        boxes = [_square(b[k]) for b, k in zip(boxes, kept, strict=True)]
        boxes, scores = self._refine(images, boxes, self._onet, 48, self.thresholds[2])
        kept = [_nms(b, s, 0.7, least=True) for b, s in zip(boxes, scores, strict=True)]
        return [(b[k], s[k]) for b, s, k in zip(boxes, scores, kept, strict=True)]

    def _propose(self, images: Tensor) -> list[Boxes]:
        """Square candidate boxes of each image from the proposal network."""
        height, width = images.shape[2:]
        found: list[list[npt.NDArray[np.float32]]] = [[] for _ in images]
        scale = CELL / self.min_face
        while min(height, width) * scale >= CELL:
            size = (round(height * scale), round(width * scale))
            level = _normalise(F.interpolate(images, size, mode="bilinear", antialias=True))
            prob, offset = self._run_pnet(level)
            for index in range(len(images)):
                rows = _cells(prob[index], offset[index], scale, self.thresholds[0])
                found[index].append(rows[_nms(rows[:, :4], rows[:, 8], 0.5)])
            scale *= PYRAMID
        return [_merge(rows) for rows in found]

    def _run_pnet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, h, w) -> face probability (B, h', w') and box offsets (B, 4, h', w')."""
        conv1, conv2, conv3, regression, classification = self._pnet
        x = F.max_pool2d(conv1(x), 2, 2, ceil_mode=True)
        x = conv3(conv2(x))
        return classification(x).softmax(1)[:, 1], regression(x)

    def _refine(
        self, images: Tensor, boxes: Sequence[Boxes], net: list[_Layer], size: int, threshold: float
    ) -> tuple[list[Boxes], list[Boxes]]:
        """Score and correct the candidates of all images in one batch."""
        counts = [len(b) for b in boxes]
        if sum(counts) == 0:
            return list(boxes), [np.zeros(0, np.float32) for _ in boxes]
        crops = [_crop(images[i], box, size) for i, b in enumerate(boxes) for box in b]
        prob, offset = _run_dense(net, _normalise(torch.stack(crops)))
        everything = np.concatenate(boxes)
        edges = np.tile(everything[:, 2:] - everything[:, :2], 2)
        moved = (everything + offset.numpy() * edges).astype(np.float32)
        keep = prob.numpy() > threshold
        bounds = np.cumsum(counts)[:-1]
        parts = zip(
            np.split(moved, bounds),
            np.split(prob.numpy(), bounds),
            np.split(keep, bounds),
            strict=True,
        )
        chosen = [(b[k], s[k]) for b, s, k in parts]
        return [b for b, _ in chosen], [s for _, s in chosen]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on one thread, then as before.

    The networks are tiny: on a busy machine with two cores, starting a second thread for each of
    their layers took four times as long (83 s against 21 s for 2,000 frames). It also makes the
    crops independent of the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _normalise(images: Tensor) -> Tensor:
    """Pixel values as the networks were trained on."""
    return (images.float() - 127.5) / 128.0


def _run_dense(net: list[_Layer], x: Tensor) -> tuple[Tensor, Tensor]:
    """Refining (24) or output (48) network: face probability (B,) and box offsets (B, 4)."""
    output = len(net) == 8
    x = F.max_pool2d(net[0](x), 3, 2, ceil_mode=True)
    x = F.max_pool2d(net[1](x), 3, 2)
    x = net[2](x)
    if output:
        x = net[3](F.max_pool2d(x, 2, 2, ceil_mode=True))
    # The dense layer was trained on (width, height, channel) order.
    x = net[4 if output else 3](x.permute(0, 3, 2, 1).flatten(1))
    regression, classification = net[-3 if output else -2], net[-1]
    return classification(x).softmax(1)[:, 1], regression(x)


def _cells(prob: Tensor, offset: Tensor, scale: float, threshold: float) -> npt.NDArray[np.float32]:
    """Rows x1, y1, x2, y2, four offsets, score of the cells above the threshold."""
    ys, xs = torch.nonzero(prob > threshold, as_tuple=True)
    corner = torch.stack([xs, ys], dim=1) * STEP
    rows = torch.cat(
        [corner / scale, (corner + CELL) / scale, offset[:, ys, xs].t(), prob[ys, xs][:, None]], 1
    )
    return rows.numpy().astype(np.float32)


def _merge(levels: list[npt.NDArray[np.float32]]) -> Boxes:
    """Candidates of all pyramid levels: suppress doubles, apply the offsets, make square."""
    rows = np.concatenate([*levels, np.zeros((0, 9), np.float32)])
    rows = rows[_nms(rows[:, :4], rows[:, 8], 0.7)]
    edges = np.tile(rows[:, 2:4] - rows[:, :2], 2)
    return _square(rows[:, :4] + rows[:, 4:8] * edges)


def _nms(boxes: Boxes, scores: Boxes, overlap: float, *, least: bool = False) -> list[int]:
    """Greedy suppression, best first; overlap over the union, or over the smaller of the two."""
    order = np.argsort(-scores, kind="stable")
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[rest, :2])
        high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        whole = np.minimum(area[best], area[rest]) if least else area[best] + area[rest] - shared
        order = rest[shared <= overlap * whole]
    return kept


def _square(boxes: Boxes) -> Boxes:
    """Same centres, both edges as long as the longer one."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True) / 2
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def _crop(image: Tensor, box: Boxes, size: int) -> Tensor:
    """The part of ``image`` (3, H, W) inside the box and the frame, resized to (3, size, size)."""
    height, width = image.shape[1:]
    x1, y1 = (
        max(0, min(round(float(v)), limit - 1)) for v, limit in ((box[0], width), (box[1], height))
    )
    x2, y2 = (
        max(low + 1, min(round(float(v)), limit))
        for v, low, limit in ((box[2], x1, width), (box[3], y1, height))
    )
    part = image[None, :, y1:y2, x1:x2]
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


def _square_crop(image: Tensor, box: Boxes, size: int, margin: float) -> Tensor:
    """Square about the box, its longer edge widened by ``margin`` of itself on either side.

    Pixels beyond the frame repeat its border, so the face is never distorted.
    """
    height, width = image.shape[1:]
    half = float(max(box[2] - box[0], box[3] - box[1])) * (0.5 + margin)
    edge = max(1, round(2 * half))
    x = round(float(box[0] + box[2]) / 2 - half)
    y = round(float(box[1] + box[3]) / 2 - half)
    rows = torch.arange(y, y + edge).clamp(0, height - 1)
    columns = torch.arange(x, x + edge).clamp(0, width - 1)
    part = image[:, rows][:, :, columns]
    return F.interpolate(part[None], (size, size), mode="bilinear", antialias=True)[0]


Crops = tuple[Frames, npt.NDArray[np.bool_]]


def track_crops(
    frames: Frames, detector: FaceDetector | None, *, size: int, margin: float
) -> Crops | None:
    """Square face crops of one trial's frames (T, H, W, 3) uint8 RGB.

    Each frame's largest face is taken; a frame without one takes the box of the nearest frame that
    has one (the earlier of two equally near). ``detector=None`` takes the largest centred square
    and calls nothing found. Returns crops (T, 3, size, size) uint8 and found (T,) bool, or None
    when no frame has a face.
    """
    if detector is None:
        boxes, found = centre_boxes(frames)
        return crop_faces(frames, boxes, size=size, margin=0.0), found
    boxes, found = largest_faces(frames, detector)
    return (crop_faces(frames, boxes, size=size, margin=margin), found) if found.any() else None


def centre_boxes(frames: Frames) -> tuple[Boxes, npt.NDArray[np.bool_]]:
    """The largest centred square of each frame, none of which counts as found."""
    height, width = frames.shape[1:3]
    edge = min(height, width)
    left, top = (width - edge) // 2, (height - edge) // 2
    centre = np.array([left, top, left + edge, top + edge], np.float32)
    return np.tile(centre, (len(frames), 1)), np.zeros(len(frames), np.bool_)


def crop_faces(frames: Frames, boxes: Boxes, *, size: int, margin: float) -> Frames:
    """Squares (T, 3, size, size) about the boxes (T, 4), widened by ``margin`` of their edge."""
    with _one_thread():
        images = torch.from_numpy(frames).permute(0, 3, 1, 2)
        pairs = zip(images, boxes, strict=True)
        crops = [_square_crop(image, box, size, margin) for image, box in pairs]
    return torch.stack(crops).numpy()


def largest_faces(frames: Frames, detector: FaceDetector) -> tuple[Boxes, npt.NDArray[np.bool_]]:
    """Largest face of each frame: boxes (T, 4), and found (T,), False where a box was borrowed.

    A frame without a face borrows from the nearest one that has one, the earlier of two; when no
    frame has a face the boxes are zero.
    """
    boxes = np.zeros((len(frames), 4), np.float32)
    found = np.zeros(len(frames), dtype=np.bool_)
    for index, (candidates, _) in enumerate(detector.detect_batch(frames)):
        if len(candidates):
            area = np.prod(candidates[:, 2:] - candidates[:, :2], axis=1)
            boxes[index], found[index] = candidates[int(area.argmax())], True
    have = np.flatnonzero(found)
    if len(have):
        boxes = boxes[[have[np.abs(have - index).argmin()] for index in range(len(frames))]]
    return boxes, found
