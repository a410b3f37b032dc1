"""MAHNOB-HCI (HCI-Tagging): stimulus sessions with a BDF and a colour face video.

    ROOT/Sessions/<id>/session.xml, Part_<p>_S_Trial<t>_emotion.bdf,
    P<p>-Rec1-<date>_C1 trigger _C_Section_<k>.avi, *All-Data*.tsv (gaze log, optional)

Sessions are found by their session.xml, wherever they lie. Neutral clips and the tagging sessions
belong to other experiments and are passed over. The BDF holds 30 s before and after the stimulus
and marks its start and end in Status; the video goes on through the self-report.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pycdgkd.errors import InputError

from .config import PrepareConfig, split_names
from .eeg import Recording, eeg_trial, open_bdf, referenced
from .mahnob_session import Session, movie_span, read_session
from .study import EegTrial, ReadTrial, Skip, Study, Trial, find_files, rating

# Those with all 20 stimulus sessions complete.
SUBJECTS = (1, 2, 4, 5, 6, 7, 8, 10, 11, 13, 14, *range(17, 26), 27, 28, 29, 30)
# Length of each clip in whole seconds.
CLIPS = {
    "69": 58, "55": 76, "58": 58, "earworm_f": 53, "53": 104, "80": 96, "52": 96, "79": 42,
    "73": 71, "90": 85, "107": 34, "146": 87, "30": 70, "138": 116, "newyork_f": 89, "111": 113,
    "detroit_f": 89, "cats_f": 98, "dallas_f": 89, "funny_f": 87,
}  # fmt: skip
EMOTIONS = {
    0: "neutral", 1: "anger", 2: "disgust", 3: "fear", 4: "joy", 5: "sadness", 6: "surprise",
    11: "amusement", 12: "anxiety",
}  # fmt: skip
ATTRIBUTES = {
    "valence": "feltVlnc",
    "arousal": "feltArsl",
    "control": "feltCtrl",
    "predictability": "feltPred",
    "emotion": "feltEmo",
}
LABELS = ("valence", "arousal")
AROUND = 30.0  # seconds of EEG before and after the stimulus
SLACK = 1.0  # seconds by which marks of a whole clip may come early
TRIALS = 20
BDF_NAME = re.compile(r"part_(\d+)_s_trial(\d+)_emotion\.bdf", re.IGNORECASE)
COLOUR = re.compile(r"c1[ _].*_c_section_\d+\.avi$", re.IGNORECASE)


def scan(root: Path, config: PrepareConfig) -> Study:
    """Find the stimulus sessions and join each with its BDF and its colour video.

    Raises ``InputError`` when there is no session, or none is complete.
    """
    names = split_names(config.labels) if config.labels else LABELS
    unknown = [name for name in names if name not in ATTRIBUTES]
    if unknown:
        raise InputError(
            f"MAHNOB-HCI has no label {unknown[0]!r}; expected some of {', '.join(ATTRIBUTES)}"
        )
    folders: dict[Path, list[Path]] = {}
    for path in find_files(root):
        folders.setdefault(path.parent, []).append(path)
    found: dict[tuple[int, int], Trial] = {}
    skipped: list[Skip] = []
    sessions = 0
    for folder in sorted(f for f in folders if _named(folders[f], "session.xml")):
        told = _stimulus_session(folder, folders[folder], skipped)
        if told is None:
            continue
        sessions += 1
        session, key = told
        if not config.wants(key[0], SUBJECTS):
            continue
        try:
            trial = _trial(session, key, folders[folder], names, config)
            if key in found:
                raise InputError(
                    f"a second session {folder.name} beside {found[key].eeg.parent.name}; "
                    "expected one; remedy: remove one of them"
                )
            found[key] = trial
        except InputError as error:
            skipped.append((*key, str(error)))
    skipped.extend(_absent(found, skipped))
    if not found:
        reasons = "; ".join(reason for _, _, reason in skipped[:2]) or f"{sessions} sessions"
        raise InputError(
            f"no usable stimulus session in {root}: {reasons}; expected Sessions/<id>/session.xml "
            "beside a BDF and a colour video; remedy: give the folder that holds Sessions"
        )
    classes = {"emotion": list(EMOTIONS.values())} if "emotion" in names else {}
    boxes = (root / "boxes.csv",) if config.faces == "boxes" else ()
    return Study(
        dataset="mahnob",
        root=root,
        trials=[found[key] for key in sorted(found)],
        skipped=sorted(skipped, key=lambda entry: (entry[0], entry[1] or 0)),
        label_names=names,
        classes=classes,
        others=(*(trial.video.parent / "session.xml" for trial in found.values()), *boxes),
        stimuli={number: clip for clip, number in _stimuli().items()},
    )


def _stimulus_session(
    folder: Path, files: Sequence[Path], skipped: list[Skip]
) -> tuple[Session, tuple[int, int]] | None:
    """A folder's session with its subject and trial; None for another experiment's, or one that
    cannot be used, which is added to ``skipped``.
    """
    try:
        session = read_session(_named(files, "session.xml")[0])
    except InputError as error:
        skipped.append((0, None, str(error)))
        return None
    if not session.is_stimulus:
        return None
    if session.key is None:
        skipped.append((0, None, f"{folder}: neither subject nor trial can be told"))
        return None
    return session, session.key


def _named(files: Sequence[Path], name: str) -> list[Path]:
    return [path for path in files if path.name.casefold() == name]


def _stimuli() -> dict[str, int]:
    return {clip: number for number, clip in enumerate(sorted(CLIPS), start=1)}


def _absent(found: dict[tuple[int, int], Trial], skipped: Sequence[Skip]) -> list[Skip]:
    """Trials that neither are usable nor were skipped, of the subjects that are there at all."""
    known = {*found, *((subject, trial) for subject, trial, _ in skipped)}
    subjects = sorted({subject for subject, _ in found})
    return [
        (subject, trial, "no session")
        for subject in subjects
        for trial in range(1, TRIALS + 1)
        if (subject, trial) not in known
    ]


def _trial(
    session: Session,
    key: tuple[int, int],
    files: Sequence[Path],
    names: Sequence[str],
    config: PrepareConfig,
) -> Trial:
    where = session.path.parent.name
    recording = _one([f for f in files if BDF_NAME.fullmatch(f.name)], "BDF", where)
    video = _one([f for f in files if COLOUR.search(f.name)], "colour video", where)
    labels = {name: _label(session, name) for name in names}
    clip = Path(session.attributes.get("mediaFile", "")).stem.casefold()
    stimuli = _stimuli()
    if clip not in stimuli:
        raise InputError(
            f"session {where} shows {clip!r}, which is none of the 20 clips; expected e.g. 69.avi"
        )
    span = movie_span(session, files)
    seconds = _whole(stimuli[clip], config)
    if span is None:
        return Trial(*key, stimuli[clip], labels, seconds, video, recording)
    seconds = _shown(seconds, span[1] - span[0])
    return Trial(*key, stimuli[clip], labels, seconds, video, recording, video_start=span[0])


def _whole(stimulus: int, config: PrepareConfig) -> float:
    """Seconds of a stimulus that nothing broke off."""
    return config.trial_seconds or float(CLIPS[sorted(CLIPS)[stimulus - 1]])


def _shown(seconds: float, marked: float) -> float:
    """Length of a stimulus: the clip's, unless its marks say that it was broken off."""
    return marked if marked < seconds - SLACK else seconds


def _one(paths: Sequence[Path], what: str, where: str) -> Path:
    if not paths:
        raise InputError(f"no {what} in session {where}")
    if len(paths) > 1:
        raise InputError(
            f"more than one {what} in session {where}: {paths[0].name} and {paths[1].name}; "
            "remedy: remove all but one"
        )
    return paths[0]


def _label(session: Session, name: str) -> float:
    """Felt ratings are whole numbers from 1 to 9; 0, -1 and nothing mean that none was given."""
    text = session.attributes.get(ATTRIBUTES[name], "")
    if name != "emotion":
        return rating(ATTRIBUTES[name], text)
    codes = list(EMOTIONS)
    if not text.isdecimal() or int(text) not in codes:
        raise InputError(f"feltEmo is {text!r}; expected one of {', '.join(map(str, codes))}")
    return float(codes.index(int(text)))


def open_eeg(study: Study, path: Path, trials: Sequence[Trial], config: PrepareConfig) -> ReadTrial:
    """Open the BDF of one trial."""
    del study, trials
    recording = open_bdf(path, referenced(config))
    start, marked, note = _span(recording)

    def read(trial: Trial) -> EegTrial:
        seconds, whole = _shown(trial.seconds, marked), _whole(trial.experiment_id, config)
        eeg = eeg_trial(recording, start, seconds, config)
        short = f"broken off after {seconds:.0f} of {whole:.0f} s" if seconds < whole else ""
        return EegTrial(eeg.windows, eeg.spectra, "; ".join(filter(None, (note, short))))

    return read


def _span(recording: Recording) -> tuple[int, float, str]:
    """First sample and seconds of the stimulus: between the two Status pulses, else from 30 s on
    to 30 s before the end. And what was assumed, "" for nothing.
    """
    events = recording.events()
    pulses = events[events[:, 1] != 0, 0]
    if len(pulses) == 2:
        return int(pulses[0]) + 1, float(pulses[1] - pulses[0] - 1) / recording.sfreq, ""
    start = round(AROUND * recording.sfreq)
    if recording.length < 2 * start:
        raise InputError(
            f"{recording.path} lasts {recording.length / recording.sfreq:.0f} s and marks "
            f"{len(pulses)} events; expected two, or 30 s before and after the stimulus"
        )
    note = f"Status marks {len(pulses)} events instead of 2: stimulus taken from 30 s on"
    return start, recording.length / recording.sfreq - 2 * AROUND, note
