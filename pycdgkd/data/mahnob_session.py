"""What a session of MAHNOB-HCI says of itself: session.xml and the gaze log."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from pycdgkd.errors import InputError

from .study import number

MAX_XML = 4 << 20
MAX_LOG = 512 << 20
LONGEST = 600.0  # seconds; no stimulus comes near


@dataclass(frozen=True)
class Session:
    """Attributes of the root element, the subject's number, and the files it lists."""

    path: Path
    attributes: dict[str, str]
    subject: int | None
    tracks: tuple[str, ...]

    @property
    def is_stimulus(self) -> bool:
        """Whether an emotional clip was shown (not a neutral one, not the tagging experiment)."""
        return self.attributes.get("isStim", "1") == "1" and any(
            re.search(r"_S_Trial\d+_emotion", name, re.IGNORECASE) for name in self.tracks
        )

    @property
    def key(self) -> tuple[int, int] | None:
        """Subject and trial, from the recording's name, else by session = 130 (p - 1) + 2 t."""
        for name in self.tracks:
            match = re.search(r"Part_(\d+)_S_Trial(\d+)_emotion", name, re.IGNORECASE)
            if match:
                return int(match[1]), int(match[2])
        session = number(self.attributes.get("sessionId", ""))
        if self.subject is None or not session.is_integer():
            return None
        trial = (int(session) - 130 * (self.subject - 1)) // 2
        return (self.subject, trial) if 1 <= trial <= 20 else None

    def seconds(self, sample: float) -> float:
        """Second of the video at an audio sample, by which all of a session was synchronised."""
        begin = number(self.attributes.get("audBeginSmp", ""))
        return (sample - begin) / number(self.attributes.get("audRate", ""))


def read_session(path: Path) -> Session:
    """Read a session.xml. Nothing in it is expanded or fetched: a document type is refused.

    Raises ``InputError`` for a file that is too large, damaged, or no session's.
    """
    root: list[dict[str, str]] = []
    subjects: list[str] = []
    tracks: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if not root:
            if name != "session":
                raise InputError(f"{path} describes a {name[:40]!r}; expected a session")
            root.append(attributes)
        elif name == "subject":
            subjects.append(attributes.get("id", ""))
        elif name == "track":
            tracks.append(attributes.get("filename", ""))

    def refuse(*_: object) -> None:
        raise InputError(
            f"{path} declares a document type, which no session does; remedy: copy it again from "
            "its source"
        )

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        if path.stat().st_size > MAX_XML:
            raise InputError(f"{path} has more than {MAX_XML} bytes; expected a session.xml")
        parser.Parse(path.read_bytes(), True)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; remedy: mend its permissions"
        ) from error
    except (expat.ExpatError, ValueError, LookupError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not XML: {error}; expected a session.xml; remedy: copy it again"
        ) from error
    subject = int(subjects[0]) if subjects and subjects[0].isdecimal() else None
    return Session(path, root[0], subject, tuple(tracks))


def movie_span(session: Session, files: Sequence[Path]) -> tuple[float, float] | None:
    """Start and end of the stimulus in seconds of the video, by the gaze log; None without one.

    The log's MovieStart and MovieEnd carry the audio's sample number.
    """
    logs = [
        path
        for path in files
        if "all-data" in path.name.casefold() and path.suffix.casefold() == ".tsv"
    ]
    if len(logs) != 1 or logs[0].stat().st_size > MAX_LOG:
        return None
    marks: dict[str, float] = {}
    with logs[0].open(encoding="latin-1", newline="") as file:
        column: dict[str, int] = {}
        for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if not column and {"AudioSampleNumber", "Event"} <= set(line):
                column = {name: place for place, name in enumerate(line)}
            elif column and len(line) > max(column["Event"], column["AudioSampleNumber"]):
                event = line[column["Event"]].strip()
                if event in ("MovieStart", "MovieEnd"):
                    marks.setdefault(event, number(line[column["AudioSampleNumber"]]))
    if len(marks) < 2:
        return None
    start, end = (session.seconds(marks[name]) for name in ("MovieStart", "MovieEnd"))
    return (start, end) if 0 <= start < end <= start + LONGEST else None
