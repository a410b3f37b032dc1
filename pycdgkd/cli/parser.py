"""The command line's grammar (standard library only): commands, options, nearest known names."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pycdgkd import __version__
from pycdgkd.data.kinds import KINDS
from pycdgkd.errors import InputError

from . import commands, experiment
from .demo import SIZES, demo

_DESCRIPTION = (
    "Train a face-video-only emotion recogniser with the help of a network that also saw the EEG."
)
_EPILOG = (
    "Start with 'pycdgkd demo' (made-up recordings, no download) and 'pycdgkd doctor'. "
    "'pycdgkd COMMAND --help' explains each command. Options cannot be abbreviated."
)

# Every field of PrepareConfig is an option of `prepare`; a test holds the two together.
PREPARE_HELP = {
    "source": "deap: EEG of the original recordings 'bdf' or the preprocessed 'dat'",
    "subjects": "'all', or numbers as in 1,2,7; else those that the dataset's papers use",
    "labels": "columns kept as labels, as in valence,arousal; else the dataset's own",
    "sfreq": "EEG rate of the cache in hertz",
    "channels": "'tsception28' (28 electrodes, no midline), 'all32' or names as in Fz,Cz,Pz",
    "baseline": "'mean' subtracts each electrode's mean before the stimulus; or 'none'",
    "baseline_seconds": "length of that baseline",
    "timing": "find frames by 'count' at the true rate or by the file's time 'stamps'",
    "frames": "at most so many frames of a window; 0 for all",
    "notch": "mains frequency to filter out in hertz; 0 for none",
    "low": "lower edge of the EEG's pass band in hertz",
    "high": "upper edge of the EEG's pass band in hertz",
    "window": "length of one sample in seconds",
    "stride": "distance between the starts of neighbouring samples in seconds",
    "trial_seconds": "length of one trial in seconds, from its start; 0: as long as its stimulus",
    "fps": "true frame rate of the face videos in frames per second (metadata is often wrong)",
    "frame_stride": "keep one frame of every so many frames",
    "img_size": "edge of the square face crop in pixels",
    "margin": "widening of the face box as a share of its size",
    "faces": "'mtcnn' (detected), 'boxes' (ROOT/boxes.csv) or 'none' (largest centred square)",
    "min_face": "smallest face that is looked for in pixels",
    "video_offset": "seconds of video before the trial's start event",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of the known names, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


class Parser(argparse.ArgumentParser):
    """Raises ``InputError`` and answers unknown options with the nearest known one."""

    def __init__(self, **settings: Any) -> None:
        self.flags: set[str] = set()
        super().__init__(allow_abbrev=False, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an argument as argparse does, and remember its flags."""
        action = super().add_argument(*names, **settings)
        self.flags.update(action.option_strings)
        return action

    def check_flags(self, tokens: Sequence[str]) -> None:
        """Raise ``InputError`` for the first unknown option (argparse would report it too late)."""
        for token in tokens:
            if token == "--":
                return
            flag = token.split("=", 1)[0]
            if re.match(r"--?[A-Za-z]", flag) and flag not in self.flags:
                raise InputError(
                    f"unknown option '{flag}'{nearest(flag, self.flags)} (see {self.prog} --help)"
                )

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into an ``InputError``."""
        raise InputError(f"{message} (see {self.prog} --help)")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each option's help, epilogs as they were laid out."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, bool | list | None):
            return action.help
        return super()._get_help_string(action)


def _add_demo(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of recordings and training")
    parser.add_argument(
        "--size", choices=sorted(SIZES), default="full", help="'small' is for a quick check"
    )


def _add_prepare(parser: Parser) -> None:
    _add_dataset(parser)
    parser.add_argument("cache", metavar="CACHE", type=Path, help="folder to write the samples to")
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=1, help="processes, each at one subject"
    )
    parser.add_argument(
        "--shard",
        metavar="i/n",
        default="1/1",
        help="prepare every n-th subject from the i-th on; others do the rest in the same CACHE, "
        "and the command without this option joins them",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad recording")
    _add_prepare_options(parser)


def _add_check_data(parser: Parser) -> None:
    _add_dataset(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_prepare_options(parser)


def _add_dataset(parser: Parser) -> None:
    parser.add_argument("layout", metavar="deap|mahnob|folder", help="layout of the recordings")
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder that holds the recordings")


def _add_prepare_options(parser: Parser) -> None:
    from pycdgkd.data.config import DATASET_DEFAULTS, PrepareConfig

    for field in dataclasses.fields(PrepareConfig):
        name = field.name
        others = [f"{d} {v[name]!r}" for d, v in DATASET_DEFAULTS.items() if name in v]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(field.default),
            metavar={str: "NAME", int: "N"}.get(type(field.default), "X"),
            help=f"{PREPARE_HELP[name]} (default: {', '.join([repr(field.default), *others])})",
        )


def _add_train(parser: Parser) -> None:
    from pycdgkd.training.config import TrainConfig, to_toml

    parser.add_argument("cache", metavar="CACHE", type=Path, help="folder made by prepare")
    parser.add_argument("--out", metavar="RUN", type=Path, required=True, help="folder of the run")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file with the keys below")
    parser.add_argument("--preset", metavar="NAME", help="size of the networks: paper or nano")
    parser.add_argument("--label", metavar="NAME", help="a label column of the cache")
    parser.add_argument(
        "--split",
        metavar="KIND",
        help=f"{', '.join(KINDS)}; folds as in subject-kfold:5. Folds are trained into "
        "RUN/fold_01, ... and summed up in RUN",
    )
    parser.add_argument(
        "--folds", metavar="I,J", help="train these folds only and sum up all that are there"
    )
    parser.add_argument(
        "--guidance",
        metavar="NAME",
        help="in-sample, or out-of-fold: no sample is taught by a network that saw its label",
    )
    parser.add_argument("--seed", metavar="N", help="seed of everything that is drawn")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="one key of the configuration, e.g. distill.kd_weight=0.7; may be repeated",
    )
    parser.add_argument("--resume", action="store_true", help="go on where RUN stopped")
    parser.epilog = (
        "Options on the command line win over FILE, FILE wins over the preset.\n\n"
        "Keys of the configuration with their defaults:\n\n" + to_toml(TrainConfig())
    )


def _add_evaluate(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    parser.add_argument("--cache", type=Path, help="the cache, if it has moved since training")


def _add_predict(parser: Parser) -> None:
    parser.add_argument("network", metavar="STUDENT", type=Path, help="e.g. runs/x/student")
    parser.add_argument("clip", metavar="CLIP", type=Path, help="video file with one face")
    parser.add_argument(
        "--out",
        metavar="STEM",
        type=Path,
        help="write STEM.csv and STEM.png (default: the clip's name + '_emotion', in this folder)",
    )
    parser.add_argument(
        "--fps",
        metavar="X",
        type=float,
        help="true frame rate of the clip in frames per second (default: what the file states)",
    )


def _add_inspect(parser: Parser) -> None:
    parser.add_argument("cache", metavar="CACHE", type=Path, help="folder made by prepare")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page (default: CACHE/inspect.html)"
    )


def _add_report(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")


def _add_bench(parser: Parser) -> None:
    parser.add_argument(
        "--case", metavar="GLOB", help="cases by name, e.g. 'teacher_loss/N128*' (quote it)"
    )
    parser.add_argument("--op", metavar="NAME", help="cases of one op, e.g. distillation_loss")
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        nargs="+",
        default=[1],
        help="threads of all contestants; ours and the strongest eager peer also with each "
        "further number (default: 1; the stored results have 1 2)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few cases, no torch.compile: about a minute"
    )
    parser.add_argument(
        "--seconds", metavar="X", type=float, help="time of a case (default: 5; with --quick 1.5)"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="also write JSON, Markdown and plots there"
    )
    parser.add_argument("--list", action="store_true", help="print the cases' names, time nothing")
    parser.epilog = (
        "All contestants run in turns, in random order, and ratios are formed within a round.\n"
        "A ratio below 1 means that the other is faster. Peers from other packages take part\n"
        'where they are installed: pip install "pycdgkd[bench]"'
    )


def _add_nothing(parser: Parser) -> None:
    del parser


_AGAIN = "run the same command again to go on where it stopped"
_NOTHING_KEPT = "nothing was written; run the same command again"
_COMMANDS = {
    "demo": (demo, _add_demo, _AGAIN, "the whole chain on made-up recordings"),
    "prepare": (commands.prepare, _add_prepare, _AGAIN, "recordings -> cache of samples"),
    "check-data": (
        commands.check_data,
        _add_check_data,
        _NOTHING_KEPT,
        "what a dataset's folder holds and what would be skipped",
    ),
    "inspect": (commands.inspect, _add_inspect, _NOTHING_KEPT, "a page that shows a cache"),
    "train": (
        commands.train,
        _add_train,
        "add --resume to the same command to go on where it stopped",
        "cache -> teacher, assistants, student, control and a report",
    ),
    "evaluate": (
        commands.evaluate,
        _add_evaluate,
        _NOTHING_KEPT,
        "recompute a run's test figures from its weights",
    ),
    "predict": (commands.predict, _add_predict, _NOTHING_KEPT, "emotion over time of a video"),
    "report": (commands.report, _add_report, _NOTHING_KEPT, "write a run's report.html again"),
    "experiment": (
        experiment.experiment,
        experiment.add_arguments,
        _AGAIN,
        "the paper's tables with every method, or a controlled study of its claims",
    ),
    "bench": (commands.bench, _add_bench, _NOTHING_KEPT, "time the losses beside their peers"),
    "doctor": (commands.doctor, _add_nothing, _NOTHING_KEPT, "check this installation"),
}


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The top parser and the parser of each command."""
    top = Parser(
        prog="pycdgkd", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_Formatter
    )
    top.add_argument("--version", action="version", version=f"pycdgkd {__version__}")
    group = top.add_subparsers(metavar="COMMAND", dest="name", required=True, parser_class=Parser)
    parsers = {}
    for name, (run, add_arguments, hint, summary) in _COMMANDS.items():
        parser = group.add_parser(
            name, help=summary, description=summary, formatter_class=_Formatter
        )
        add_arguments(parser)
        parser.set_defaults(command=run, after_interrupt=hint)
        parsers[name] = parser
    return top, parsers


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; ``InputError`` names what is wrong and the nearest known name."""
    top, parsers = build_parser()
    if not argv:
        raise InputError(
            f"no command given; one of {', '.join(parsers)} was expected (see pycdgkd --help)"
        )
    name = argv[0]
    if name in parsers:
        parsers[name].check_flags(argv[1:])
    elif name.startswith("-"):
        top.check_flags(argv[:1])
    else:
        raise InputError(f"unknown command '{name}'{nearest(name, parsers)} (see pycdgkd --help)")
    return top.parse_args(list(argv))
