"""How progress is shown: plain lines when piped, one live line on a terminal that has rich."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeAlias

Progress: TypeAlias = Callable[[str], None]

QUIET_SECONDS = 1.0  # between two plain lines of one stage


@contextmanager
def shown_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """A function that shows one line of progress on ``stream`` (default: standard output).

    On a terminal with rich installed the line is replaced in place, and the last line of each stage
    stays. Otherwise lines are written one below the other, at most one a second within a stage, and
    always the first and the last of a stage. A stage is what the words before the first number say.
    """
    out = sys.stdout if stream is None else stream
    if out.isatty() and importlib.util.find_spec("rich") is not None:
        with _live_line(out) as show:
            yield show
        return
    lines = _PlainLines(out)
    try:
        yield lines.show
    finally:
        lines.flush()


class _PlainLines:
    """Writes lines, holding back those that follow one another too quickly."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.stage = ""
        self.held = ""
        self.written = 0.0

    def show(self, line: str) -> None:
        now, stage = time.monotonic(), _stage(line)
        if stage != self.stage:
            self.flush()
        elif now - self.written < QUIET_SECONDS:
            self.held = line
            return
        self.stage, self.held, self.written = stage, "", now
        print(line, file=self.out, flush=True)

    def flush(self) -> None:
        if self.held:
            print(self.held, file=self.out, flush=True)
            self.held = ""


@contextmanager
def _live_line(out: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=out)
    last = ""
    with console.status("starting") as status:

        def show(line: str) -> None:
            nonlocal last
            if last and _stage(last) != _stage(line):
                console.print(Text(last))
            last = line
            status.update(Text(line, no_wrap=True, overflow="ellipsis"))

        try:
            yield show
        finally:
            if last:
                console.print(Text(last))


def _stage(line: str) -> str:
    words = line.split()
    return " ".join(words[: next((i for i, w in enumerate(words) if w[0].isdigit()), len(words))])
