"""Files from outside that are damaged or mean harm: an error that names them, and nothing runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import xlwt
from archives import (
    RATINGS_HEADER,
    deap_ratings,
    python2_pickle,
    session_xml,
    write_csv,
    write_dat,
    write_deap_archive,
)

from pycdgkd.data import PrepareConfig, tables
from pycdgkd.data.boxes import read_boxes
from pycdgkd.data.check import check_dataset
from pycdgkd.data.deap import read_ratings, scan
from pycdgkd.data.deap_dat import read_dat
from pycdgkd.data.mahnob_session import movie_span, read_session
from pycdgkd.data.study import number
from pycdgkd.data.tables import read_table
from pycdgkd.errors import InputError


class Harm:
    """What a pickle may ask for: any callable with any arguments."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["whole", "data", "labels"])
def test_a_hostile_pickle_is_refused_by_name_and_does_nothing(tmp_path: Path, where: str) -> None:
    harm = Harm(tmp_path / "harm")
    content: object = {"data": np.zeros(3), "labels": np.zeros(3)}
    if where == "whole":
        content = harm
    else:
        content[where] = harm  # type: ignore[index]  # a dictionary in this branch
    (tmp_path / "s01.dat").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match=r"s01.dat is not .* asks for posix.mkdir, which no data"):
        read_dat(tmp_path / "s01.dat")
    assert not (tmp_path / "harm").exists()
    # The file is dangerous indeed.
    pickle.loads((tmp_path / "s01.dat").read_bytes())
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": np.zeros((40, 40, 8064), np.int8)}, "'labels'"),
        ({"data": np.zeros((2, 2)), "labels": np.zeros((40, 4))}, r"data \(2, 2\) and labels"),
        ({"data": np.array([{}]), "labels": np.zeros(1)}, "'O8' is not a number's"),
        ({"data": np.zeros(2, [("a", "f4")]), "labels": np.zeros(1)}, "'V4' is not a number's"),
        ({"data": "text", "labels": "text"}, "is not one of DEAP's"),
        (3, "is not one of DEAP's"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: object, words: str) -> None:
    (tmp_path / "a.dat").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match=words):
        read_dat(tmp_path / "a.dat")


def test_an_array_that_promises_more_than_it_has(tmp_path: Path) -> None:
    content = python2_pickle({"data": np.zeros(4, np.int16), "labels": np.zeros(1)})
    shape = pickle.dumps((4,), protocol=2)[2:-3]
    assert shape in content
    huge = content.replace(shape, pickle.dumps((1 << 40,), protocol=2)[2:-3], 1)
    for bad in (huge, content[:-60], b"", b"\x80\x02", b"garbage", b"\x80\x02r\xff\xff\xff\xff."):
        (tmp_path / "a.dat").write_bytes(bad)
        with pytest.raises(InputError, match=r"a.dat is not one of DEAP's preprocessed files"):
            read_dat(tmp_path / "a.dat")
    with pytest.raises(InputError, match=r"cannot read .*none.dat"):
        read_dat(tmp_path / "none.dat")


def test_python_2_and_python_3_pickles_read_alike(tmp_path: Path) -> None:
    rows = deap_ratings(1)
    write_dat(tmp_path / "a.dat", rows)
    data, labels = read_dat(tmp_path / "a.dat")
    (tmp_path / "b.dat").write_bytes(
        pickle.dumps({"data": np.asfortranarray(data), "labels": labels.astype(">f8")}, protocol=2)
    )
    for got, expected in zip(read_dat(tmp_path / "b.dat"), (data, labels), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert labels[int(str(rows[0][2])) - 1].tolist() == list(rows[0][4:8])


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE session [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {chr(98 + k)} "{f"&{chr(97 + k)};" * 10}">' for k in range(12))
    + ']><session sessionId="&m;"/>'
)
OUTSIDE = (
    '<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    '<session sessionId="1">&x;</session>'
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "declares a document type"),
        (OUTSIDE, "declares a document type"),
        ("<session", "is not XML"),
        ("", "is not XML"),
        ("<html/>", "describes a 'html'; expected a session"),
        ('<?xml version="1.0" encoding="klingon"?><session/>', "is not XML"),
    ],
)
def test_sessions_that_mean_harm_or_nothing(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "session.xml").write_text(text)
    with pytest.raises(InputError, match=words):
        read_session(tmp_path / "session.xml")


def test_a_session_says_who_and_when(tmp_path: Path) -> None:
    path = tmp_path / "session.xml"
    path.write_text(session_xml(4, 7, "69.avi"))
    session = read_session(path)
    assert session.key == (4, 7)
    assert session.is_stimulus
    assert session.attributes["sessionId"] == str(3 * 130 + 14)
    assert session.seconds(1_048_000) == 1.0
    # Without the recording's name the number of the session tells the trial.
    text = session_xml(4, 7, "69.avi").replace("Part_4_S_Trial7_emotion", "x")
    path.write_text(text)
    assert read_session(path).key == (4, 7)
    log = tmp_path / "P4-Rec1-All-Data-New_Section_14.tsv"
    for content in ("", "Event\tAudioSampleNumber\nMovieStart\tx\nMovieEnd\t9\n", "\0\n\x80"):
        log.write_text(content)
        assert movie_span(session, [log]) is None


@pytest.mark.parametrize(
    "name", ["../secret.avi", "/etc/passwd", "a/../../secret.avi", "link.avi", ""]
)
def test_no_path_leads_outside_its_root(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.avi").write_bytes(b"secret")
    (root / "link.avi").symlink_to(tmp_path / "secret.avi")
    lines = [("subject", "trial", "video", "eeg", "mood"), ("1", "1", name, "a.edf", "glad")]
    write_csv(root / "trials.csv", lines)
    with pytest.raises(InputError, match=r"trials.csv line 2 names the file .* does not lie in"):
        check_dataset(root, PrepareConfig.of("folder"), "folder")
    write_csv(root / "boxes.csv", [("video", "x1", "y1", "x2", "y2"), (name, 0, 0, 9, 9)])
    with pytest.raises(InputError, match=r"boxes.csv line 2 names the file"):
        read_boxes(root)


def ods(path: Path, rows: list[list[object]]) -> None:
    cells = "".join(
        "<table:table-row>"
        + "".join(
            f'<table:table-cell office:value-type="float" office:value="{value}"/>'
            if isinstance(value, int | float)
            else '<table:table-cell office:value-type="string">'
            f"<text:p>{value}</text:p></table:table-cell>"
            for value in row
        )
        + "</table:table-row>"
        for row in rows
    )
    names = "".join(
        f' xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for name in ("office", "table", "text")
    )
    body = f'<table:table table:name="a">{cells}</table:table>'
    with zipfile.ZipFile(path, "w") as file:
        kind = "application/vnd.oasis.opendocument.spreadsheet"
        file.writestr("mimetype", kind)
        entry = f'<m:file-entry m:full-path="/" m:media-type="{kind}"/>'
        scheme = "urn:oasis:names:tc:opendocument:xmlns:manifest:1.0"
        manifest = f'<m:manifest xmlns:m="{scheme}">{entry}</m:manifest>'
        file.writestr("META-INF/manifest.xml", manifest)
        file.writestr(
            "content.xml",
            f'<?xml version="1.0"?><office:document-content{names}><office:body>'
            f"<office:spreadsheet>{body}</office:spreadsheet></office:body>"
            "</office:document-content>",
        )


def test_ratings_as_every_spreadsheet_has_them(tmp_path: Path) -> None:
    rows: list[list[object]] = [list(RATINGS_HEADER), *([*row] for row in deap_ratings(2))]
    write_csv(tmp_path / "a.csv", rows)
    expected = read_ratings(tmp_path / "a.csv")
    assert len(expected) == 80
    book = xlwt.Workbook()
    sheet = book.add_sheet("ratings")
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            sheet.write(i, j, value)
    book.save(str(tmp_path / "a.xls"))
    ods(tmp_path / "a.ods", rows)
    text = "\n".join("\t".join(map(str, row)) for row in rows)
    (tmp_path / "b.csv").write_text(text, encoding="utf-16")
    for name in ("a.xls", "a.ods", "b.csv"):
        found = read_ratings(tmp_path / name)
        assert list(found) == list(expected)
        for key, row in found.items():
            for column, cell in row.items():
                assert (cell == "") == (expected[key][column] == "")
                assert cell == "" or number(cell) == number(expected[key][column])


@pytest.mark.parametrize("name", ["a.xls", "a.ods", "a.xlsx", "a.csv"])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04" + b"x" * 50])
def test_damaged_tables_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        read_table(tmp_path / name, ("trial",))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("while True: pass", r"a.xls: it took longer than 0.5 s; expected a spreadsheet"),
        ("import os; os.abort()", r"a.xls: its reader died of signal 6; expected a spreadsheet"),
        ("raise ValueError('no sheet')", r"a.xls: ValueError: no sheet; expected a spreadsheet"),
        ("print('[')", r"cannot read .*a.xls: Expecting value"),
    ],
)
def test_a_spreadsheet_s_reader_may_hang_or_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    (tmp_path / "reader.py").write_text(program)
    (tmp_path / "a.xls").write_bytes(b"")
    monkeypatch.setattr(tables, "READER", tmp_path / "reader.py")
    monkeypatch.setattr(tables, "SECONDS", 0.5 if "while" in program else 30)
    with pytest.raises(InputError, match=words):
        read_table(tmp_path / "a.xls")


def test_doubles_are_named_and_left_out(tmp_path: Path) -> None:
    root = write_deap_archive(tmp_path / "root")
    source = root / "face_video" / "s01" / "s01_trial05.avi"
    (root / "copy").mkdir()
    os.link(source, root / "copy" / "s01_trial05.avi")
    os.link(source, root / "copy" / "S02.BDF")
    found = scan(root, PrepareConfig())
    reasons = {(s, t): reason for s, t, reason in found.skipped}
    assert reasons[1, 5].startswith("more than one video s01_trial05.avi: copy/s01_trial05.avi and")
    assert reasons[2, None].startswith("more than one recording s02.bdf: copy/S02.BDF and")
    assert len(found.trials) == 874 - 1 - 40


def test_empty_and_truncated_files_are_found_without_preparing(tmp_path: Path) -> None:
    root = write_deap_archive(tmp_path / "root")
    video = root / "face_video" / "s04" / "s04_trial01.avi"
    video.unlink()
    video.touch()
    recording = root / "data_original" / "data_original" / "s07.bdf"
    whole = recording.read_bytes()
    recording.unlink()
    recording.write_bytes(whole[:-100])
    found = check_dataset(root, PrepareConfig(), "deap")
    assert found.trials == 874 - 1 - 40
    reasons = {(s, t): reason for s, t, reason in found.skipped}
    assert "s04_trial01.avi is empty (0 bytes)" in reasons[4, 1]
    assert "s07.bdf is truncated" in reasons[7, 1]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_unreadable_files_are_named(tmp_path: Path) -> None:
    root = write_deap_archive(tmp_path / "root")
    (root / "data_original" / "data_original" / "s07.bdf").chmod(0)
    found = check_dataset(root, PrepareConfig(), "deap")
    assert found.trials <= 874 - 40


def test_a_file_that_cannot_be_read_costs_its_trials_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycdgkd.data import pipeline

    root = write_deap_archive(tmp_path / "root")
    real = pipeline.fingerprint

    def refuse(path: Path) -> str:
        if path.name == "s07.bdf":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(pipeline, "fingerprint", refuse)
    study, plan = pipeline.plan_cache(scan(root, PrepareConfig()), PrepareConfig())
    assert len(plan.trials) == len(study.trials) == 874 - 40
    reasons = {(s, t): reason for s, t, reason in plan.skipped}
    assert reasons[7, 1].startswith("cannot read data_original/data_original/s07.bdf: Permission")


def test_pickles_are_never_read_by_the_standard_loader() -> None:
    """`pickle.load` itself stays out of the package: one reader, the restricted one."""
    package = Path(__file__).resolve().parents[2] / "pycdgkd"
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert "pickle.load" not in text, path
        assert "allow_pickle=True" not in text, path
