"""The methods, and the paper's tables that they stand in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pycdgkd.errors import InputError

from .method import Method
from .methods import (
    ambokd,
    cnn_lstm,
    cnn_svm,
    dgc_jca,
    distilled,
    emotionkd,
    fitnets,
    multimodal,
    nst,
    ogm_ge,
    pmr,
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        multimodal.VIDEO, multimodal.EEG, multimodal.FUSION, multimodal.REBALANCED,
        cnn_svm.METHOD, cnn_lstm.METHOD, emotionkd.TEACHER, dgc_jca.METHOD, pmr.METHOD,
        ogm_ge.METHOD, distilled.ALONE, distilled.KD, fitnets.METHOD, nst.METHOD, distilled.TAKD,
        emotionkd.STUDENT, ambokd.METHOD, distilled.DGKD, distilled.CDGKD_ALL, distilled.CDGKD,
        distilled.CDGKD_NOISY,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """One table of the paper.

    rows: names of methods. interest: the one that all others are compared to. printed: accuracy in
    per cent that the paper prints, by (method, dataset, label), as far as it is known here.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    interest: str
    printed: Mapping[tuple[str, str, str], float] = field(default_factory=dict)


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "table1",
            "One modality and two",
            ("video", "eeg", "fusion", "rebalanced"),
            "rebalanced",
            {("rebalanced", "deap", "valence"): 69.75, ("rebalanced", "mahnob", "valence"): 69.75},
        ),
        Table(
            "table2",
            "Students: face video alone in use",
            ("none", "kd", "fitnets", "nst", "takd", "emotionkd", "ambokd", "dgkd", "cdgkd"),
            "cdgkd",
            {
                ("takd", "deap", "arousal"): 64.42,
                ("takd", "deap", "valence"): 64.50,
                ("emotionkd", "deap", "arousal"): 62.71,
                ("emotionkd", "deap", "valence"): 63.36,
            },
        ),
        Table(
            "table3",
            "Multimodal networks",
            ("cnn-svm", "cnn-lstm", "emotionkd-teacher", "dgc-jca", "pmr", "ogm-ge", "rebalanced"),
            "rebalanced",
            {
                ("emotionkd-teacher", "deap", "arousal"): 62.88,
                ("emotionkd-teacher", "deap", "valence"): 66.61,
                ("emotionkd-teacher", "mahnob", "arousal"): 60.66,
                ("emotionkd-teacher", "mahnob", "valence"): 64.72,
            },
        ),
        Table(
            "table4",
            "The teacher without and with rebalancing, and other ways to rebalance",
            ("fusion", "rebalanced", "pmr", "ogm-ge"),
            "rebalanced",
        ),
        Table(
            "table5",
            "The student without distillation, without and with stochastic sources",
            ("none", "cdgkd-all", "cdgkd"),
            "cdgkd",
            {
                ("cdgkd-all", "deap", "arousal"): 64.42,
                ("cdgkd-all", "deap", "valence"): 64.50,
            },
        ),
    )
}

DOUBTS = (
    "The printed values are those of the paper as far as they are known here; a dash is no value "
    "of it. On DEAP most of them are multiples of 1/1290: one fixed test split of 86 trials, whose "
    "standard error is about 5 points (MAHNOB-HCI: 48 trials, 7 points), so that differences of a "
    "few points are noise. The values of EmotionKD's teacher are, digit by digit, those that its "
    "own authors published for EEG with GSR; those of TAKD equal the paper's variant 4; the "
    "teacher's valence is the same on both datasets. They are not comparable with a run on another "
    "split, and no run here is promised to meet them."
)


def shown_in(table: Table, methods: Iterable[Method]) -> list[str]:
    """Which of these methods a table shows: its own rows, then those that stand in no table."""
    names = {method.name for method in methods}
    placed = {row for other in TABLES.values() for row in other.rows}
    return [
        *(row for row in table.rows if row in names),
        *(name for name in METHODS if name in names - placed),
    ]


def find_method(name: str) -> Method:
    """The method of that name; ``InputError`` names the nearest."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown method '{name}'; nearest of {', '.join(METHODS)}: '{near}'")
    return METHODS[name]
