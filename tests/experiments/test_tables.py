"""Runs of a table: resumed, sharded, summed up, shown; leaks and mix-ups refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pycdgkd.cli import main
from pycdgkd.errors import InputError
from pycdgkd.experiments.bench import Bench
from pycdgkd.experiments.catalogue import METHODS, TABLES
from pycdgkd.experiments.method import Classifier, Method
from pycdgkd.experiments.page import text_table
from pycdgkd.experiments.runs import Plan, read_confusions, run_all, run_group
from pycdgkd.experiments.settings import chosen_methods
from pycdgkd.experiments.summary import summarise
from pycdgkd.training import metrics
from pycdgkd.training.config import TrainConfig

from .conftest import QUICK

FAST = replace(QUICK, optim=replace(QUICK.optim, epochs=1))


def plan_of(cache: Path, out: Path, config: TrainConfig = FAST) -> Plan:
    methods = tuple(METHODS[name] for name in ("none", "cdgkd-all", "cdgkd"))
    return Plan(cache, out, config, ("valence",), (0, 1), methods)


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = plan_of(cache, tmp_path_factory.mktemp("runs"))
    run_all(plan)
    return plan


def stamps(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_finished_runs_are_left_alone(finished: Plan) -> None:
    before = stamps(finished.out)
    assert sum(name.endswith("result.json") for name in before) == 6
    run_all(finished)
    assert stamps(finished.out) == before


def test_shards_run_all_there_is(finished: Plan, cache: Path, tmp_path: Path) -> None:
    plan = plan_of(cache, tmp_path)
    for shard in ((1, 2), (2, 2)):
        run_all(plan, shard=shard)
    for path in sorted(finished.out.rglob("predictions.csv")):
        assert (tmp_path / path.relative_to(finished.out)).read_bytes() == path.read_bytes()


def test_runs_made_otherwise_are_refused(finished: Plan) -> None:
    other = replace(finished.config, optim=replace(finished.config.optim, lr=1e-3))
    with pytest.raises(InputError, match=r"another configuration optim.lr: 0.002; expected 0.001"):
        run_all(replace(finished, config=other))
    changed = chosen_methods(["none", "cdgkd"], ["cdgkd.distill.temperature=4"])
    with pytest.raises(InputError, match="run with another settings distill"):
        run_all(replace(finished, methods=changed))


def test_every_seed_has_a_split_of_its_own_that_its_methods_share(finished: Plan) -> None:
    hashes: dict[int, set[str]] = {}
    for path in finished.out.rglob("result.json"):
        result = json.loads(path.read_text())
        hashes.setdefault(result["seed"], set()).add(result["identity"]["split_hash"])
    assert [len(found) for found in hashes.values()] == [1, 1]
    assert hashes[0] != hashes[1]


def test_methods_share_one_teacher(finished: Plan) -> None:
    weights = [p.parent for p in finished.out.rglob("model.safetensors") if "seed_00" in str(p)]
    names = sorted("/".join(p.relative_to(finished.out).parts[4:]) for p in weights)
    students = [f"cdgkd{kind}/{role}" for kind in ("", "-all")
                for role in ("assistant_1", "assistant_2", "student")]  # fmt: skip
    assert names == sorted([*students, "none/student", "shared/teacher"])


def test_means_and_differences_are_those_of_the_predictions(finished: Plan) -> None:
    rows = {row.method.name: row for row in summarise(finished, TABLES["table5"], "valence")}
    assert list(rows) == ["none", "cdgkd-all", "cdgkd"]
    means = {}
    for name in rows:
        found = [read_confusions(p.parent, 2).sum(0)
                 for p in sorted(finished.out.rglob(f"{name}/result.json"))]  # fmt: skip
        means[name] = np.mean([metrics.accuracy(table) for table in found])
        accuracy = rows[name].figures["accuracy"]
        assert accuracy["value"] == pytest.approx(means[name])
        assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
        assert rows[name].runs == 2
    assert rows["cdgkd"].difference is None
    for name in ("none", "cdgkd-all"):
        difference, p, corrected = rows[name].difference, rows[name].p, rows[name].p_holm
        assert difference is not None
        assert p is not None
        assert corrected is not None
        assert difference["value"] == pytest.approx(means[name] - means["cdgkd"])
        assert 0 < p <= corrected <= 1
    text = text_table(TABLES["table5"], "valence", list(rows.values()))
    assert "CDGKD (variant 5)" in text
    assert "printed in the paper" in text
    assert "64.50 (deap)" in text


def greedy(bench: Bench, settings: object) -> Classifier:
    """A method that fits its answer on every sample of the cache, the test samples among them."""
    del settings
    everything = np.arange(len(bench.data.labels))
    bench.data.batch(everything)
    raise AssertionError("it got what it should not")


def test_a_planted_leak_is_refused(cache: Path, tmp_path: Path) -> None:
    leak = Method("leak", "leak", ("video",), METHODS["none"].settings, greedy)
    plan = replace(plan_of(cache, tmp_path), methods=(leak,))
    with pytest.raises(InputError, match="leakage: a method asked for samples of the test split"):
        run_group(plan, plan.groups()[0])
    assert not list(tmp_path.rglob("result.json"))


def test_labels_and_split_of_the_test_are_sealed(
    open_bench: Callable[..., Bench],
) -> None:
    bench = open_bench(METHODS["none"])
    assert len(bench.split.test) == 0
    known = np.concatenate([bench.split.train, bench.split.val])
    assert (bench.data.labels[known] >= 0).all()
    assert (np.delete(bench.data.labels, known) == -1).all()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("kd.distill.temperature", "must read METHOD.KEY=VALUE"),
        ("kd=4", "must read METHOD.KEY=VALUE"),
        ("kdd.distill.temperature=4", "unknown method 'kdd'; nearest of .*: 'kd'"),
        ("takd.assistants=1", "a setting of takd, which is not run"),
        ("kd.distil.temperature=4", "unknown key 'distil'; nearest known: 'distill'"),
        ("kd.distill=4", "distill has keys of its own"),
        ("kd.assistants=two", "expected a value like 0; got 'two'"),
        ("kd.distill.direction=sideways", "distill.direction must be one of"),
    ],
)
def test_settings_that_cannot_be_meant(setting: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        chosen_methods(["kd"], [setting])


def test_settings_change_one_value() -> None:
    (method,) = chosen_methods(["kd"], ["kd.distill.temperature=4", "kd.assistants=1"])
    assert method.settings.distill.temperature == 4.0
    assert method.settings.assistants == 1
    assert METHODS["kd"].settings.distill.temperature == 2.0


def test_the_command(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seeds", "2", "--labels", "valence", "--methods", "none,kd", "--preset", "nano"]
    options += ["--set", "optim.epochs=1", "--set", "split.fractions=0.6,0.2,0.2"]
    command = ["experiment", "table2", str(cache), "--out", str(tmp_path), *options]
    assert main([*command, "--shard", "1/2"]) == 0
    assert "the same command without --shard" in capsys.readouterr().out
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "Students: face video alone in use: valence" in text
    assert "no distillation (variant 3)" in text
    page = (tmp_path / "table2.html").read_text()
    for words in ("printed in the paper", "Made-up recordings", "optim.epochs: 1 instead of 100"):
        assert words in page
    with (tmp_path / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [(run["method"], run["seed"]) for run in runs] == [
        ("none", "0"), ("kd", "0"), ("none", "1"), ("kd", "1"),
    ]  # fmt: skip
    with (tmp_path / "table2.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["none", "kd"]
    assert main(["experiment", "table2", "--out", str(tmp_path), "--methods", "list"]) == 0
    assert "ambokd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table9", "c"], "unknown experiment 'table9'; expected one of table1"),
        (["table1"], "table1 needs a cache"),
        (["table1", "c", "--seeds", "few"], "no cache at c|--seeds must be"),
        (["table1", "c", "--jobs", "0"], "--jobs must be at least 1"),
        (["table1", "c", "--shard", "0/2"], "--shard must be i/n"),
    ],
)
def test_commands_that_cannot_be_meant(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", *arguments, "--out", "x"]) == 2
    assert any(word in capsys.readouterr().err for word in words.split("|"))
