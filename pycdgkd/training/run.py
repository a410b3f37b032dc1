"""One run from cache to results: its folder, its checks, training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pycdgkd.data.cache import Cache
from pycdgkd.data.splits import Split, draw_split
from pycdgkd.errors import InputError
from pycdgkd.files import write_atomically, write_text

from .chain import NO_PART_OF_IDENTITY, Chain
from .config import TrainConfig, config_differences, load_config, to_toml
from .environment import Progress, loss_device, reproducible, resolve_device
from .recordings import Recordings, require_all_classes
from .results import collect, read_results, recompute, write_results

CONFIG = "config.toml"
SPLIT = "split.json"


def train(
    cache: Path,
    out: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: Progress = None,
) -> dict[str, Any]:
    """Train teacher, assistants, student and control on a prepared cache; returns results.json.

    out: a new or empty folder, or with ``resume`` that of an interrupted run of the same
    configuration and cache; its result has the bits of an uninterrupted run. Ctrl-C
    (KeyboardInterrupt) leaves every finished epoch on disk.
    Raises ``InputError`` for a folder, cache or configuration that does not fit.
    """
    out = Path(out)
    say = progress or _silent
    device = resolve_device(config.device)
    data = Recordings.open(Cache.open(cache), config, device)
    split = split_of(data, config)
    split.check(data.cache.samples)
    chain = Chain(config, out, data, split, progress)
    counts = data.counts(split)
    require_all_classes(counts, data, config.label)
    _claim_folder(out, config, split, resume)
    finished = read_results(out)
    if finished is not None:
        _check_results(out, finished, split, data.cache)
        say(f"{out} is already finished; remedy for another run: another folder")
        return finished
    for part, count in counts.items():
        sizes = zip(data.classes, count["classes"], strict=True)
        say(
            f"{part}: {count['samples']} samples of {count['trials']} trials, "
            f"{config.label} {' '.join(f'{name} {size}' for name, size in sizes)}"
        )
    if loss_device(device) != device:
        say(f"networks on {device}, losses on the CPU: this build has no kernels for {device.type}")
    try:
        with reproducible(config, device):
            results = collect(chain, chain.train())
    except KeyboardInterrupt:
        say(f"interrupted: every finished epoch is kept in {out}")
        raise
    write_results(out, results)
    return results


def split_of(data: Recordings, config: TrainConfig) -> Split:
    """The split that a configuration asks for."""
    split = config.split
    return draw_split(
        data.cache.samples,
        kind=split.kind,
        seed=split.seed,
        fractions=split.fractions,
        folds=split.folds,
        fold=split.fold,
        labels=data.labels,
    )


def evaluate(run: Path, *, cache: Path | None = None) -> dict[str, Any]:
    """Compute the test figures of a finished run again from its saved weights.

    cache: where the run's cache lies now, if it was moved. Returns the content of results.json with
    the new test figures, and "differences": a line for every figure that is not what results.json
    says (none on the machine that trained). Raises ``InputError`` when run, cache and split do not
    belong together.
    """
    run = Path(run)
    stored = read_results(run)
    if stored is None:
        raise InputError(
            f"{run} holds no finished run: results.json is not there; "
            "remedy: pycdgkd train with --resume, or check the path"
        )
    config = load_config(run / CONFIG)
    device = resolve_device(config.device)
    opened = Cache.open(Path(stored["cache"]) if cache is None else cache)
    split = Split.load(run / SPLIT)
    _check_results(run, stored, split, opened)
    split.check(opened.samples)
    data = Recordings.open(opened, config, device)
    with reproducible(config, device):
        return recompute(Chain(config, run, data, split), stored)


def _claim_folder(out: Path, config: TrainConfig, split: Split, resume: bool) -> None:
    """Make ``out`` this run's folder, or check that it is already."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; expected a folder for the run; remedy: another --out")
    used = out.is_dir() and any(out.iterdir())
    if used and not resume:
        raise InputError(
            f"{out} is not empty; expected a new folder for the run; "
            "remedy: another --out, or --resume to continue the run in it"
        )
    if used and not (out / CONFIG).is_file():
        raise InputError(f"{out} holds no run to resume: it has no {CONFIG}; remedy: another --out")
    if used:
        _check_same_run(out, config, split)
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / SPLIT, split.save)
    write_text(out / CONFIG, to_toml(config))


def _check_same_run(out: Path, config: TrainConfig, split: Split) -> None:
    changed = [
        line
        for line in config_differences(config, load_config(out / CONFIG))
        if line.split(":")[0] not in NO_PART_OF_IDENTITY
    ]
    if changed:
        raise InputError(
            f"{out} was started with another configuration ({'; '.join(changed)}); remedy: "
            f"resume with --config {out / CONFIG}, or train into a new folder"
        )
    stored = Split.load(out / SPLIT)
    if stored.hash != split.hash:
        raise InputError(
            f"{out} was started with another split (hash {stored.hash[:12]}); expected that of "
            f"this cache and seed ({split.hash[:12]}); remedy: give the run's own cache, or train "
            "into a new folder"
        )


def _check_results(out: Path, results: dict[str, Any], split: Split, cache: Cache) -> None:
    for name, found in (("split", split.hash), ("cache", cache.hash)):
        expected = str(results.get(f"{name}_hash"))
        if found != expected:
            raise InputError(
                f"{out} was trained with another {name} (hash {expected[:12]}); got "
                f"{found[:12]}; remedy: give the cache that the run was trained on"
            )


def _silent(_: str) -> None:
    """No progress was asked for."""
