"""The claims as recordings test them: fewer arms and conditions, the same recipes."""

from __future__ import annotations

from dataclasses import replace

from pycdgkd.data.config import PrepareConfig, StudyConfig
from pycdgkd.experiments.controlled import claims as drawn
from pycdgkd.experiments.controlled.claim import Arm, Claim, Comparison, accuracy
from pycdgkd.experiments.controlled.claims import CONTROL, DENSE, VIDEO, loss_arm, student
from pycdgkd.experiments.controlled.lab import FOLDS
from pycdgkd.experiments.controlled.training import Eq9
from pycdgkd.training.config import OptimConfig, preset_config

from .study import LABEL, RecordedCondition

USUAL = RecordedCondition(
    "usual study",
    StudyConfig(
        subjects=5,
        trials=99,
        trial_seconds=2.0,
        video_strength=0.8,
        eeg_strength=2.0,
        label_noise=0.1,
        subject_effect=0.5,
        width=128,
        height=128,
        fps=4,
        hold=2,
        fixation=0.2,
    ),
    PrepareConfig(
        window=2.0,
        stride=2.0,
        trial_seconds=2.0,
        fps=4.0,
        frame_stride=2,
        img_size=48,
        margin=0.0,
        min_face=40,
        labels=LABEL,
    ),
    (0.4, 0.15, 0.45),
)
NOISY = replace(USUAL, name="many wrong labels", study=replace(USUAL.study, label_noise=0.2))
CONDITIONS = (USUAL, NOISY)
# The preset's networks. Epochs are short here (13 steps), and video sits at chance for the first
# ones: patience that ran out before it learned would compare networks that never did.
TRAINING = replace(
    preset_config("nano"),
    label=LABEL,
    threads=1,
    device="cpu",
    optim=OptimConfig(epochs=16, batch_size=16, lr=7e-4, warmup=60, patience=16),
)


def smaller(condition: RecordedCondition, subjects: int, trials: int) -> RecordedCondition:
    """The same with fewer trials, for checks."""
    return replace(condition, study=replace(condition.study, subjects=subjects, trials=trials))


QUICK_CONDITIONS = tuple(smaller(condition, 3, 20) for condition in CONDITIONS)
QUICK_TRAINING = replace(TRAINING, optim=replace(TRAINING.optim, epochs=2))


def _fewer(
    key: str, conditions: tuple[str, ...], arms: tuple[str, ...] = (), tested: str = ""
) -> Claim:
    """A claim about features, asked of recordings with some of its arms (all by default)."""
    claim = next(claim for claim in drawn.CLAIMS if claim.key == key)
    kept = tuple(arm for arm in claim.arms if not arms or arm.name in arms)
    names = {arm.name for arm in kept}
    comparisons = tuple(c for c in claim.comparisons if {*c.ours, *c.theirs} <= names)
    tested = tested or claim.tested
    return replace(claim, arms=kept, comparisons=comparisons, conditions=conditions, tested=tested)


def _settings() -> Claim:
    """Without the temperature, and with weights 0.5 and 0.9 alone."""
    grid = {loss_arm(d, 2.0, w): (d, w) for d in drawn.DIRECTIONS for w in (0.5, 0.9)}
    arms = (Arm(name, (student(DENSE, Eq9("subset", d, 2.0, w)),)) for name, (d, w) in grid.items())

    def chosen(value: object) -> tuple[str, ...]:
        return tuple(name for name, values in grid.items() if value in values)

    return Claim(
        "direction",
        "Direction and weight of the KL term",
        "Nothing is claimed: the paper prints reverse KL (student || source), the field uses "
        "forward KL (source || student).",
        "The student of CDGKD at T 2 under every combination, its sources unchanged. Comparisons "
        "are of the means over the other setting.",
        (Arm(CONTROL, (VIDEO,)), *arms),
        CONTROL,
        (
            Comparison(
                *("forward KL against reverse KL", chosen("forward"), chosen("reverse"), "either")
            ),
            Comparison(*("weight 0.9 against 0.5", chosen(0.9), chosen(0.5), "either")),
        ),
        (NOISY.name,),
        accuracy,
    )


CLAIMS = (
    _fewer(
        "rebalancing",
        (USUAL.name,),
        ("each branch alone", "plain fusion", "rebalanced, weights by step"),
        tested="A least-squares probe on each frozen branch, fitted to the labels of training and "
        "asked about true ones: what the branch is worth by itself.",
    ),
    _fewer("guidance", (USUAL.name, NOISY.name)),
    _fewer("sources", (USUAL.name,), (CONTROL, "random subset", "all sources")),
    _settings(),
    _fewer(
        "folds",
        (NOISY.name,),
        (
            CONTROL,
            "in-sample, forward KL, weight 0.9",
            "out-of-fold, forward KL, weight 0.9",
        ),
        tested=f"The settings of the method cdgkd-noisy. Teacher and assistants trained {FOLDS} "
        "times, each time without the trials that they then teach, against sources trained on "
        f"everything. The former learn from {FOLDS - 1}/{FOLDS} of the trials, which counts "
        "against them.",
    ),
)
