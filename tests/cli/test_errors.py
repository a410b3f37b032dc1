"""Every mistake gets one line with its remedy; a defect keeps its traceback."""

from __future__ import annotations

import argparse
import dataclasses
import errno

import pytest

from pycdgkd.cli import commands, main
from pycdgkd.cli.commands import prepare_config
from pycdgkd.cli.parser import PREPARE_HELP, build_parser, parse_arguments
from pycdgkd.data.config import DATASETS, PrepareConfig
from pycdgkd.errors import InputError


def fails_with(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run, check status 2 and a single line on standard error, and return that line."""
    assert main(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("pycdgkd: error: ")
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no command given; one of demo, prepare, check-data, inspect, train"),
        (["trian", "x"], "unknown command 'trian'; did you mean 'train'?"),
        (["zzz"], "unknown command 'zzz' (see pycdgkd --help)"),
        (["--verson"], "did you mean '--version'?"),
        (["train", "cache", "--otu", "x"], "unknown option '--otu'; did you mean '--out'?"),
        (["train", "cache", "--presett=nano", "--out", "x"], "did you mean '--preset'?"),
        (["prepare", "deap", "a", "b", "--img_size", "48"], "did you mean '--img-size'?"),
        (["train", "cache"], "required: --out"),
        (["predict", "student"], "required: CLIP"),
        (["demo", "--seed", "one"], "invalid int value: 'one'"),
        (["demo", "--size", "tiny"], "'full', 'small'"),
        (["demo", "--seed", "-1"], "seed must be"),
        (["prepare", "seed", "a", "b"], "unknown layout 'seed'; expected one of deap, mahnob"),
        (["prepare", "deap", ".", "b", "--shard", "3/2"], "--shard must be i/n"),
        (["check-data", "folder", "/none"], "expected the folder that holds trials.csv"),
        (["train", "c", "--out", "r", "--split", "losso"], "split.kind must be one of"),
        (["train", "c", "--out", "r", "--split", "loso:3"], "takes no number of folds"),
        (["train", "c", "--out", "r", "--guidance", "x"], "distill.guidance must be one of"),
        (["prepare", "deap", ".", "b", "--min-face", "2"], "min_face must be"),
        (["train", "c", "--out", "r", "--set", "optim.lr"], "key=value"),
        (["report", "."], "holds no results.json"),
    ],
)
def test_one_line_and_remedy(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
):
    assert expected in fails_with(capsys, *arguments)


def test_negative_numbers_are_no_unknown_options():
    arguments = parse_arguments(["prepare", "deap", "a", "b", "--video-offset", "-0.5"])
    assert arguments.video_offset == -0.5


def test_every_prepare_parameter_is_an_option_with_its_default():
    _, parsers = build_parser()
    fields = dataclasses.fields(PrepareConfig)
    assert set(PREPARE_HELP) == {field.name for field in fields}
    for dataset in DATASETS:
        arguments = parse_arguments(["prepare", dataset, ".", "b"])
        assert prepare_config(arguments) == PrepareConfig.of(dataset)
    arguments = parse_arguments(["prepare", "mahnob", ".", "b", "--frames", "5"])
    assert prepare_config(arguments) == PrepareConfig.of("mahnob", frames=5)
    text = " ".join(parsers["prepare"].format_help().split())
    for field in fields:
        assert f"--{field.name.replace('_', '-')} " in text
        assert f"(default: {field.default!r}" in text


def test_train_help_names_every_configuration_key():
    from pycdgkd.training.config import TrainConfig, config_values

    text = build_parser()[1]["train"].format_help()
    for key in config_values(TrainConfig()):
        assert f"\n{key.rpartition('.')[2]} = " in text


def raising(error: BaseException):
    def command(_: argparse.Namespace) -> int:
        raise error

    return command


def run_raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    monkeypatch.setitem(
        build_parser.__globals__["_COMMANDS"],
        "doctor",
        (raising(error), lambda _: None, "say 'please'", "breaks"),
    )
    return main(["doctor"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InputError("two\nlines;  remedy: none"), "two lines; remedy: none"),
        (FileNotFoundError(errno.ENOENT, "gone", "a/b.csv"), "a/b.csv: no such file"),
        (PermissionError(errno.EACCES, "no", "a/b.csv"), "a/b.csv: permission denied"),
        (OSError(errno.ENOSPC, "full", "a/b.npy"), "a/b.npy: no space left"),
    ],
)
def test_outside_trouble_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    expected: str,
):
    assert run_raising(monkeypatch, error) == 2
    text = capsys.readouterr().err
    assert expected in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("y"), OSError(errno.EBADF, "bad descriptor")]
)
def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception):
    with pytest.raises(type(error)):
        run_raising(monkeypatch, error)


def test_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run_raising(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\npycdgkd: interrupted; say 'please'\n"


def test_train_interrupt_hint_names_resume():
    arguments = parse_arguments(["train", "cache", "--out", "run"])
    assert arguments.command is commands.train
    assert "--resume" in arguments.after_interrupt
