"""The report: what it says, what it escapes, what it does without."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pycdgkd.cli import main
from pycdgkd.errors import InputError
from pycdgkd.report import write_report
from pycdgkd.report.logs import binned, read_table, source_shares
from pycdgkd.report.results import load_results, parse_results
from pycdgkd.report.table import SYNTHETIC_NOTE, results_table

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

MakeRun = Callable[..., Path]
VOID = {"meta", "br", "path", "use", "rect"}


def interval(value: str, low: str, high: str) -> str:
    return f"{value} {low} \N{EN DASH} {high}"


class Page(HTMLParser):
    """Visible text, tags, and a check that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.tags = "", list[str](), list[str]()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f" {data}"


def page(run: Path) -> tuple[str, Page]:
    text = write_report(run).read_text(encoding="utf-8")
    parsed = Page(text)
    parsed.text = " ".join(parsed.text.split())
    return text, parsed


def student_alone(results: dict[str, Any]) -> dict[str, Any]:
    """The same run with one network: quicker to draw."""
    return {**results, "networks": {"student": results["networks"]["student"]}}


def test_the_page_says_what_the_run_says(make_run: MakeRun):
    _, parsed = page(make_run())
    for piece in (
        "Valence from face video",
        "/run networks nano seed 3",
        "nano",
        "ab12ab12ab12",
        interval("0.900", "0.820", "0.980"),  # teacher, accuracy
        interval("0.740", "0.650", "0.830"),  # student, balanced accuracy
        "video + EEG",
        "123,456",
        "150 (47%)",
        "+10.0 points",
        "-2.0 to +21.0",
        "The interval contains 0",
        "teacher (25%) , assistant 1 (100%) , assistant 2 (100%)",
        "kept: 0.830",
        "cross-entropy and KL",
        "convergence rate r",
        SYNTHETIC_NOTE,
    ):
        assert piece in parsed.text, piece
    assert parsed.tags.count("svg") == 7  # overview, balance, five networks
    assert parsed.text.count("is low") == 5


def test_the_page_loads_nothing_and_is_small(make_run: MakeRun):
    text, parsed = page(make_run())
    assert len(text.encode()) < 500_000
    assert "http" not in text.replace("http-equiv", "")
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_equal_runs_give_equal_pages(make_run: MakeRun, results_dict: dict[str, Any]):
    run = make_run(student_alone(results_dict))
    assert page(run)[0] == page(run)[0]


def test_hostile_text_is_escaped(make_run: MakeRun, results_dict: dict[str, Any]):
    evil = "<script>alert('x')</script>"
    results_dict["label"] = evil
    results_dict["preset"] = f'"{evil}$\\frac$'
    results_dict["warnings"] = [evil]
    results_dict["networks"][f"{evil}$x$"] = results_dict["networks"].pop("control")
    results_dict["networks"]["student"]["sources"] = [evil]
    text, parsed = page(make_run(results_dict))
    assert "<script" not in text
    assert "script" not in parsed.tags
    assert parsed.text.count(evil) >= 4


def test_real_recordings_carry_no_synthetic_note(make_run: MakeRun, results_dict: dict[str, Any]):
    results_dict["synthetic"] = False
    run = make_run(student_alone(results_dict))
    assert SYNTHETIC_NOTE not in page(run)[1].text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.02, 0.2, "teaching helped"), (-0.2, -0.01, "teaching harmed"), (-0.1, 0.1, "contains 0")],
)
def test_the_gain_is_put_into_words(
    make_run: MakeRun, results_dict: dict[str, Any], low: float, high: float, expected: str
):
    gain = {"value": (low + high) / 2, "low": low, "high": high}
    results_dict["comparison"] = {"student_minus_control": gain}
    assert expected in page(make_run(student_alone(results_dict)))[1].text


def test_missing_and_damaged_logs_leave_a_note(make_run: MakeRun):
    run = make_run()
    (run / "teacher" / "steps.csv").unlink()
    (run / "control" / "log.csv").unlink()
    (run / "student" / "log.csv").write_text(
        "epoch,cross_entropy,val_loss,val_accuracy\n1,x,0,0\n", encoding="utf-8"
    )
    (run / "assistant_1" / "steps.csv").write_text("step,epoch\n", encoding="utf-8")
    parsed = page(run)[1]
    for note in (
        "teacher/steps.csv is missing",
        "control/log.csv is missing",
        "student/log.csv is damaged: could not convert string to float: 'x'",
        "assistant_1/steps.csv has no rows",
    ):
        assert note in parsed.text, note
    assert "Balance of the teacher" not in parsed.text
    assert (
        interval("0.750", "0.670", "0.830") in parsed.text
    )  # the student's figures are still there


def test_logs_outside_the_run_are_not_read(make_run: MakeRun, results_dict: dict[str, Any]):
    results_dict["networks"]["../outside"] = results_dict["networks"].pop("control")
    run = make_run(results_dict)
    (run.parent / "outside").mkdir()
    log = (run / "teacher" / "log.csv").read_text(encoding="utf-8")
    (run.parent / "outside" / "log.csv").write_text(log, encoding="utf-8")
    parsed = page(run)[1]
    assert "'../outside' is no folder name" in parsed.text
    assert parsed.tags.count("svg") == 6


def test_long_logs_stay_small(make_run: MakeRun):
    run = make_run()
    rng = np.random.default_rng(0)
    lines = ["step,epoch,rate_video,rate_eeg,lambda_video,lambda_eeg"]
    values = rng.random((20_000, 4)).round(5).tolist()
    lines += [f"{i},1,{','.join(map(str, row))}" for i, row in enumerate(values)]
    (run / "teacher" / "steps.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert len(page(run)[0].encode()) < 500_000


def test_binned_keeps_means_and_extremes():
    y = np.array([0.0, 2.0, np.nan, 4.0, 8.0])
    series = binned(np.arange(5.0), y, groups=2)
    assert series.x.tolist() == [0.5, 3.5]
    assert series.mean.tolist() == [1.0, 6.0]
    assert series.low.tolist() == [0.0, 4.0]
    assert series.high.tolist() == [2.0, 8.0]


def test_source_shares_count_steps(make_run: MakeRun):
    steps = read_table(make_run() / "student", "steps.csv", ("step",))
    assert source_shares(steps) == {"teacher": 0.25, "assistant_1": 1.0, "assistant_2": 1.0}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "has no entry 'sources'"),
        (None, "holds no results.json"),
    ],
)
def test_unusable_results_are_an_input_error(make_run: MakeRun, content: str | None, expected: str):
    run = make_run()
    (run / "results.json").unlink()
    if content is not None:
        (run / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=expected):
        load_results(run)


def test_class_counts_must_fit(results_dict: dict[str, Any]):
    results_dict["networks"]["student"]["test"]["confusion"] = [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="do not fit num_classes"):
        parse_results(results_dict)


def test_text_table(results_dict: dict[str, Any]):
    lines = results_table(parse_results(results_dict)).splitlines()
    assert lines[1] == "valence above 5: 40 test samples of 20 trials (20 low, 20 high)"
    assert [line.split()[0] for line in lines[4:10]] == [
        "always", "teacher", "assistant", "assistant", "student", "control",
    ]  # fmt: skip
    assert lines[8].split()[1:] == [
        "video",
        "0.750",
        "0.670",
        "-",
        "0.830",
        "0.740",
        "0.730",
        "12",
        "95",
    ]
    assert lines[-1] == "student minus control: +10.0 points (95 %: -2.0 to +21.0)"
    assert len({len(line) for line in lines[5:10]}) == 1  # the columns stand below one another


def test_report_command(
    make_run: MakeRun, results_dict: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    run = make_run(student_alone(results_dict))
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report   {run / 'report.html'}\n"
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_missing_extra_is_one_line(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(make_run())]) == 2
    text = capsys.readouterr().err
    assert 'pip install "pycdgkd[train]"' in text
    assert text.count("\n") == 1


def test_results_survive_json(results_dict: dict[str, Any]):
    results = parse_results(json.loads(json.dumps(results_dict)))
    assert [network.name for network in results.networks][-2:] == ["student", "control"]
    assert results.find("student").accuracy.low == pytest.approx(0.67)
    assert results.class_names == ("low", "high")
