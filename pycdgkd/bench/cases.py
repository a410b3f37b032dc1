"""What is timed: named cases and the least work that each needs (standard library only).

Letters: N rows, D width, K classes, S sources, M modalities. A case's name states its sizes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass
from typing import Any, Literal

from pycdgkd.errors import InputError

OPS = (
    "class_prototypes",
    "prototype_loss",
    "convergence_rates",
    "teacher_loss",
    "multi_source_kl",
    "distillation_loss",
)
KL_OPS = ("multi_source_kl", "distillation_loss")
MIB = 2**20
CACHE_BYTES = 2 * MIB  # features of a batch up to this size are read from memory once
OVERHEAD_BYTES = 2 * MIB  # up to this a call is dispatch, autograd and allocation
MANY_CLASSES = 64  # from here on the matrix products of the prototype losses cost more than bytes

Bound = Literal["overhead", "bytes", "exps", "flops"]


@dataclass(frozen=True)
class Case:
    """One shape of one op, and the least that any implementation of it must do."""

    op: str
    rows: int
    classes: int
    width: int = 0
    modalities: int = 1
    sources: int = 0
    inactive: int = 0  # how many of the sources have weight 0
    direction: str = "reverse"
    dtype: str = "float32"
    layout: str = "contiguous"  # "strided": rows of a wider matrix; "unaligned": off by one value
    neighbour: Case | None = None  # the aligned case whose cost an equal share of work should have
    compiled: tuple[str, ...] = ()  # peers that are also timed under torch.compile
    skipped: tuple[str, ...] = ()  # peers that would take seconds a call
    quick: bool = False

    @property
    def name(self) -> str:
        """``op/sizes``, with what is unusual at the end."""
        sizes = [f"N{self.rows}"]
        if self.op not in KL_OPS:
            sizes.append(f"D{self.width}")
        sizes.append(f"K{self.classes}")
        if self.sources:
            sizes.append(f"S{self.sources}")
        if self.modalities > 2:
            sizes.append(f"M{self.modalities}")
        if self.inactive:
            sizes.append(f"{self.inactive}off")
        unusual = (self.direction, self.dtype, self.layout)
        usual = ("reverse", "float32", "contiguous")
        sizes += [word for word, plain in zip(unusual, usual, strict=True) if word != plain]
        return f"{self.op}/{'-'.join(sizes)}"

    @property
    def item_bytes(self) -> int:
        """Bytes of one value."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def elements(self) -> int:
        """Values of the largest input: one modality's features, or one model's logits."""
        return self.rows * (self.classes if self.op in KL_OPS else self.width)

    @property
    def active(self) -> int:
        """Sources of weight above 0."""
        return self.sources - self.inactive

    @property
    def words(self) -> int:
        """Words a value of one modality (or of the logits) that must move, both ways together."""
        if self.op in KL_OPS:
            return self.active + 2  # student and sources read, gradient written
        if self.op == "convergence_rates":
            return 1
        again = self.op == "teacher_loss" and self.input_bytes > CACHE_BYTES  # batch means
        return 3 if again else 2

    @property
    def bytes(self) -> int:
        """The least bytes to and from memory, forward and backward."""
        return self.words * self.elements * self.modalities * self.item_bytes

    @property
    def input_bytes(self) -> int:
        """Bytes of all large inputs."""
        copies = 1 + self.sources if self.op in KL_OPS else self.modalities
        return copies * self.elements * self.item_bytes

    @property
    def exps(self) -> int:
        """Exponentials of the KL losses: one a distribution, one more for the cross-entropy."""
        if self.op not in KL_OPS:
            return 0
        return (self.active + 1 + (self.op == "distillation_loss")) * self.elements

    @property
    def bound(self) -> Bound:
        """What limits the best implementation on a CPU."""
        if self.bytes <= OVERHEAD_BYTES:
            return "overhead"
        if self.op in KL_OPS:
            return "exps"
        matrix = self.op != "class_prototypes" and self.classes >= MANY_CLASSES
        return "flops" if matrix else "bytes"

    def shrunk(self) -> Case:
        """The same case with a few rows, columns and classes: for tests and for warming up."""
        return dataclasses.replace(
            self,
            rows=min(self.rows, 24),
            width=min(self.width, 40),
            classes=min(self.classes, 12),
            neighbour=None,
            compiled=(),
        )


def _aligned(case: Case, **sizes: Any) -> Case:
    return dataclasses.replace(case, layout="contiguous", neighbour=None, compiled=(), **sizes)


def _beside(case: Case, **sizes: Any) -> Case:
    """The case with its aligned neighbour of about the same size."""
    return dataclasses.replace(case, neighbour=_aligned(case, **sizes), compiled=())


def _teacher(rows: int, width: int, classes: int, **settings: Any) -> Case:
    settings = {"modalities": 2, **settings}
    return Case("teacher_loss", rows, classes, width, **settings)


def _prototype(rows: int, width: int, classes: int, **settings: Any) -> Case:
    return Case("prototype_loss", rows, classes, width, **settings)


def _distillation(rows: int, classes: int, sources: int = 3, **settings: Any) -> Case:
    return Case("distillation_loss", rows, classes, sources=sources, **settings)


def _teacher_cases() -> list[Case]:
    middle = _teacher(1024, 1024, 2)
    return [
        _teacher(128, 512, 2, compiled=("T4",), quick=True),
        _teacher(128, 768, 2),
        _teacher(128, 512, 2, modalities=4),
        _beside(_teacher(33, 511, 5), rows=32, width=512),
        _beside(_teacher(1000, 511, 5), rows=1024, width=512),
        middle,
        _beside(dataclasses.replace(middle, layout="strided")),
        _beside(dataclasses.replace(middle, layout="unaligned")),
        _teacher(4096, 1024, 2, quick=True),
        _teacher(4096, 1024, 2, dtype="bfloat16"),
        _teacher(16384, 1024, 2, compiled=("T4",)),
        _teacher(65536, 1024, 2, skipped=("T1", "T2")),
    ]


def _prototype_cases() -> list[Case]:
    wide = _prototype(16384, 1024, 2, quick=True)
    return [
        Case("class_prototypes", 16384, 2, 1024),
        Case("class_prototypes", 4096, 100, 1024),
        Case("convergence_rates", 16384, 2, 1024, modalities=2),
        _prototype(128, 512, 2, quick=True),
        _beside(_prototype(1000, 511, 33), rows=1024, width=512, classes=32),
        wide,
        _beside(dataclasses.replace(wide, layout="strided", quick=False)),
        _beside(dataclasses.replace(wide, layout="unaligned", quick=False)),
        _prototype(16384, 1024, 10, skipped=("literal",)),
        _prototype(65536, 1024, 2, skipped=("literal",)),
        *(_prototype(4096, 512, classes) for classes in (2, 10, 32)),
        *(_prototype(4096, 512, classes, skipped=("literal",)) for classes in (100, 1000)),
        _prototype(1024, 512, 32768, skipped=("literal", "cdist")),
    ]


def _kl_cases() -> list[Case]:
    many = _distillation(4096, 1000, compiled=("D1", "D3"), quick=True)
    return [
        Case("multi_source_kl", 4096, 1000, sources=3),
        _distillation(128, 2, compiled=("D1",), quick=True),
        _beside(_distillation(1000, 33), rows=1024, classes=32),
        _distillation(4096, 2),
        _distillation(4096, 7),
        _distillation(65536, 2),
        _distillation(65536, 7, compiled=("D1",), quick=True),
        _distillation(65536, 7, dtype="bfloat16"),
        _distillation(4096, 32),
        _distillation(4096, 100),
        many,
        _distillation(4096, 1000, direction="forward"),
        _distillation(4096, 1000, dtype="bfloat16"),
        _beside(dataclasses.replace(many, layout="strided", quick=False)),
        _beside(dataclasses.replace(many, layout="unaligned", quick=False)),
        *(_half_inactive(rows, classes) for rows, classes in ((65536, 7), (4096, 1000))),
        _distillation(128, 32000),
        _distillation(256, 32000),
        _distillation(32, 262144),
    ]


def _half_inactive(rows: int, classes: int) -> Case:
    four = _distillation(rows, classes, 4)
    return _distillation(rows, classes, 8, inactive=4, neighbour=four)


CASES: tuple[Case, ...] = (*_teacher_cases(), *_prototype_cases(), *_kl_cases())


def select(pattern: str | None = None, op: str | None = None, *, quick: bool = False) -> list[Case]:
    """The cases whose name matches the pattern, of one op; ``InputError`` if there is none."""
    if op is not None and op not in OPS:
        raise InputError(f"unknown op '{op}'; expected one of {', '.join(OPS)}")
    chosen = [
        case
        for case in CASES
        if (op is None or case.op == op)
        and (pattern is None or fnmatch.fnmatchcase(case.name, pattern))
        and (case.quick or not quick or pattern is not None)
    ]
    if not chosen:
        asked = f"'{pattern}'" if op is None else f"'{pattern or '*'}' of op '{op}'"
        raise InputError(
            f"no case matches {asked}; expected a shell pattern such as 'teacher_loss/N128*' or "
            "'*-S8-*'; pycdgkd bench --list prints every name"
        )
    return chosen
