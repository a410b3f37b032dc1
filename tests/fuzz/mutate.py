"""Seeded damage to files: what disks, networks and people do to them."""

from __future__ import annotations

import random
import re

HEAD = 4096  # bytes where formats keep what they promise
EXTREMES = (b"-1", b"0", b"4294967296", b"99999999999999999999", b"1e308", b"nan", b"", b"\xff")


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four kinds of damage, half of them within the head."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _damage(data, rng)
    return bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    return rng.randrange(max(1, min(len(data), HEAD) if rng.random() < 0.5 else len(data)))


def _damage(data: bytearray, rng: random.Random) -> None:
    kind = rng.randrange(8)
    at, size = _place(data, rng), rng.choice((1, 2, 4, 16, 200))
    if kind == 0 and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + size] = bytes(rng.choice((0, 255, rng.randrange(256))) for _ in range(size))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + size]
    elif kind == 4:
        data[at:at] = data[at : at + size]
    elif kind == 5:
        data[at:at] = rng.randbytes(size)
    elif kind == 6:
        _number(data, rng)
    else:
        other = _place(data, rng)
        data[at : at + size], data[other : other + size] = (
            data[other : other + size],
            data[at : at + size],
        )


def _number(data: bytearray, rng: random.Random) -> None:
    """Put an extreme in a number's place."""
    numbers = list(re.finditer(rb"\d+", bytes(data[: 4 * HEAD])))
    if numbers:
        found = rng.choice(numbers)
        extreme = rng.choice(EXTREMES)
        if rng.random() < 0.5:  # headers of fixed width stay in step
            extreme = extreme[: len(found[0])].ljust(len(found[0]))
        data[found.start() : found.end()] = extreme
