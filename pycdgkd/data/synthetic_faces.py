"""Drawn faces: a shaded head whose mouth and cheeks follow valence, eyes and brows arousal.

Everything is painted with numpy on one pixel grid. Shapes are soft-edged masks (one pixel wide
ramps), laid over one another from back to front in the head's own coordinates (u to the right,
v down, the head's half width is 1), so that position, turn and size are a change of coordinates.
The proportions are those at which a detector trained on photographs finds the face.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]
Colour = tuple[float, float, float]

SKINS: tuple[Colour, ...] = (
    (236, 198, 172), (224, 180, 150), (205, 158, 125), (186, 138, 106),
    (158, 112, 84), (128, 88, 66),
)  # fmt: skip
HAIRS: tuple[Colour, ...] = (
    (38, 28, 24),
    (70, 46, 32),
    (112, 76, 46),
    (160, 124, 80),
    (92, 90, 92),
)
EYES: tuple[Colour, ...] = ((70, 48, 34), (88, 104, 72), (80, 110, 140))


@dataclass(frozen=True)
class Identity:
    """What stays the same for one subject. Lengths are in half head widths."""

    skin: Colour
    hair: Colour
    iris: Colour
    height: float
    jaw: float
    hairline: float
    eye_gap: float
    eye_size: float
    brow: float
    nose: float
    mouth: float
    lips: float


@dataclass(frozen=True)
class Scene:
    """What changes from frame to frame.

    smile: -1 (corners down) to 1. arousal: -1 (drowsy) to 1 (wide open). blink: 0 open, 1 shut.
    x, y: head centre in pixels. size: half head width in pixels. turn: rotation in radians.
    light: direction of the light to the right (negative: left). gain: brightness. back: background.
    """

    smile: float
    arousal: float
    blink: float
    x: float
    y: float
    size: float
    turn: float
    light: float
    gain: float
    back: Colour


def draw_identity(rng: np.random.Generator) -> Identity:
    """A random person."""
    tint = rng.uniform(0.95, 1.05)
    skin = SKINS[int(rng.integers(len(SKINS)))]
    return Identity(
        skin=(skin[0] * tint, skin[1] * tint, skin[2] * tint),
        hair=HAIRS[int(rng.integers(len(HAIRS)))],
        iris=EYES[int(rng.integers(len(EYES)))],
        height=rng.uniform(1.28, 1.38),
        jaw=rng.uniform(0.16, 0.32),
        hairline=rng.uniform(0.78, 0.92),
        eye_gap=rng.uniform(0.40, 0.45),
        eye_size=rng.uniform(0.19, 0.23),
        brow=rng.uniform(0.045, 0.07),
        nose=rng.uniform(0.30, 0.37),
        mouth=rng.uniform(0.34, 0.40),
        lips=rng.uniform(0.8, 1.2),
    )


class _Canvas:
    """An RGB picture with the head's coordinates, and the brushes that paint on it."""

    def __init__(self, width: int, height: int, scene: Scene) -> None:
        self.rgb = np.empty((3, height, width), np.float32)
        self.scene = scene
        x = (np.arange(width, dtype=np.float32) - np.float32(scene.x)) / np.float32(scene.size)
        y = (np.arange(height, dtype=np.float32) - np.float32(scene.y)) / np.float32(scene.size)
        c, s = np.float32(np.cos(scene.turn)), np.float32(np.sin(scene.turn))
        self._u = c * x[None, :] + s * y[:, None]
        self._v = c * y[:, None] - s * x[None, :]
        self._window = (slice(None), slice(None))

    @contextmanager
    def near(self, u: float, v: float, radius: float) -> Iterator[None]:
        """Restrict the brushes to the square about a point (a matter of speed only)."""
        scene, (height, width) = self.scene, self._u.shape
        c, s = np.cos(scene.turn), np.sin(scene.turn)
        x, y = scene.x + scene.size * (c * u - s * v), scene.y + scene.size * (s * u + c * v)
        reach = radius * scene.size * 1.2 + 2
        rows = slice(max(0, int(y - reach)), max(0, min(height, int(y + reach) + 1)))
        columns = slice(max(0, int(x - reach)), max(0, min(width, int(x + reach) + 1)))
        self._window = (rows, columns)
        yield
        self._window = (slice(None), slice(None))

    @property
    def u(self) -> Plane:
        window: Plane = self._u[self._window]
        return window

    @property
    def v(self) -> Plane:
        window: Plane = self._v[self._window]
        return window

    def soft(self, distance: Plane, edge: float = 1.0) -> Plane:
        """Mask of ``distance`` < 0 (in half head widths) with a ramp of ``edge`` pixels."""
        ramp = 0.5 - distance * np.float32(self.scene.size / edge)
        mask: Plane = np.clip(ramp, 0, 1, dtype=np.float32)
        return mask

    def ellipse(self, u: float, v: float, a: float, b: float, edge: float = 1.0) -> Plane:
        """Mask of an ellipse with half axes a and b."""
        square = ((self.u - np.float32(u)) / np.float32(a)) ** 2
        square += ((self.v - np.float32(v)) / np.float32(b)) ** 2
        return self.soft((np.sqrt(square) - 1) * np.float32(min(a, b)), edge)

    def blob(self, u: float, v: float, a: float, b: float) -> Plane:
        """Smooth bump of height 1 (a Gaussian with standard deviations a and b)."""
        square = ((self.u - np.float32(u)) / np.float32(a)) ** 2
        square += ((self.v - np.float32(v)) / np.float32(b)) ** 2
        bump: Plane = np.exp(-0.5 * square, dtype=np.float32)
        return bump

    def paint(self, mask: Plane, colour: Colour) -> None:
        """Cover with one colour as far as the mask says."""
        for plane, value in zip(self.rgb, colour, strict=True):
            part = plane[self._window]
            part += mask * (np.float32(value) - part)

    def shade(self, factor: Plane) -> None:
        """Multiply the brightness."""
        for plane in self.rgb:
            plane[self._window] *= factor


def draw_face(
    width: int, height: int, person: Identity, scene: Scene, noise: Plane
) -> npt.NDArray[np.uint8]:
    """One frame (height, width, 3) uint8 RGB. noise: (height, width), added to every colour."""
    canvas = _Canvas(width, height, scene)
    _background(canvas, person)
    _head(canvas, person)
    for side in (-1.0, 1.0):
        _eye(canvas, person, side)
        _brow(canvas, person, side)
    _nose(canvas, person)
    _mouth(canvas, person)
    rgb = canvas.rgb * np.float32(scene.gain) + noise
    return np.ascontiguousarray(np.clip(rgb, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _scaled(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _background(canvas: _Canvas, person: Identity) -> None:
    slope = 1.0 + 0.06 * canvas.u - 0.05 * canvas.v
    for plane, value in zip(canvas.rgb, canvas.scene.back, strict=True):
        plane[:] = np.float32(value) * slope
    canvas.paint(canvas.ellipse(0, 3.1, 2.1, 1.35, 2), _scaled(person.iris, 0.8))
    canvas.paint(canvas.ellipse(0, -0.12, 1.14, person.height + 0.06, 2), person.hair)
    with canvas.near(0, 1.4, 0.8):
        neck = canvas.soft(np.maximum(np.abs(canvas.u) - 0.52, np.abs(canvas.v - 1.4) - 0.6), 2)
        canvas.paint(neck, _scaled(person.skin, 0.72))


def _head(canvas: _Canvas, person: Identity) -> None:
    """Ears, the head as a lit ellipsoid with a narrowing jaw, and the hair over the forehead."""
    for side in (-1.0, 1.0):
        with canvas.near(side, 0.05, 0.35):
            canvas.paint(canvas.ellipse(side, 0.05, 0.13, 0.26), _scaled(person.skin, 0.82))
    scene = canvas.scene
    with canvas.near(0, 0, person.height):
        u, v = canvas.u, canvas.v / np.float32(person.height)
        across = u / (1 - np.float32(person.jaw) * np.maximum(v, 0) ** 2)
        square = across**2 + v**2
        mask = canvas.soft((np.sqrt(square) - 1) * 0.95)
        canvas.paint(mask, person.skin)
        depth = np.sqrt(np.maximum(1 - square, 0))
        lit = 0.62 * depth + np.float32(0.45 * scene.light) * across - 0.16 * v
        canvas.shade(1 + mask * (np.float32(0.52) + np.float32(0.62) * lit - 1))
        dip = np.float32(person.hairline) - 0.28 * u**2
        top = canvas.soft((np.sqrt(square) - 1) * 0.95 - 0.03)
        canvas.paint(top * canvas.soft(canvas.v + dip, 2), person.hair)
        smile = max(scene.smile, 0.0)
        for side in (-1.0, 1.0):
            canvas.shade(1 - 0.20 * canvas.blob(side * person.eye_gap, -0.20, 0.24, 0.15))
            cheek = canvas.blob(side * 0.55, 0.30 - 0.06 * smile, 0.20, 0.15)
            canvas.shade(1 + np.float32(0.06 + 0.14 * smile) * cheek)
            part = canvas.rgb[0][canvas._window]
            part += np.float32(26 * smile) * cheek
        canvas.shade(1 - 0.12 * canvas.blob(0, 1.0, 0.30, 0.05))


def _eye(canvas: _Canvas, person: Identity, side: float) -> None:
    """Eyeball between two lids; arousal opens it, a smile lifts the lower lid, a blink shuts it."""
    scene = canvas.scene
    u0, v0, half = side * person.eye_gap, -0.20, person.eye_size
    opening = max(0.015, (0.095 + 0.055 * scene.arousal) * (1 - scene.blink))
    with canvas.near(u0, v0, 0.4):
        x = (canvas.u - np.float32(u0)) / np.float32(half)
        arch = np.maximum(1 - x * x, 0)
        upper = np.float32(v0) - np.float32(1.15 * opening) * arch
        lower = np.float32(v0) + np.float32(0.7 * opening) * arch
        across = (np.abs(x) - 1) * np.float32(half)
        ball = canvas.soft(np.maximum(np.maximum(upper - canvas.v, canvas.v - lower), across))
        canvas.paint(ball, (226, 220, 214))
        canvas.paint(ball * canvas.ellipse(u0, v0 - 0.015, 0.105, 0.105), person.iris)
        canvas.paint(ball * canvas.ellipse(u0, v0 - 0.015, 0.052, 0.052), (14, 12, 12))
        canvas.paint(ball * canvas.ellipse(u0 + 0.03, v0 - 0.045, 0.022, 0.022), (250, 250, 250))
        lash = canvas.soft(np.maximum(np.abs(canvas.v - upper) - 0.026, across - 0.02))
        canvas.paint(0.85 * lash, (34, 24, 22))
        lid = canvas.soft(np.maximum(np.abs(canvas.v - lower) - 0.012, across))
        canvas.paint(0.35 * lid, (60, 40, 36))
        crease = canvas.soft(np.maximum(np.abs(canvas.v - upper + 0.075) - 0.012, across), 1.5)
        canvas.shade(1 - 0.22 * crease)


def _brow(canvas: _Canvas, person: Identity, side: float) -> None:
    """Tapered stroke; arousal raises it, a frown lowers and tilts its inner end."""
    scene = canvas.scene
    v0 = -0.47 - 0.085 * scene.arousal
    with canvas.near(side * person.eye_gap, v0, 0.45):
        x = (side * canvas.u - np.float32(person.eye_gap)) / np.float32(0.29)
        frown = np.float32(0.05 * min(scene.smile, 0.0))
        line = np.float32(v0) + 0.06 * (x - 0.25) ** 2 + frown * (x - 0.5) * 0.8
        thick = np.float32(person.brow) * (1 - 0.35 * x)
        stroke = np.maximum(np.abs(canvas.v - line) - thick, (np.abs(x) - 1) * 0.29)
        canvas.paint(0.9 * canvas.soft(stroke, 1.6), _scaled(person.hair, 0.8))


def _nose(canvas: _Canvas, person: Identity) -> None:
    """Lit ridge and tip, one side in shadow, wings and nostrils."""
    light, tip = canvas.scene.light, person.nose
    with canvas.near(0, 0.1, 0.62):
        canvas.shade(1 + 0.12 * canvas.blob(0.02 * light, 0.02, 0.055, 0.20))
        canvas.shade(1 + 0.14 * canvas.blob(0.03 * light, tip - 0.06, 0.09, 0.07))
        dark = -1.0 if light > 0 else 1.0
        canvas.shade(1 - 0.20 * canvas.blob(dark * 0.15, 0.10, 0.05, 0.18))
        for side in (-1.0, 1.0):
            canvas.shade(1 - 0.24 * canvas.blob(side * 0.20, tip - 0.02, 0.035, 0.07))
            nostril = canvas.ellipse(side * 0.095, tip + 0.055, 0.052, 0.026, 1.6)
            canvas.paint(0.75 * nostril, (52, 30, 28))
        canvas.shade(1 - 0.20 * canvas.blob(0, tip + 0.10, 0.15, 0.035))


def _mouth(canvas: _Canvas, person: Identity) -> None:
    """Lips about an opening with teeth; valence bends and widens it, arousal opens it."""
    scene = canvas.scene
    half = person.mouth * (1 + 0.16 * scene.smile)
    opening = 0.055 * max(0.0, 0.35 + scene.arousal) + 0.03 * max(0.0, scene.smile)
    with canvas.near(0, 0.72, 0.6):
        x = canvas.u / np.float32(half)
        arch = np.maximum(1 - x * x, 0)
        middle = np.float32(0.72) + np.float32(0.15 * scene.smile) * (arch - 0.55)
        top = middle - np.float32(opening) * arch
        bottom = middle + np.float32(opening) * arch
        across = (np.abs(x) - 1) * np.float32(half)
        thick = np.float32(0.075 * person.lips)
        bow = 1 - 0.35 * np.exp(-((x / 0.16) ** 2))
        upper = np.maximum(top - thick * arch * bow - canvas.v, canvas.v - top)
        lower = np.maximum(bottom - canvas.v, canvas.v - bottom - 1.3 * thick * arch)
        red = (person.skin[0] * 0.80, person.skin[1] * 0.50, person.skin[2] * 0.50)
        canvas.paint(canvas.soft(np.maximum(upper, across)), _scaled(red, 0.85))
        canvas.paint(canvas.soft(np.maximum(lower, across)), red)
        gap = np.maximum(np.maximum(top - canvas.v, canvas.v - bottom) - 0.012, across)
        inside = canvas.soft(gap)
        canvas.paint(inside, (54, 22, 24))
        teeth = canvas.soft(np.maximum(canvas.v - top - np.float32(0.8 * opening), across + 0.06))
        canvas.paint(inside * teeth * np.float32(min(1.0, opening / 0.05)), (226, 218, 206))
        canvas.shade(1 - 0.16 * canvas.blob(0, 0.93 + opening, 0.16, 0.04))
        for side in (-1.0, 1.0):
            corner = 0.72 - 0.15 * 0.55 * scene.smile
            canvas.shade(1 - 0.25 * canvas.blob(side * half, corner, 0.045, 0.04))
            canvas.shade(
                1
                - np.float32(0.22 * max(scene.smile, 0.0))
                * canvas.blob(side * 0.50, 0.52, 0.04, 0.13)
            )
