"""How far a preparation has come, in one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

STAGES = {"decode": "video", "detect": "faces", "eeg": "EEG", "write": "disk"}


def add_seconds(to: dict[str, float], more: Mapping[str, float]) -> None:
    """Add ``more`` to the seconds of each stage."""
    for stage, seconds in more.items():
        to[stage] = to.get(stage, 0.0) + seconds


class Meter:
    """Counts trials and the seconds of each stage, and says so after each trial."""

    def __init__(
        self, title: str, total: int, done: int, say: Callable[[str], None] | None
    ) -> None:
        self.title, self.total, self.before, self.say = title, total, done, say
        self.began = time.monotonic()
        self.finished = 0
        self.seconds: dict[str, float] = {}

    def tell(self, what: str, trials: int, seconds: Mapping[str, float]) -> None:
        """``trials`` more are done, which took so many ``seconds`` by stage."""
        self.finished += trials
        add_seconds(self.seconds, seconds)
        if self.say is None:
            return
        done = self.before + self.finished
        left = (time.monotonic() - self.began) / max(self.finished, 1) * (self.total - done)
        self.say(
            f"{self.title}: {what}, {done}/{self.total} trials, {left:.0f} s left{self._speeds()}"
        )

    def _speeds(self) -> str:
        """Mean seconds of a trial by stage."""
        spent = [
            f"{STAGES[stage]} {self.seconds[stage] / self.finished:.1f}"
            for stage in STAGES
            if self.seconds.get(stage, 0.0) > 0
        ]
        return f" (s a trial: {', '.join(spent)})" if spent and self.finished else ""
