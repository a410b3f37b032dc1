"""Progress as plain lines: whole stages are never lost, quick lines are held back."""

from __future__ import annotations

import io
import time

import pytest

from pycdgkd.cli import progress
from pycdgkd.cli.progress import shown_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_quick_lines_of_a_stage_are_held_back(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    out = io.StringIO()
    with shown_progress(out) as show:
        for number in range(1, 4):
            show(f"first stage {number}/9")
            clock.now += 0.3
        clock.now += 2.0
        show("first stage 4/9")
        show("first stage 5/9")
        show("second stage 1/2")
        show("second stage 2/2")
    assert out.getvalue().splitlines() == [
        "first stage 1/9",
        "first stage 4/9",
        "first stage 5/9",
        "second stage 1/2",
        "second stage 2/2",
    ]


def test_the_last_line_is_written_when_the_work_breaks():
    out = io.StringIO()

    def work() -> None:
        with shown_progress(out) as show:
            show("stage 1/2")
            show("stage 2/2")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert out.getvalue() == "stage 1/2\nstage 2/2\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_keeps_the_last_line_of_each_stage():
    pytest.importorskip("rich")
    out = Terminal()
    with shown_progress(out) as show:
        show("first stage 1/2 [not markup]")
        show("first stage 2/2 [not markup]")
        show("second stage 1/1")
        time.sleep(0.01)
    text = out.getvalue()
    assert "first stage 2/2 [not markup]\n" in text
    assert "second stage 1/1\n" in text


def test_a_terminal_without_rich_gets_plain_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda _: None)
    out = Terminal()
    with shown_progress(out) as show:
        show("stage 1/1")
    assert out.getvalue() == "stage 1/1\n"
