"""From the recordings of any dataset to a cache: planning, sharing the work, joining the parts.

A dataset is a module with two functions: ``scan(root, config) -> Study`` says what is there,
``open_eeg(study, path, trials, config) -> ReadTrial`` opens one recording for some trials of a
subject.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pycdgkd.errors import InputError
from pycdgkd.processes import worker_pool

from .cache import MANIFEST
from .cache_plan import Plan, check_same, fingerprint, read_plan
from .cache_writer import open_writer, part_folder, read_journal, speaks_of, start_cache
from .config import DATASETS, PrepareConfig
from .eeg import channel_names
from .progress import Meter, add_seconds
from .study import Skip, Study
from .subject import SubjectJob, Tell, prepare_subject

Progress = Callable[[str], None] | None


@dataclass(frozen=True)
class PrepareReport:
    """What ``prepare`` did.

    samples, trials: how many the cache holds. skipped: (subject, trial or None for all of the
    subject, reason), also for single windows left out. resumed_trials: trials that an earlier,
    interrupted run had done. face_miss_rate: share of frames without a face of their own, and by
    subject. finished: False for a shard, whose cache others have to complete. seconds: by stage
    ("decode", "detect", "eeg", "write"), of this run, summed over its processes.
    """

    samples: int
    trials: int
    skipped: list[Skip]
    resumed_trials: int
    face_miss_rate: float
    face_miss_rates: dict[int, float] = field(default_factory=dict)
    finished: bool = True
    seconds: dict[str, float] = field(default_factory=dict)


def dataset_module(dataset: str) -> Any:
    """The module that knows a dataset."""
    if dataset not in DATASETS:
        raise InputError(f"unknown layout '{dataset}'; expected one of {', '.join(DATASETS)}")
    return importlib.import_module(f"pycdgkd.data.{dataset}")


def prepare(
    root: Path | str,
    cache: Path | str,
    config: PrepareConfig,
    *,
    dataset: str = "deap",
    jobs: int = 1,
    shard: tuple[int, int] = (1, 1),
    strict: bool = False,
    progress: Progress = None,
) -> PrepareReport:
    """Prepare all trials of a dataset that have a recording, labels and a video.

    A recording, video or trial that cannot be used is skipped and named in the report; with
    ``strict`` the first one ends the preparation. An interrupted preparation resumes after its last
    finished trial; a finished one is left alone. jobs: processes, each at one subject; more than
    one is only for programs guarded by ``if __name__ == "__main__"``, as Python's spawn wants it.
    shard: (i, n) prepares every n-th subject from the i-th on into the same cache folder, beside
    others that do the rest; once all are done a call without it joins them. The finished bytes do
    not depend on jobs, shards or interruptions.
    Raises ``InputError`` when the root is not laid out as the dataset's, when nothing can be used,
    or when ``cache`` was made with other parameters or from other files (the differences are
    named): after mending a recording, prepare a new cache.
    """
    root, cache = Path(root), Path(cache)
    _check_options(jobs, shard)
    study, plan = plan_cache(dataset_module(dataset).scan(root, config), config)
    if strict and study.skipped:
        raise InputError(f"{_where(study.skipped[0])}; remedy: mend it, or prepare without strict")
    found = read_plan(cache)
    if found is not None:
        check_same(cache, found, plan)
        if (cache / MANIFEST).is_file():
            return _report(found, len(plan.trials))
    start_cache(cache, plan)
    run = _Run(study, plan, cache, strict, progress)
    run.subjects(jobs, shard)
    return run.shard_report() if shard[1] > 1 else run.join()


def plan_cache(study: Study, config: PrepareConfig) -> tuple[Study, Plan]:
    """The plan of a cache, and the study without the trials whose files cannot be read."""
    inputs: dict[str, str] = {}
    broken: dict[Path, str] = {}
    used = {path for trial in study.trials for path in (trial.eeg, trial.video)}
    for path in sorted({*used, *study.others}):
        try:
            inputs[path.relative_to(study.root).as_posix()] = fingerprint(path)
        except OSError as error:
            broken[path] = f"cannot read {path.relative_to(study.root)}: {error.strerror or error}"
    unreadable = [path for path in study.others if path in broken]
    if unreadable:
        raise InputError(f"{broken[unreadable[0]]}; remedy: mend its permissions")
    good = [t for t in study.trials if t.eeg not in broken and t.video not in broken]
    lost: list[Skip] = [
        (*t.key, broken.get(t.eeg) or broken[t.video]) for t in study.trials if t not in good
    ]
    skipped = sorted([*study.skipped, *lost], key=lambda entry: (entry[0], entry[1] or 0))
    if not good:
        raise InputError(f"no usable trial in {study.root}: {_where(skipped[0])}")
    plan = Plan(
        config=config,
        dataset=study.dataset,
        synthetic=study.synthetic,
        channels=channel_names(config),
        labels={name: study.classes.get(name, []) for name in study.label_names},
        inputs=inputs,
        trials=tuple(trial.key for trial in good),
        skipped=tuple(skipped),
        subjects=study.subjects,
        stimuli=study.stimuli,
    )
    return replace(study, trials=good), plan


def _check_options(jobs: int, shard: tuple[int, int]) -> None:
    if jobs < 1:
        raise InputError(f"jobs must be at least 1; got {jobs}")
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"a shard is i/n with i from 1 to n, as in 2/8; got {shard[0]}/{shard[1]}")


def _where(skip: Skip) -> str:
    subject, trial, reason = skip
    return f"subject {subject}{'' if trial is None else f' trial {trial}'}: {reason}"


def _report(manifest: dict[str, Any], resumed: int, **more: Any) -> PrepareReport:
    return PrepareReport(
        samples=manifest["samples"],
        trials=manifest["used_trials"],
        skipped=[(subject, trial, reason) for subject, trial, reason in manifest["skipped"]],
        resumed_trials=resumed,
        face_miss_rate=manifest["face_miss_rate"],
        face_miss_rates={int(s): rate for s, rate in manifest["face_miss_rates"].items()},
        **more,
    )


class _Run:
    """One run over the trials that the cache does not have yet."""

    def __init__(
        self,
        study: Study,
        plan: Plan,
        cache: Path,
        strict: bool,
        progress: Progress,
    ) -> None:
        self.study, self.plan, self.cache = study, plan, cache
        self.strict, self.progress = strict, progress
        self.numbers = sorted({trial.subject for trial in study.trials})
        self.resumed = 0
        self.seconds: dict[str, float] = {}
        self.mine: list[int] = []

    def subjects(self, jobs: int, shard: tuple[int, int]) -> None:
        """Prepare the shard's subjects, each into its own part."""
        self.mine = self.numbers[shard[0] - 1 :: shard[1]]
        joined = read_journal(self.cache)
        work, total = [], 0
        study = replace(self.study, trials=[], skipped=[])  # what each process needs of it
        for subject in self.mine:
            trials = [trial for trial in self.study.trials if trial.subject == subject]
            journal = [*joined, *read_journal(part_folder(self.cache, subject))]
            pending = [trial for trial in trials if not speaks_of(journal, *trial.key)]
            total += len(trials)
            self.resumed += len(trials) - len(pending)
            if pending:
                work.append(SubjectJob(self.plan, study, self.cache, tuple(pending), self.strict))
        meter = Meter(f"prepare {self.study.dataset}", total, self.resumed, self.progress)
        if jobs == 1 or len(work) <= 1:
            for job in work:
                add_seconds(self.seconds, prepare_subject(job, meter.tell))
        else:
            for spent in _in_processes(work, min(jobs, len(work)), meter.tell):
                add_seconds(self.seconds, spent)

    def join(self) -> PrepareReport:
        """Join the parts in the order of the plan and finish the cache."""
        with open_writer(self.cache, self.plan) as writer:
            for subject in self.numbers:
                folder = part_folder(self.cache, subject)
                if folder.is_dir():
                    with open_writer(folder, self.plan) as part:
                        writer.take(part)
            if writer.count == 0:
                reasons = "; ".join(str(entry["skipped"]) for entry in writer.journal[:2])
                raise InputError(
                    f"no usable trial in {self.study.root} ({len(self.plan.trials)} tried): "
                    f"{reasons}; remedy: mend the recordings and delete {self.cache}"
                )
            return _report(writer.finish(), self.resumed, seconds=self.seconds)

    def shard_report(self) -> PrepareReport:
        """What this shard's part of the cache holds."""
        journals = [read_journal(part_folder(self.cache, subject)) for subject in self.mine]
        entries = [entry for journal in journals for entry in journal]
        frames = sum(entry.get("frames", 0) for entry in entries)
        missed = sum(entry.get("missed", 0) for entry in entries)
        reasons = [(e["subject"], e["trial"], e["skipped"]) for e in entries if "skipped" in e]
        return PrepareReport(
            samples=sum(len(entry.get("rows", ())) for entry in entries),
            trials=sum(1 for entry in entries if entry.get("rows")),
            skipped=[s for s in self.plan.skipped if s[0] in self.mine] + reasons,
            resumed_trials=self.resumed,
            face_miss_rate=missed / frames if frames else 0.0,
            finished=False,
            seconds=self.seconds,
        )


def _in_processes(work: list[SubjectJob], jobs: int, tell: Tell) -> Iterator[dict[str, float]]:
    """``prepare_subject`` in processes of their own; the first error ends them all."""
    queue = get_context("spawn").Queue()
    with worker_pool(jobs, _use_queue, queue) as pool:
        waiting = {pool.submit(_work, job) for job in work}
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            while not queue.empty():
                tell(*queue.get())
            yield from (future.result() for future in done)
        while not queue.empty():
            tell(*queue.get())


_queue: Any = None


def _use_queue(queue: Any) -> None:
    global _queue
    _queue = queue


def _work(job: SubjectJob) -> dict[str, float]:
    return prepare_subject(job, lambda *told: _queue.put(told))
