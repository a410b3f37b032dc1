"""The command ``experiment``: the paper's tables run again, and the controlled study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pycdgkd.data.kinds import KINDS
from pycdgkd.errors import InputError

from .commands import check_cache, parse_shard, split_flags
from .progress import shown_progress

if TYPE_CHECKING:
    from pycdgkd.experiments.runs import Plan

    from .parser import Parser

TABLES = ("table1", "table2", "table3", "table4", "table5")
CONTROLLED = "controlled"


def add_arguments(parser: Parser) -> None:
    """Options of the command."""
    parser.add_argument(
        "what",
        metavar="WHAT",
        help=f"{', '.join(TABLES)}, 'all' of them, or '{CONTROLLED}': a study whose truth is known",
    )
    parser.add_argument(
        "cache", metavar="CACHE", type=Path, nargs="?", help="folder made by prepare; for tables"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the runs")
    parser.add_argument(
        "--seeds", metavar="N", default="10", help="seeds 0 to N-1, or a list as in 0,3,5"
    )
    parser.add_argument(
        "--labels", metavar="A,B", default="valence,arousal", help="label columns of the cache"
    )
    parser.add_argument("--methods", metavar="A,B", help="only these; 'list' names them all")
    parser.add_argument("--preset", metavar="NAME", help="paper or nano")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file as of train")
    parser.add_argument("--split", metavar="KIND", help=f"{', '.join(KINDS)}; as of train")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="one key of the configuration that all methods share, as of train",
    )
    parser.add_argument(
        "--setting",
        metavar="METHOD.KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="one setting of one method, as in kd.distill.temperature=4; may be repeated",
    )
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="processes")
    parser.add_argument(
        "--shard",
        metavar="i/n",
        default="1/1",
        help="run every n-th label, seed and fold from the i-th on into the same DIR; the command "
        "without it runs what is left and writes the page",
    )
    parser.add_argument(
        "--size", choices=("full", "quick"), default="full", help=f"of '{CONTROLLED}'"
    )


def experiment(arguments: argparse.Namespace) -> int:
    """Run what is not finished, then write the pages."""
    if arguments.jobs < 1:
        raise InputError(f"--jobs must be at least 1; got {arguments.jobs}")
    if arguments.methods == "list":
        return _list_methods()
    if arguments.what == CONTROLLED:
        return _controlled(arguments)
    names = TABLES if arguments.what == "all" else (arguments.what,)
    if not set(names) <= set(TABLES):
        raise InputError(
            f"unknown experiment '{arguments.what}'; expected one of {', '.join(TABLES)}, all, "
            f"{CONTROLLED}"
        )
    if arguments.cache is None:
        raise InputError(
            f"{arguments.what} needs a cache; expected: experiment WHAT CACHE --out DIR"
        )
    shard = parse_shard(arguments.shard)
    plan = _plan(arguments, names)
    from pycdgkd.experiments.runs import run_all

    with shown_progress() as progress:
        run_all(plan, jobs=arguments.jobs, shard=shard, progress=progress)
    if shard[1] > 1:
        print("next     the other shards, then the same command without --shard for the page")
        return 0
    _show(plan, names)
    return 0


def _list_methods() -> int:
    from pycdgkd.experiments.catalogue import METHODS

    for method in METHODS.values():
        print(f"{method.name:18} {method.title}")
    return 0


def _controlled(arguments: argparse.Namespace) -> int:
    from pycdgkd.experiments.controlled import run_controlled

    with shown_progress() as progress:
        page = run_controlled(arguments.out, arguments.size, arguments.jobs, progress)
    print(f"page     {page}")
    return 0


def _plan(arguments: argparse.Namespace, names: tuple[str, ...]) -> Plan:
    from pycdgkd.training.config import load_config

    config = load_config(
        arguments.config,
        [
            *([f"device={arguments.device}"] if arguments.device is not None else []),
            *split_flags(arguments.split),
            *arguments.overrides,
        ],
        arguments.preset,
    )
    check_cache(arguments.cache)
    from pycdgkd.experiments.catalogue import TABLES as CATALOGUE
    from pycdgkd.experiments.runs import Plan
    from pycdgkd.experiments.settings import chosen_methods

    rows = dict.fromkeys(row for name in names for row in CATALOGUE[name].rows)
    wanted = list(rows) if arguments.methods is None else _list(arguments.methods)
    return Plan(
        cache=arguments.cache,
        out=arguments.out,
        config=config,
        labels=tuple(_list(arguments.labels)),
        seeds=_seeds(arguments.seeds),
        methods=chosen_methods(wanted, arguments.settings),
    )


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str) -> tuple[int, ...]:
    parts = _list(text)
    if not parts or not all(part.isdecimal() for part in parts) or parts == ["0"]:
        raise InputError(f"--seeds must be a number or a list as in 0,3,5; got '{text}'")
    return tuple(range(int(text))) if len(parts) == 1 else tuple(int(part) for part in parts)


def _show(plan: Plan, names: tuple[str, ...]) -> None:
    from pycdgkd.data.cache import Cache
    from pycdgkd.experiments.catalogue import TABLES as CATALOGUE
    from pycdgkd.experiments.page import text_table, write_csv, write_page
    from pycdgkd.experiments.summary import summarise, write_runs

    synthetic = Cache.open(plan.cache).synthetic
    running = {method.name for method in plan.methods}
    for name in names:
        table = CATALOGUE[name]
        if not running & set(table.rows):
            continue
        summary = {label: summarise(plan, table, label) for label in plan.labels}
        for label, rows in summary.items():
            print(text_table(table, label, rows))
        print(f"\ntable    {write_csv(plan.out / f'{name}.csv', summary)}")
        print(f"page     {write_page(plan.out / f'{name}.html', plan, table, summary, synthetic)}")
    print(f"runs     {write_runs(plan, plan.out / 'runs.csv')}")
