"""Parameters of a training run: dataclasses, presets, TOML and dotted overrides (stdlib only)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pycdgkd.data.kinds import KINDS
from pycdgkd.errors import InputError

Value: TypeAlias = int | float | str | tuple[float, ...]

PRESETS = ("paper", "nano")
TIES = ("low", "high", "drop")
GUIDANCES = ("in-sample", "out-of-fold")
DIRECTIONS = ("reverse", "forward")
STRATEGIES = ("subset", "all", "bernoulli_sum", "drop_one", "drop_one_sum", "previous", "none")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}; got '{value}'")


def _within(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise InputError(f"{name} must be a finite number {bound}; got {value}")


def _share(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise InputError(f"{name} must be a number from 0 to below 1; got {value}")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be a finite number above 0; got {value}")


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation of every network: Adam with a constant learning rate and early stopping.

    warmup: steps over which the learning rate rises linearly to lr; 0 (the paper) for none.
    patience: epochs without a higher validation accuracy after which training stops.
    micro_batch: samples in one forward pass, 0 for the whole batch; gradients of the parts are
    accumulated. Batch normalisation and the modality weights then see the part, not the batch.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float = 1e-4
    warmup: int = 0
    weight_decay: float = 0.0
    patience: int = 15
    micro_batch: int = 0

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        for name in ("epochs", "batch_size", "patience"):
            _within(f"optim.{name}", getattr(self, name), 1)
        _positive("optim.lr", self.lr)
        _within("optim.warmup", self.warmup, 0)
        _within("optim.weight_decay", self.weight_decay, 0.0)
        _within("optim.micro_batch", self.micro_batch, 0, self.batch_size)

    @property
    def part_size(self) -> int:
        """Samples in one forward pass."""
        return self.micro_batch or self.batch_size

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, which count from 1."""
        return self.lr * min(1.0, step / self.warmup) if self.warmup else self.lr


@dataclass(frozen=True)
class TeacherConfig:
    """Modality rebalancing of the teacher (Eqs. 1-6).

    proto_weight: the paper's alpha; 0 trains by cross-entropy alone and computes no prototypes.
    momentum: share of the old prototypes that is kept at each epoch.
    scale: factor of the squared distance in Eq. 2; 1 as printed.
    """

    proto_weight: float = 0.5
    momentum: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        _within("teacher.proto_weight", self.proto_weight, 0.0, 1.0)
        _share("teacher.momentum", self.momentum)
        _positive("teacher.scale", self.scale)


@dataclass(frozen=True)
class DistillConfig:
    """Densely guided distillation of the assistants and the student (Eq. 9).

    kd_weight: the paper's beta. direction: "reverse" is KL(learner || source) as printed.
    temperature_power: exponent of the factor T**power before the KL term.
    strategy: sources of one step, see ``pycdgkd.sample_sources``; "previous" is the network before
    alone (TAKD), "none" trains by cross-entropy alone. drop_prob: probability that a source is left
    out of a step.
    guidance: "in-sample", the sources' logits on the samples they were trained on; "out-of-fold",
    those of sources trained without the sample's trial, one for each of the folds: networks are
    over-confident on samples that they were trained on, and repeat what is wrong in the labels.
    """

    kd_weight: float = 0.5
    temperature: float = 2.0
    direction: str = "reverse"
    temperature_power: float = 0.0
    strategy: str = "subset"
    drop_prob: float = 0.5
    guidance: str = "in-sample"
    folds: int = 5

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        _within("distill.kd_weight", self.kd_weight, 0.0, 1.0)
        _positive("distill.temperature", self.temperature)
        _choice("distill.direction", self.direction, DIRECTIONS)
        _within("distill.temperature_power", self.temperature_power, 0.0, 4.0)
        _choice("distill.strategy", self.strategy, STRATEGIES)
        _share("distill.drop_prob", self.drop_prob)
        _choice("distill.guidance", self.guidance, GUIDANCES)
        _within("distill.folds", self.folds, 2)


@dataclass(frozen=True)
class SplitConfig:
    """How train, validation and test are drawn, see ``pycdgkd.data.splits``.

    fractions: shares of the three; of folds only validation's counts. kind: "trial" (the paper),
    "stratified", "loso", "subject-kfold", ... folds: of the kinds that end in -kfold.
    fold: which of them, from 1.
    """

    kind: str = "trial"
    folds: int = 5
    fold: int = 1
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        shares = self.fractions
        if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise InputError(
                "split.fractions must be three positive numbers that sum to 1; got "
                + ", ".join(f"{share:g}" for share in shares)
            )
        _within("split.seed", self.seed, 0)
        _choice("split.kind", self.kind, KINDS)
        _within("split.folds", self.folds, 2)
        _within("split.fold", self.fold, 1)


@dataclass(frozen=True)
class TrainConfig:
    """One run: teacher, assistants, student and control for one label.

    preset: networks (and schedule) "paper" or "nano". label: a column of the cache. thresholds:
    ascending; a rating above the first is class 1, above the second class 2, ... ties: what a
    rating at a threshold counts as, "low" (the paper), "high" or "drop".
    backbone: "pvt" or "timm:NAME". encoder_weights: file of frame encoder weights, "" for none.
    threads: CPU threads, 0 for torch's choice. device: "auto", "cpu", "cuda" or "cuda:N".
    """

    preset: str = "paper"
    seed: int = 0
    label: str = "valence"
    thresholds: tuple[float, ...] = (5.0,)
    ties: str = "low"
    assistants: int = 2
    backbone: str = "pvt"
    encoder_weights: str = ""
    threads: int = 0
    device: str = "auto"
    optim: OptimConfig = field(default_factory=OptimConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    split: SplitConfig = field(default_factory=SplitConfig)

    def __post_init__(self) -> None:
        """Raise ``InputError`` for any value that cannot be meant."""
        _choice("preset", self.preset, PRESETS)
        if not self.label:
            raise InputError("label must name a column of the cache; got ''")
        _choice("ties", self.ties, TIES)
        _within("seed", self.seed, 0)
        steps = self.thresholds
        if not steps or list(steps) != sorted(set(steps)) or not all(map(math.isfinite, steps)):
            raise InputError(
                "thresholds must be finite numbers in ascending order; got "
                + ", ".join(f"{step:g}" for step in steps)
            )
        _within("assistants", self.assistants, 0, 16)
        _within("threads", self.threads, 0, 1024)
        if self.backbone != "pvt" and not re.fullmatch(r"timm:\S+", self.backbone):
            raise InputError(f"backbone must be 'pvt' or 'timm:NAME'; got '{self.backbone}'")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"device must be auto, cpu, cuda or cuda:N; got '{self.device}'")

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the networks in the order in which they are trained."""
        assistants = (f"assistant_{level}" for level in range(1, self.assistants + 1))
        return ("teacher", *assistants, "student", "control")


def preset_config(name: str) -> TrainConfig:
    """The defaults of a preset: "paper", or "nano" with a schedule for minutes on a CPU."""
    _choice("preset", name, PRESETS)
    if name == "paper":
        return TrainConfig()
    return TrainConfig(
        preset="nano",
        optim=OptimConfig(epochs=14, batch_size=16, lr=5e-4, warmup=100, patience=8),
    )


def load_config(
    path: Path | None = None, overrides: Sequence[str] = (), preset: str | None = None
) -> TrainConfig:
    """Defaults of the preset, then the TOML file, then "section.key=value" overrides.

    The preset itself comes from the overrides, else from ``preset``, else from the file, else it is
    "paper". Raises ``InputError`` for unreadable files, unknown keys and values that do not fit.
    """
    stored = {} if path is None else dict(_flatten(_read_toml(path)))
    given = dict(_parse_override(text) for text in overrides)
    name = given.get("preset") or preset or stored.get("preset") or "paper"
    values = config_values(preset_config(str(name)))
    for key, value in stored.items():
        values[key] = _from_toml(key, value, _default(key, values))
    for key, text in given.items():
        values[key] = _from_text(key, text, _default(key, values))
    values["preset"] = str(name)
    return _from_values(values)


def config_values(config: TrainConfig) -> dict[str, Value]:
    """Every value by its dotted key, in the order of the file."""
    return dict(_flatten(dataclasses.asdict(config)))


def config_differences(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """ "key: a instead of b" for every value in which two configurations differ."""
    other = config_values(theirs)
    return [
        f"{key}: {value} instead of {other[key]}"
        for key, value in config_values(ours).items()
        if value != other[key]
    ]


def to_toml(config: TrainConfig) -> str:
    """Every value of a configuration as TOML; ``load_config`` reads back an equal one."""
    lines: list[str] = []
    section = ""
    for key, value in config_values(config).items():
        head, _, name = key.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
        lines.append(f"{name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Value) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(repr(item) for item in value) + "]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:  # TOML and UTF-8 errors alike
        raise InputError(f"{path} is not valid TOML: {error}") from error


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _parse_override(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise InputError(f"an override must read key=value, as in optim.lr=1e-4; got '{text}'")
    return key.strip(), value.strip()


def _default(key: str, values: Mapping[str, Value]) -> Value:
    if key in values:
        return values[key]

    def likeness(known: str) -> float:
        pairs = ((key, known), (key.rpartition(".")[2], known.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)

    nearest = max(values, key=likeness)
    raise InputError(f"unknown configuration key '{key}'; nearest known: '{nearest}'")


def _from_toml(key: str, value: Any, default: Value) -> Value:
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(float(_number(key, item, float)) for item in value)
    if isinstance(default, str) and isinstance(value, str):
        return value
    if isinstance(default, int | float):
        return _number(key, value, type(default))
    raise InputError(f"{key} must be {_kind(default)}; got {value!r}")


def _number(key: str, value: Any, kind: type[int] | type[float]) -> int | float:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or (kind is int and not isinstance(value, int)):
        raise InputError(f"{key} must be {_kind(kind())}; got {value!r}")
    return kind(value)


def _from_text(key: str, text: str, default: Value) -> Value:
    try:
        if isinstance(default, tuple):
            return tuple(float(item) for item in text.strip("[]()").split(","))
        return text if isinstance(default, str) else type(default)(text)
    except ValueError as error:
        raise InputError(f"{key} must be {_kind(default)}; got '{text}'") from error


def _kind(default: Value) -> str:
    if isinstance(default, tuple):
        return "a list of numbers"
    if isinstance(default, str):
        return "text"
    return "a whole number" if isinstance(default, int) else "a number"


def _from_values(values: Mapping[str, Value]) -> TrainConfig:
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for key, value in values.items():
        head, _, name = key.rpartition(".")
        (sections.setdefault(head, {}) if head else top)[name] = value
    return TrainConfig(
        **top,
        optim=OptimConfig(**sections["optim"]),
        teacher=TeacherConfig(**sections["teacher"]),
        distill=DistillConfig(**sections["distill"]),
        split=SplitConfig(**sections["split"]),
    )
