"""What a claim is: ways to train, what is compared, and what is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from .lab import Recipe


class AnyCondition(Protocol):
    """What a claim must know of a kind of study; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """In words."""

    @property
    def weaker(self) -> tuple[str, ...]:
        """The modality of less strength; both where they are equal."""

    @property
    def stronger(self) -> tuple[str, ...]:
        """The modality of more strength; both where they are equal."""


class AnyLab(Protocol):
    """What trains recipes on one study, each once: ``Lab`` or ``RecordedLab``."""

    @property
    def condition(self) -> AnyCondition:
        """Of the study."""

    @property
    def trainings(self) -> int:
        """How many networks were trained."""

    def measure(self, recipe: Recipe) -> dict[str, float]:
        """A network's test accuracy on true labels, and what its branches are worth."""

    def ground(self) -> dict[str, float]:
        """How hard the study is, whatever is trained on it."""


@dataclass(frozen=True)
class Arm:
    """One way to train; several recipes where each modality has a network of its own."""

    name: str
    recipes: tuple[Recipe, ...]


@dataclass(frozen=True)
class Comparison:
    """Mean over arms ``ours`` minus mean over arms ``theirs``, paired over seeds.

    expects: what the claim says of the difference: "higher", "lower", "not lower" (by more than
    the margin of ``verdicts``), or "either" where nothing is claimed.
    """

    title: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    expects: str = "higher"
    metric: str = "accuracy"


@dataclass(frozen=True)
class Claim:
    """A claim and its test.

    says: what is claimed, and by whom. tested: what was compared. reference: the arm beside which
    all others are shown, in ``metric``. measure: numbers of an arm from a lab. conditions: names.
    """

    key: str
    title: str
    says: str
    tested: str
    arms: tuple[Arm, ...]
    reference: str
    comparisons: tuple[Comparison, ...]
    conditions: tuple[str, ...]
    measure: Callable[[AnyLab, Arm], dict[str, float]]
    metric: str = "accuracy"


def accuracy(lab: AnyLab, arm: Arm) -> dict[str, float]:
    """Test accuracy on true labels."""
    return {"accuracy": lab.measure(arm.recipes[0])["accuracy"]}


def branches(lab: AnyLab, arm: Arm) -> dict[str, float]:
    """Accuracy of fusion and of probes on the frozen branches, the weaker and the stronger one.

    lambda: mean over the steps of the one weight that is not 0. Both branches' mean is given twice
    where the modalities are equally strong.
    """
    found: dict[str, float] = {}
    for recipe in arm.recipes:
        found |= lab.measure(recipe)
    condition = lab.condition
    values = {} if len(arm.recipes) > 1 else {"accuracy": found["accuracy"]}
    for side, names in (("weaker", condition.weaker), ("stronger", condition.stronger)):
        for probe, metric in (("probe", side), ("nearest", f"{side}_nearest")):
            values[metric] = sum(found[f"{probe}_{name}"] for name in names) / len(names)
    if "lambda_video" in found:
        values["lambda"] = found["lambda_video"] + found["lambda_eeg"]
    return values
