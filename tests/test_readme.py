"""What the README shows works as it is shown."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pycdgkd.cli.parser import parse_arguments

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = README.split("```")[1::2]
    return [text.partition("\n")[2] for text in fenced if text.partition("\n")[0] == language]


def test_the_snippet_runs() -> None:
    (snippet,) = blocks("python")
    names = {
        "logits": torch.randn(8, 2, requires_grad=True),
        "z_video": torch.randn(8, 16, requires_grad=True),
        "z_eeg": torch.randn(8, 12, requires_grad=True),
        "labels": torch.arange(8) % 2,
        "sources": [torch.randn(8, 2) for _ in range(3)],
    }
    exec(snippet, names)
    assert all(names[name].grad is not None for name in ("logits", "z_video", "z_eeg"))
    assert names["loss"].requires_grad


def test_the_commands_are_understood() -> None:
    commands = re.findall(r"^pycdgkd (.*?)(?: +#.*)?$", "".join(blocks("")), re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        parse_arguments(command.split())
