"""One page that shows what a cache holds: labels, faces, spectra, and what was left out and why."""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pycdgkd.data.cache import Cache
from pycdgkd.errors import require
from pycdgkd.files import write_text

from .figures import BLUE, MUTED, VERMILION, drawn, new_figure
from .table import SYNTHETIC_NOTE
from .templates import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "inspect.html"
FACES = 8  # of each subject
EDGE = 96  # pixels of a shown face
COLUMNS = 4  # of every figure, so that one subject's is not drawn larger than many's
MISSES = 3  # of the shown ones at most, where there are any


@dataclass(frozen=True)
class Face:
    """A shown crop. found: its own face was detected."""

    source: str
    found: bool
    title: str


@dataclass(frozen=True)
class Subject:
    """What is shown of one subject."""

    name: str
    samples: int
    trials: int
    miss_rate: float
    faces: list[Face]


def write_inspection(cache: Path, path: Path | None = None) -> Path:
    """Write the page of a cache to ``path`` (default ``cache``/inspect.html); returns it.

    Raises ``InputError`` for a folder that is no finished cache and for missing extras.
    """
    target = cache / NAME if path is None else path
    write_text(target, render(Cache.open(cache)))
    return target


def render(cache: Cache) -> str:
    """The page as HTML text; every text from outside is escaped."""
    pages = environment()
    pages.filters["percent"] = lambda share: f"{share:.1%}"
    drawing = require("markupsafe", "train").Markup
    numbers = np.unique(cache.samples["subject"]).tolist()
    text = pages.get_template("inspection.html.j2").render(
        cache=cache,
        manifest=cache.manifest,
        trials=len({*_trial_keys(cache)}),
        subjects=[_subject(cache, number) for number in numbers],
        labels=drawing(drawn(_labels, cache)),
        spectra=drawing(drawn(_spectra, cache, numbers)),
        reasons=_reasons(cache),
        synthetic_note=SYNTHETIC_NOTE,
    )
    return str(text)


def _trial_keys(cache: Cache) -> list[tuple[int, int]]:
    samples = cache.samples
    return list(zip(samples["subject"].tolist(), samples["trial"].tolist(), strict=True))


def _name(cache: Cache, number: int) -> str:
    return str(cache.manifest["subjects"].get(str(number), f"s{number:02d}"))


def _subject(cache: Cache, number: int) -> Subject:
    mine = np.flatnonzero(cache.samples["subject"] == number)
    return Subject(
        name=_name(cache, number),
        samples=len(mine),
        trials=len(np.unique(cache.samples["trial"][mine])),
        miss_rate=float(cache.manifest["face_miss_rates"].get(str(number), 0.0)),
        faces=[_face(cache, row, frame) for row, frame in _chosen(cache, mine)],
    )


def _chosen(cache: Cache, mine: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Frames evenly over a subject's trials, some of them misses where there are misses."""
    mask, found = cache.frame_mask[mine], cache.face_found[mine]
    missed = np.argwhere(mask & ~found)
    if cache.manifest["parameters"]["faces"] == "none":
        missed = missed[:0]  # nothing was looked for
    own = np.argwhere(mask & (found if len(missed) else mask))
    shown = _spread(missed, min(MISSES, len(missed)))
    shown += _spread(own, FACES - len(shown))
    return sorted((int(mine[row]), frame) for row, frame in shown)


def _spread(places: npt.NDArray[np.int64], count: int) -> list[tuple[int, int]]:
    if len(places) == 0 or count == 0:
        return []
    chosen = np.unique(np.linspace(0, len(places) - 1, count).astype(np.int64))
    return [(int(row), int(frame)) for row, frame in places[chosen]]


def _face(cache: Cache, row: int, frame: int) -> Face:
    image = require("PIL.Image", "train")
    picture = image.fromarray(np.ascontiguousarray(cache.video[row, frame].transpose(1, 2, 0)))
    buffer = io.BytesIO()
    picture.resize((EDGE, EDGE)).save(buffer, "JPEG", quality=80)
    looked = cache.manifest["parameters"]["faces"] != "none"
    found = bool(cache.face_found[row, frame]) or not looked
    trial, start = cache.samples["trial"][row], cache.samples["start_s"][row]
    return Face(
        source="data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        found=found,
        title=f"trial {trial}, window at {start:g} s, frame {frame}"
        + ("" if found else ": no face found, box of the nearest frame"),
    )


def _reasons(cache: Cache) -> list[tuple[str, list[str]]]:
    """What was left out, by subject."""
    by_subject: dict[int, list[str]] = {}
    for subject, trial, reason in cache.manifest["skipped"]:
        where = "all" if trial is None else f"trial {trial}"
        by_subject.setdefault(int(subject), []).append(f"{where}: {reason}")
    return [(_name(cache, subject), lines) for subject, lines in sorted(by_subject.items())]


def _labels(cache: Cache) -> Figure:
    """A histogram of each label over the trials, ratings on their scale, classes by name."""
    first = np.unique(np.array(_trial_keys(cache)), axis=0, return_index=True)[1]
    names = list(cache.labels)
    rows = -(-len(names) // COLUMNS)
    figure, axes = new_figure(2.4 * COLUMNS + 0.3, 2.1 * rows, rows, COLUMNS)
    for place, name in zip(axes, names, strict=False):
        values = cache.samples[name][first]
        place.set_title(name)
        if cache.labels[name]:
            counts = Counter(int(value) for value in values)
            classes = cache.labels[name]
            place.barh(classes, [counts[k] for k in range(len(classes))], color=BLUE)
            place.invert_yaxis()
        else:
            on_scale = values.min() >= 1 and values.max() <= 9
            bins = np.arange(0.75, 9.5, 0.5).tolist() if on_scale else 17
            place.hist(values, bins=bins, color=BLUE)
            if values.min() <= 5 <= values.max():
                place.axvline(5, color=VERMILION, linestyle=(0, (4, 3)), linewidth=1.2)
            high, ties = int((values > 5).sum()), int((values == 5).sum())
            place.set_xlabel(f"{high} of {len(values)} trials above 5, {ties} at 5")
    for place in axes[len(names) :]:
        place.set_visible(False)
    return figure


def _spectra(cache: Cache, numbers: list[int]) -> Figure:
    """Power of every subject's EEG before and after filtering."""
    rows = -(-len(numbers) // COLUMNS)
    figure, axes = new_figure(2.4 * COLUMNS + 0.3, 1.9 * rows, rows, COLUMNS)
    hertz = np.arange(cache.spectra.shape[2])
    tiny = np.finfo(np.float64).tiny
    for place, number, (raw, clean) in zip(axes, numbers, cache.spectra, strict=False):
        for power, colour, dashes, label in (
            (raw, MUTED, "--", "recorded"),
            (clean, BLUE, "-", "filtered"),
        ):
            place.plot(hertz, 10 * np.log10(np.maximum(power, tiny)), dashes, c=colour, label=label)
        place.set_title(_name(cache, number))
        place.set_xlabel("Hz")
        place.set_ylim(-40, None)
    if numbers:
        axes[0].set_ylabel("dB of 1 µV²/Hz")
        axes[0].legend(loc="lower left")
    for place in axes[len(numbers) :]:
        place.set_visible(False)
    return figure
