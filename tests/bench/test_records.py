"""Records, goals, tables and plots from a made-up run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pycdgkd.bench import goals, plots, records, report, table
from pycdgkd.bench.cases import Case
from pycdgkd.bench.records import Probes, Run
from pycdgkd.errors import InputError


def test_a_record_survives_being_stored(record: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    records.save(record, path)
    stored = records.load(path)
    assert dataclasses.replace(stored, cases=[]) == dataclasses.replace(record, cases=[])
    for found, made in zip(stored.cases, record.cases, strict=True):
        assert dataclasses.replace(found, entries=[]) == dataclasses.replace(made, entries=[])
        for one, other in zip(found.entries, made.entries, strict=True):
            assert repr(one) == repr(records._entry(records._rounded(dataclasses.asdict(other))))
            assert one.seconds.keys() == other.seconds.keys()
            assert all(
                one.seconds[phase].p90 == pytest.approx(other.seconds[phase].p90, rel=1e-4)
                for phase in one.seconds
            )
    assert json.loads(path.read_text(encoding="utf-8"))["machine"]["cores"] == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 0}', '{"schema": 1}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"run.json is not a benchmark record.*remedy"):
        records.load(path)


def test_the_stricter_limits_count() -> None:
    better, worse = Probes(4.0, 2.0, 9.0, 1.0), Probes(3.0, 3.0, 8.0, 2.0)
    assert better.stricter(worse) == Probes(4.0, 3.0, 9.0, 1.0)


def judged_words(run: Run) -> dict[tuple[str, str], tuple[float, bool]]:
    return {
        (case.name.removeprefix("prototype_loss/N16384-D1024-K2"), goal.words): (
            round(value.median, 3),
            goal.met(value.median),
        )
        for goal, case, value in goals.judged(run)
        if value is not None
    }


def test_goals_are_judged_by_the_median(record: Run) -> None:
    assert judged_words(record) == {
        ("", ">= 8x addmm"): (9.0, True),
        ("", ">= 4x lce"): (0.5, False),
        ("", ">= 70% of copy bandwidth"): (0.671, False),
        ("", ">= 1.6x with 2 threads"): (1.6, True),
        ("-strided", "<= 1.3x the neighbour's cost"): (2.0, False),
    }


def test_goals_that_were_not_measured_are_told(record: Run) -> None:
    large = record.cases[0]
    fewer = [entry for entry in large.entries if entry.name != "addmm"]
    run = dataclasses.replace(record, cases=[dataclasses.replace(large, entries=fewer)])
    (goal_table, *_) = table.tables(run)
    assert goal_table.title == "Goals: 1 of 3 met, 1 not measured"
    assert (">= 8x addmm", "-", "-", "not measured") in {row[1:5] for row in goal_table.rows}


def test_less_memory_than_the_peer(record: Run) -> None:
    goal = goals.Goal("*", "memory", "addmm", 1)
    value = goal.measured(record.cases[0])
    assert value is not None
    assert value.median == pytest.approx(200 / 65)
    assert goal.met(1.01)
    assert not goal.met(1.0)
    assert goals.Goal("*", "memory", "lce", 1).measured(record.cases[0]) is None


def test_the_tables_show_losing_and_wrong_results(record: Run) -> None:
    text = table.report(record)
    assert "Goals: 2 of 5 met" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.startswith("Some CPU @ 3 GHz (x86_64), 2 cores") for line in lines)
    assert (
        "N16384-D1024-K2 10 ms (9 ms - 12 ms) 9.00x 0.50x wrong (1e-01) failed - 13.42 67% 1e-06"
        in lines
    )
    assert "N16384-D1024-K2-strided 20 ms (18 ms - 24 ms) - - - - 0.50x 6.71 34% 1e-06" in lines
    name = "prototype_loss/N16384-D1024-K2"
    assert f"{name} 1.5 ms 4.5 ms - - 2.5 ms 7.5 ms 1.60x 1.90x (addmm) 40" in lines
    assert f"{name} 65 200" in lines
    assert any("NOT MET bytes: 67% of copy, 134% of clone" in line for line in lines)


def test_markdown_has_the_same_rows(record: Run) -> None:
    text = table.report(record, markdown=True)
    for one in table.tables(record):
        assert f"### {one.title}\n" in text
        assert f"| {' | '.join(one.header)} |\n| --- |" in text
        for row in one.rows:
            assert len(row) == len(one.header)
            assert f"| {' | '.join(row)} |" in text


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ("overhead", "dispatch: 333.3x the smallest autograd step"),
        ("bytes", "bytes: 67% of copy, 134% of clone"),
        ("exps", "exps: 50%"),
        ("flops", "-"),
    ],
)
def test_what_bounds_a_case(record: Run, bound: str, expected: str) -> None:
    case = dataclasses.replace(record.cases[0], bound=bound, exps=10_000_000)
    assert table.limit_words(case) == expected


@pytest.mark.parametrize(
    ("seconds", "words"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 us")]
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert table.seconds_words(seconds) == words


def test_a_run_is_written_with_its_plots(record: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = report.write_run(record, tmp_path)
    stem = "some-cpu-3-ghz-2-cores"
    assert [path.name for path in written] == [f"{stem}.json", f"{stem}.md", f"{stem}-ratios.svg"]
    assert "Goals: 2 of 5 met" in written[1].read_text(encoding="utf-8")
    picture = written[2].read_text(encoding="utf-8")
    assert "prototype/N16384-D1024-K2: addmm" in picture
    assert len(picture) < 200_000


def test_scaling_is_drawn_from_two_sizes_on(record: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = record.cases[0]
    several = [
        dataclasses.replace(
            first,
            name=Case("prototype_loss", 4096, classes, 512).name,
            sizes={**first.sizes, "classes": classes},
        )
        for classes in (2, 32)
    ]
    run = dataclasses.replace(record, cases=several)
    written = plots.draw(run, tmp_path / "x")
    assert [path.name for path in written] == ["x-scaling.svg"]
    text = written[0].read_text(encoding="utf-8")
    assert all(word in text for word in ("pycdgkd", "addmm", "lce", "microseconds"))
    assert "ProxyNCA" not in text  # took no part
    assert text == plots.draw(run, tmp_path / "y")[0].read_text(encoding="utf-8")
