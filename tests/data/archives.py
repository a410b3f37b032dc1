"""Writers of archives in the layouts of DEAP and MAHNOB-HCI, with their orders, codes and oddities.

Nothing in them was recorded. Media are short and mostly links to one file; what the tables and the
file names say is of full size.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import av
import edfio
import numpy as np
import numpy.typing as npt

from pycdgkd.data.deap_dat import GENEVA
from pycdgkd.data.mahnob import CLIPS

RATINGS_HEADER = (
    "Participant_id", "Trial", "Experiment_id", "Start_time", "Valence", "Arousal", "Dominance",
    "Liking", "Familiarity",
)  # fmt: skip
# The last trials of these subjects were not filmed.
FILMED = dict.fromkeys(range(1, 23), 40) | {3: 39, 5: 39, 11: 37, 14: 39}
NO_FAMILIARITY = (2, 15, 23)
LIMITS = (-(2**23), 2**23 - 1)

Signal = npt.NDArray[np.int32]


def write_bdf(
    path: Path, signals: dict[str, Signal], status: Signal, rate: int, *, name: str = "Status"
) -> Path:
    """A BDF of these digital values (32 of them a microvolt) and a trigger channel."""
    scale = {"physical_range": (LIMITS[0] / 32, LIMITS[1] / 32), "digital_range": LIMITS}
    channels = [
        edfio.BdfSignal.from_digital(values, rate, label=label, physical_dimension="uV", **scale)
        for label, values in signals.items()
    ]
    plain = {"physical_range": LIMITS, "digital_range": LIMITS}
    channels.append(edfio.BdfSignal.from_digital(status, rate, label=name, **plain))
    path.parent.mkdir(parents=True, exist_ok=True)
    edfio.Bdf(channels, data_record_duration=1).write(path)
    return path


def write_video(
    path: Path,
    count: int,
    draw: Callable[[int], npt.NDArray[np.uint8]],
    *,
    rate: int = 50,
    codec: str = "mpeg4",
) -> Path:
    """A video of ``count`` frames, each drawn by its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        first = draw(0)
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        for number in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(number), "rgb24")))
        container.mux(stream.encode())
    return path


def grey(value: int, height: int = 48, width: int = 64) -> npt.NDArray[np.uint8]:
    """A picture of one brightness."""
    return np.full((height, width, 3), value, np.uint8)


def deap_ratings(subjects: int = 32) -> list[tuple[object, ...]]:
    """Rows of participant_ratings; every subject saw the 40 videos in an order of their own."""
    rng = np.random.default_rng(11)
    rows: list[tuple[object, ...]] = []
    for subject in range(1, subjects + 1):
        for trial, shown in enumerate((rng.permutation(40) + 1).tolist(), start=1):
            ratings = rng.uniform(1, 9, 4).round(2).tolist()
            familiarity = "" if subject in NO_FAMILIARITY else int(rng.integers(1, 6))
            rows.append((subject, trial, shown, trial * 70_000_000, *ratings, familiarity))
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[object]], separator: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\r\n".join(separator.join(map(str, row)) for row in rows) + "\r\n"
    path.write_bytes(text.encode("cp1252"))
    return path


def write_deap_archive(root: Path) -> Path:
    """All of DEAP by name: 32 recordings, 874 face videos, the ratings, and what systems leave."""
    header = ("Participant_id", "Trial", "Experiment_id", "Start_time (µs)", *RATINGS_HEADER[4:])
    write_csv(
        root / "metadata_csv" / "participant_ratings.csv", [header, *deap_ratings()], separator=";"
    )
    one = np.arange(512 * 2, dtype=np.int32) % 7
    bdf = write_bdf(root / "one.bdf", dict.fromkeys(GENEVA, one), one, 512)
    avi = write_video(root / "one.avi", 3, lambda n: grey(40 * n))
    for subject in range(1, 33):
        link(bdf, root / "data_original" / "data_original" / f"s{subject:02d}.bdf")
        (root / "data_original" / f"._s{subject:02d}.bdf").write_bytes(b"\0\5\x16\7 resource fork")
    for subject, count in FILMED.items():
        folder = root / "face_video" / f"s{subject:02d}"
        for trial in range(1, count + 1):
            link(avi, folder / f"s{subject:02d}_trial{trial:02d}.avi")
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
        (folder / ".DS_Store").write_bytes(b"\0")
    bdf.unlink()
    avi.unlink()
    return root


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)


class _Python2Pickler(pickle._Pickler):
    """Writes bytes and text as Python 2 wrote its strings, as DEAP's files have them."""

    def save_string(self, text: str | bytes) -> None:
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)
    dispatch[bytes] = save_string
    dispatch[str] = save_string


def python2_pickle(content: Any) -> bytes:
    """A pickle as Python 2 and the NumPy of its time wrote it."""
    stream = io.BytesIO()
    _Python2Pickler(stream, protocol=2).dump(content)
    return stream.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def write_dat(path: Path, ratings: Sequence[Sequence[object]]) -> Path:
    """A subject's .dat: the row of Experiment_id e holds 10 e microvolts at 10 Hz on F3.

    Every other EEG channel holds its own number of microvolts at 20 Hz; the 3 s before the video
    hold ten times as much.
    """
    time = np.arange(8064) / 128
    data = np.zeros((40, 40, 8064), np.float32)
    data[:, :32] = np.arange(1, 33)[None, :, None] * np.sin(2 * np.pi * 20 * time)
    size = 10.0 * np.arange(1, 41)[:, None]
    data[:, GENEVA.index("F3")] = size * np.sin(2 * np.pi * 10 * time)
    data[:, :, :384] *= 10
    labels = np.zeros((40, 4))
    for row in ratings:
        labels[int(str(row[2])) - 1] = row[4:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(python2_pickle({"labels": labels, "data": data}))
    return path


# Trials with both recordings of the subjects that are not complete.
MAHNOB_OTHERS = {3: 17, 9: 14, 16: 16, 26: 0, 12: 0, 15: 0}
MAHNOB_SUBJECTS = (*range(1, 31),)


def session_xml(subject: int, trial: int, media: str, **changes: str) -> str:
    """A stimulus session's description, with the attributes that the real ones have."""
    session = (subject - 1) * 130 + 2 * trial
    values = {
        "sessionId": str(session), "date": "2009/07/10", "time": "14:02:11",
        "experimentType": "emotion elicitation", "isStim": "1", "feltEmo": "4", "feltArsl": "6",
        "feltVlnc": "7", "feltCtrl": "5", "feltPred": "4", "cutNr": str(2 * trial),
        "cutLenSec": "80.0", "vidRate": "60.97", "vidBeginSmp": "0", "vidEndSmp": "5000",
        "audRate": "48000", "audBeginSmp": "1000000", "audEndSmp": "5000000", "mediaFile": media,
    } | changes  # fmt: skip
    attributes = " ".join(f'{name}="{value}"' for name, value in values.items())
    bdf, video = mahnob_names(subject, trial)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f"<session {attributes}>\n"
        f'  <subject id="{subject}" gender="female"/>\n'
        f'  <track filename="{video}" color="1" type="Video"><annotation type="Gaze" /></track>\n'
        f'  <track filename="{bdf}" type="Physiological"/>\n</session>\n'
    )


def mahnob_names(subject: int, trial: int) -> tuple[str, str]:
    """Names of a session's BDF and colour video."""
    return (
        f"Part_{subject}_S_Trial{trial}_emotion.bdf",
        f"P{subject}-Rec1-2009.07.10.14.02.11_C1 trigger _C_Section_{2 * trial}.avi",
    )


def write_mahnob_archive(root: Path) -> Path:
    """All of MAHNOB-HCI's sessions by name: stimulus, neutral and tagging, complete or not."""
    one = np.arange(256 * 2, dtype=np.int32) % 7
    bdf = write_bdf(root / "one.bdf", dict.fromkeys(GENEVA, one), one, 256)
    avi = write_video(root / "one.avi", 3, lambda n: grey(40 * n), rate=61)
    clips = sorted(CLIPS)
    for subject in MAHNOB_SUBJECTS:
        for trial in range(1, 21):
            folder = root / "Sessions" / str((subject - 1) * 130 + 2 * trial)
            folder.mkdir(parents=True)
            media = clips[(trial * 7 + subject) % 20] + ".avi"
            (folder / "session.xml").write_text(session_xml(subject, trial, media))
            names = mahnob_names(subject, trial)
            if trial <= MAHNOB_OTHERS.get(subject, 20):
                link(bdf, folder / names[0])
            if trial <= MAHNOB_OTHERS.get(subject, 20) or subject == 12:
                link(avi, folder / names[1])
                link(avi, folder / names[1].replace("_C1 trigger _C_", "_C2 trigger _BW_"))
        neutral = root / "Sessions" / str((subject - 1) * 130 + 1)
        neutral.mkdir()
        text = session_xml(subject, 1, "colorbars_final_f.avi", isStim="0")
        (neutral / "session.xml").write_text(text.replace("_S_Trial", "_N_Trial"))
        link(bdf, neutral / f"Part_{subject}_N_Trial1_emotion.bdf")
        tagging = root / "Sessions" / str((subject - 1) * 130 + 41)
        tagging.mkdir()
        text = session_xml(subject, 1, "tag.avi", experimentType="implicit tagging")
        (tagging / "session.xml").write_text(text.replace("_S_Trial1_emotion", "_taggingImages1"))
    (root / "Sessions" / ".DS_Store").write_bytes(b"\0")
    bdf.unlink()
    avi.unlink()
    return root


def write_mahnob_session(
    root: Path,
    subject: int,
    trial: int,
    clip: str,
    *,
    pulses: bool = True,
    gaze: float | None = None,
    shown: int | None = None,
    **changes: str,
) -> Path:
    """One session with recordings. EEG: 12 Hz on C3 from the stimulus on, 24 Hz before it.

    The video counts its frames in brightness, 61 a second. pulses: whether Status marks the
    stimulus. gaze: second of the video at which the gaze log has MovieStart. shown: seconds after
    which Status marks the end, the clip's by default.
    """
    rate, seconds = 256, CLIPS[clip]
    start = round(30.35 * rate) if pulses else 30 * rate
    length = (60 + seconds + 1) * rate
    rng = np.random.default_rng([subject, trial])
    time = (np.arange(length) - start) / rate
    signals = {}
    for name in (*GENEVA, "EXG1", "EXG2", "EXG3"):
        signals[name] = np.rint(32 * rng.normal(0, 2, length)).astype(np.int32)
    wave = np.where(time >= 0, np.sin(2 * np.pi * 12 * time), np.sin(2 * np.pi * 24 * time))
    signals["C3"] = signals["C3"] + np.rint(32 * 40 * wave).astype(np.int32)
    for name in ("GSR1", "GSR2", "Erg1", "Erg2", "Resp", "Temp"):
        signals[name] = np.arange(length, dtype=np.int32) % 100
    status = np.full(length, 0x010000, np.int32)
    if pulses:
        for sample in (start - 1, start + (seconds if shown is None else shown) * rate):
            status[sample : sample + 4] = 0x010010
    folder = root / "Sessions" / str((subject - 1) * 130 + 2 * trial)
    bdf, video = mahnob_names(subject, trial)
    write_bdf(folder / bdf, signals, status, rate)
    count = round((seconds + 8) * 61)
    write_video(folder / video, count, lambda n: grey(n // 61 % 100 * 2 + 20, 32, 32), rate=61)
    (folder / "session.xml").write_text(session_xml(subject, trial, f"{clip}.avi", **changes))
    if gaze is not None:
        header = "\n".join(f"Line {k}" for k in range(23))
        begin = 1_000_000 + round(gaze * 48000)
        lines = [
            "Number\tTimestamp\tAudioSampleNumber\tEvent\tDescriptor",
            f"1\t10\t{begin - 5}\t\t",
            f"2\t20\t{begin}\tMovieStart\tmovie",
            f"3\t99\t{begin + seconds * 48000}\tMovieEnd\tmovie",
        ]
        (folder / f"P{subject}-Rec1-All-Data-New_Section_{2 * trial}.tsv").write_text(
            header + "\n" + "\n".join(lines) + "\n"
        )
    return folder
