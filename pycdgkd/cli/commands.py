"""What each command does. Heavy modules are imported inside, after the cheap checks have passed."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pycdgkd.data.kinds import is_folded
from pycdgkd.errors import InputError

from .progress import shown_progress

if TYPE_CHECKING:
    from pycdgkd.data.config import PrepareConfig
    from pycdgkd.report.results import Results
    from pycdgkd.training.config import TrainConfig

HOLDS = {
    "deap": "data_original/ (or data_preprocessed_python/), face_video/ and metadata_csv/",
    "mahnob": "Sessions/",
    "folder": "trials.csv",
}


def prepare(arguments: argparse.Namespace) -> int:
    """Recordings -> cache of samples; bad recordings are named and skipped."""
    config = prepare_config(arguments)
    shard = parse_shard(arguments.shard)
    from pycdgkd.data.pipeline import prepare as prepare_cache

    with shown_progress() as progress:
        report = prepare_cache(
            arguments.root,
            arguments.cache,
            config,
            dataset=arguments.layout,
            jobs=arguments.jobs,
            shard=shard,
            strict=arguments.strict,
            progress=progress,
        )
    for subject, trial, reason in report.skipped:
        where = f"subject {subject}" if trial is None else f"subject {subject} trial {trial}"
        print(f"skipped  {where}: {reason}")
    rates = ", ".join(f"s{s:02d} {rate:.1%}" for s, rate in report.face_miss_rates.items() if rate)
    resumed = f" ({report.resumed_trials} done before)" if report.resumed_trials else ""
    print(
        f"prepared {report.samples} samples of {report.trials} trials{resumed}, "
        f"skipped {len(report.skipped)}, frames without a face {report.face_miss_rate:.1%}"
        + (f" ({rates})" if rates else "")
    )
    spent = [f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items()]
    if spent:
        print(f"time     {', '.join(spent)}")
    if report.finished:
        print(f"next     pycdgkd train {arguments.cache} --out runs/NAME")
    else:
        print("next     the other shards, then the same command without --shard to join them")
    return 0


def prepare_config(arguments: argparse.Namespace) -> PrepareConfig:
    """The options of `prepare` and `check-data` over the defaults of their dataset."""
    from pycdgkd.data.config import DATASETS, PrepareConfig

    if arguments.layout not in DATASETS:
        raise InputError(
            f"unknown layout '{arguments.layout}'; expected one of {', '.join(DATASETS)}, "
            "as in: pycdgkd prepare deap ROOT CACHE"
        )
    names = [field.name for field in dataclasses.fields(PrepareConfig)]
    given = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    config = PrepareConfig.of(arguments.layout, **given)
    if not arguments.root.is_dir():
        raise InputError(
            f"no recordings at {arguments.root}: no such folder; expected the folder that holds "
            f"{HOLDS[arguments.layout]}; check the path"
        )
    return config


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8)."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise InputError(f"--shard must be i/n with i from 1 to n, as in 2/8; got '{text}'")
    return int(index), int(count)


def check_data(arguments: argparse.Namespace) -> int:
    """What a dataset's folder holds; exit status 1 if something of it would be skipped."""
    config = prepare_config(arguments)
    from pycdgkd.data.check import check_dataset

    found = check_dataset(arguments.root, config, arguments.layout)
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found.text())
    return 1 if found.skipped else 0


def inspect(arguments: argparse.Namespace) -> int:
    """Write a page that shows what a cache holds."""
    check_cache(arguments.cache)
    from pycdgkd.report.inspection import write_inspection

    print(f"page     {write_inspection(arguments.cache, arguments.out)}")
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Cache -> teacher, assistants, student, control, results and report."""
    from pycdgkd.training.config import load_config

    config_file = arguments.config
    stored = arguments.out / "config.toml"
    if arguments.resume and config_file is None and stored.is_file():
        config_file = stored
    flags = [
        f"{name}={getattr(arguments, name)}"
        for name in ("label", "seed", "device")
        if getattr(arguments, name) is not None
    ]
    flags += split_flags(arguments.split)
    if arguments.guidance is not None:
        flags.append(f"distill.guidance={arguments.guidance}")
    config = load_config(config_file, [*flags, *arguments.overrides], arguments.preset)
    check_cache(arguments.cache)
    if arguments.split is not None and is_folded(config.split.kind):
        return _train_folds(arguments, config)
    if arguments.folds is not None:
        raise InputError("--folds needs a --split of several folds, as in --split loso")
    from pycdgkd.report import write_report
    from pycdgkd.report.results import load_results
    from pycdgkd.training.run import train as train_chain

    with shown_progress() as progress:
        train_chain(
            arguments.cache,
            arguments.out,
            config,
            resume=arguments.resume,
            progress=progress,
        )
    show_results(load_results(arguments.out))
    print(f"report   {write_report(arguments.out)}")
    print(f"student  {arguments.out / 'student'}")
    return 0


def split_flags(split: str | None) -> list[str]:
    """Overrides for "--split subject-kfold:5"."""
    if split is None:
        return []
    kind, _, folds = split.partition(":")
    if folds and not kind.endswith("-kfold"):
        raise InputError(f"--split {kind} takes no number of folds; got '{split}'")
    return [f"split.kind={kind}", *([f"split.folds={folds}"] if folds else [])]


def _train_folds(arguments: argparse.Namespace, config: TrainConfig) -> int:
    """One run a fold, and what they say together."""
    from pycdgkd.report.folds import folds_table, write_folds_report
    from pycdgkd.training.folds import train_folds

    chosen = None
    if arguments.folds is not None:
        parts = arguments.folds.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise InputError(f"--folds must be numbers as in 1,3; got '{arguments.folds}'")
        chosen = [int(part) for part in parts]
    with shown_progress() as progress:
        summary = train_folds(
            arguments.cache,
            arguments.out,
            config,
            folds=chosen,
            resume=arguments.resume,
            progress=progress,
        )
    print(folds_table(summary))
    print(f"report   {write_folds_report(arguments.out, summary)}")
    return 0


def check_cache(cache: Path) -> None:
    """Raise ``InputError`` unless ``cache`` is a finished cache; a wrong path costs no import."""
    if not cache.is_dir():
        raise InputError(
            f"no cache at {cache}: no such folder; "
            "remedy: pycdgkd prepare deap ROOT CACHE, or check the path"
        )
    from pycdgkd.data.cache import Cache

    Cache.open(cache)


def show_results(results: Results) -> None:
    """Print the table of a run, and what its numbers do not say."""
    from pycdgkd.report.table import SYNTHETIC_NOTE, results_table

    print(results_table(results))
    for warning in results.warnings:
        print(f"warning  {warning}")
    if results.synthetic:
        print(SYNTHETIC_NOTE)


def evaluate(arguments: argparse.Namespace) -> int:
    """Recompute a run's test figures; exit status 1 if results.json says something else."""
    from pycdgkd.report.results import load_results, parse_results

    load_results(arguments.run)  # an unfinished or damaged run is told before torch is imported
    if arguments.cache is not None:
        check_cache(arguments.cache)
    from pycdgkd.training.run import evaluate as evaluate_run

    fresh = evaluate_run(arguments.run, cache=arguments.cache)
    show_results(parse_results(fresh))
    for line in fresh["differences"]:
        print(f"differs  {line}")
    if fresh["differences"]:
        print("the figures recomputed from the saved weights are not those of results.json")
        return 1
    print("the figures recomputed from the saved weights are those of results.json")
    return 0


def predict(arguments: argparse.Namespace) -> int:
    """Student + video -> emotion over time as a CSV file and a picture."""
    from pycdgkd.predict import check_inputs, predict_clip, write_picture, write_table

    check_inputs(arguments.network, arguments.clip)
    stem = arguments.out or Path(f"{arguments.clip.stem}_emotion")
    with shown_progress() as progress:
        prediction = predict_clip(
            arguments.network, arguments.clip, fps=arguments.fps, progress=progress
        )
    table, picture = stem.with_name(stem.name + ".csv"), stem.with_name(stem.name + ".png")
    table.parent.mkdir(parents=True, exist_ok=True)
    write_table(prediction, table)
    write_picture(prediction, picture)
    print(prediction.summary())
    print(f"table    {table}")
    print(f"picture  {picture}")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write report.html of a finished run again."""
    from pycdgkd.report import write_report

    print(f"report   {write_report(arguments.run)}")
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Time the losses beside their peers; tables, and with --out files."""
    from pycdgkd.bench.cases import select
    from pycdgkd.bench.report import check_options, show_case, write_run

    cases = select(arguments.case, arguments.op, quick=arguments.quick)
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    check_options(arguments.threads, arguments.seconds, arguments.out)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    from pycdgkd.bench import run
    from pycdgkd.bench.table import report

    result = run.run(
        cases,
        threads=arguments.threads,
        seconds=arguments.seconds or (run.QUICK_SECONDS if arguments.quick else run.SECONDS),
        compiled=not arguments.quick,
        peaks=not arguments.quick,
        progress=show_case(len(cases)),
    )
    print(f"\n{report(result)}")
    if arguments.out is not None:
        for path in write_run(result, arguments.out):
            print(f"written  {path}")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Check the installation; exit status 0 if the core works, 1 otherwise."""
    from pycdgkd.doctor import examine

    del arguments
    lines, healthy = examine()
    print("\n".join(lines))
    return 0 if healthy else 1
