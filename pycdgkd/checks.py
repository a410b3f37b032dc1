"""Checks of options, with one form of message: function, argument, expected, got."""

from __future__ import annotations

from collections.abc import Iterable


def check(op: str, name: str, value: object, fine: bool, expected: str) -> None:
    """Raise ``ValueError`` unless ``fine``."""
    if not fine:
        raise ValueError(f"pycdgkd.{op}: {name}: expected {expected}, got {value!r}")


def check_choice(op: str, name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"pycdgkd.{op}: {name}: expected one of {listed}, got {value!r}")
