"""Words for a paired difference, computed from its interval and its corrected p."""

from __future__ import annotations

from collections.abc import Mapping

from pycdgkd.experiments.statistics import Difference

LEVEL = 0.05
MARGIN = 0.01  # what "not lower" allows, in shares: one point

HOLDS, LEANS, NOTHING = "holds", "leans that way", "no difference seen"
LEANS_AWAY, OPPOSITE, OPEN = "leans the other way", "the opposite", "not settled"
HIGHER, LEANS_HIGHER, LOWER, LEANS_LOWER = "higher", "leans higher", "lower", "leans lower"
ORDER = (
    *(HOLDS, HIGHER, LEANS, LEANS_HIGHER, NOTHING, OPEN),
    *(LEANS_LOWER, LEANS_AWAY, LOWER, OPPOSITE),
)


def verdict(difference: Difference, p: float, expects: str) -> str:
    """What the difference says of what was expected of it.

    p: corrected for all tests of the claim. A side is taken only where the interval leaves out 0,
    and firmly only where p is below 0.05 as well; otherwise it "leans". For "not lower", interval
    and p are asked about minus one point (``allowance``) in place of 0.
    """
    zero, sure = -allowance(expects), p < LEVEL
    side = (difference.low > zero) - (difference.high < zero)
    if side == 0:
        return OPEN if expects == "not lower" else NOTHING
    if expects == "either":
        return ((HIGHER, LEANS_HIGHER) if side > 0 else (LOWER, LEANS_LOWER))[not sure]
    agrees = (side < 0) == (expects == "lower")
    return ((HOLDS, LEANS) if agrees else (OPPOSITE, LEANS_AWAY))[not sure]


def allowance(expects: str) -> float:
    """How far below 0 a difference may lie and still be what was expected."""
    return MARGIN if expects == "not lower" else 0.0


def tally(words: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Conditions by verdict, best first; words: verdict of each condition."""
    return [
        (word, [name for name, said in words.items() if said == word])
        for word in ORDER
        if word in words.values()
    ]
