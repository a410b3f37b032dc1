"""The five claims: by which networks each is tested, and under which conditions."""

from __future__ import annotations

from dataclasses import replace

from .claim import Arm, Claim, Comparison, accuracy, branches
from .lab import FOLDS, Recipe
from .study import Condition
from .training import Eq9

USUAL = Condition("usual study")
CONDITIONS = (
    USUAL,
    replace(USUAL, name="clean labels", label_noise=0.0),
    replace(USUAL, name="many wrong labels", label_noise=0.3),
    replace(USUAL, name="small study", train_trials=80, val_trials=30),
    replace(USUAL, name="large study", train_trials=720, val_trials=120),
    replace(USUAL, name="weak signals", video_strength=1.1, eeg_strength=1.5),
    replace(USUAL, name="equal strengths", video_strength=1.65, eeg_strength=1.65),
    replace(USUAL, name="video stronger", video_strength=1.9, eeg_strength=1.4),
    replace(USUAL, name="wide inputs", video_dims=64, eeg_dims=64),
    replace(USUAL, name="wide features", feature_dims=512),
)


VIDEO, EEG = Recipe(sees=("video",)), Recipe(sees=("eeg",))
PLAIN = Recipe()
TEACHER = Recipe(prototypes="dataset")
CONTROL = "no distillation"


def chain(strategy: str) -> tuple[Recipe, ...]:
    """Teacher and two assistants, each taught by all before it."""
    # Of one source nothing is drawn, unless it may be dropped.
    first = Eq9(strategy if strategy == "bernoulli_sum" else "all")
    assistant = Recipe(level=1, sources=(TEACHER,), guidance=first)
    both = (TEACHER, assistant)
    return (*both, Recipe(level=2, sources=both, guidance=Eq9(strategy)))


DENSE = chain("subset")


def student(sources: tuple[Recipe, ...], guidance: Eq9 | None = None, folds: int = 0) -> Recipe:
    """A student of these sources."""
    return replace(VIDEO, sources=sources, guidance=guidance or Eq9(), folds=folds)


def _rebalancing() -> Claim:
    def weaker(title: str, ours: str, theirs: str, expects: str = "higher") -> Comparison:
        return Comparison(title, (ours,), (theirs,), expects, "weaker")

    step, epoch = "rebalanced, weights by step", "rebalanced, weights by epoch"
    batch = "rebalanced, batch means"
    return Claim(
        "rebalancing",
        "The stronger modality holds the weaker one back, and rebalancing lifts it",
        "The paper: in plain fusion the modality that learns faster suppresses the other; a "
        "prototype loss on the slower one, weighted by Eqs. 4-6, mends that and harms no fusion.",
        "A least-squares probe on each frozen branch, fitted to the labels of training and asked "
        "about true ones: what the branch is worth by itself. Where the modalities are equally "
        "strong, the mean of both.",
        (
            Arm("each branch alone", (VIDEO, EEG)),
            Arm("plain fusion", (PLAIN,)),
            Arm(step, (TEACHER,)),
            Arm(epoch, (Recipe(prototypes="dataset", weights="epoch"),)),
            Arm(batch, (Recipe(prototypes="batch"),)),
        ),
        "plain fusion",
        (
            weaker(
                "plain fusion leaves the weaker branch worse than alone",
                *("plain fusion", "each branch alone", "lower"),
            ),
            weaker("rebalancing (the paper's) lifts the weaker branch", step, "plain fusion"),
            weaker("weights by epoch lift the weaker branch", epoch, "plain fusion"),
            weaker("batch means lift the weaker branch", batch, "plain fusion"),
            Comparison(
                "rebalancing does no harm to fusion", (step,), ("plain fusion",), "not lower"
            ),
            Comparison("rebalancing helps fusion", (step,), ("plain fusion",)),
            Comparison(
                "batch means weaken rebalancing (smaller lambda)",
                (batch,),
                (step,),
                "lower",
                "lambda",
            ),
        ),
        (
            *("usual study", "clean labels", "equal strengths", "video stronger"),
            *("wide inputs", "wide features"),
        ),
        branches,
        "weaker",
    )


def _guidance() -> Claim:
    kd, takd, cdgkd = "KD", "TAKD", "CDGKD"
    first = chain("all")[1]
    second = Recipe(level=2, sources=(first,), guidance=Eq9("all"))
    return Claim(
        "guidance",
        "Assistants and dense guidance make a better student",
        "The paper: a student that learns from the teacher and all assistants at once is better "
        "than one taught by the teacher alone (KD), by the last assistant alone (TAKD) or by none.",
        "Students that see video alone, from equal weights and in equal batches, at the paper's "
        "settings (Eq. 9 with weight 0.5, T 2, reverse KL).",
        (
            Arm(CONTROL, (VIDEO,)),
            Arm(kd, (student((TEACHER,), Eq9("all")),)),
            Arm(takd, (student((second,), Eq9("all")),)),
            Arm(cdgkd, (student(DENSE),)),
        ),
        CONTROL,
        (
            Comparison("KD helps", (kd,), (CONTROL,)),
            Comparison("TAKD helps", (takd,), (CONTROL,)),
            Comparison("CDGKD helps", (cdgkd,), (CONTROL,)),
            Comparison("CDGKD is better than KD", (cdgkd,), (kd,)),
            Comparison("CDGKD is better than TAKD", (cdgkd,), (takd,)),
        ),
        tuple(c.name for c in CONDITIONS if c.name != "wide features"),
        accuracy,
    )


def _sources() -> Claim:
    strategies = {
        "random subset": "subset",
        "all sources": "all",
        "drop one": "drop_one",
        "Bernoulli sum": "bernoulli_sum",
    }
    arms = [Arm(n, (student(chain(s), Eq9(s)),)) for n, s in strategies.items()]
    ours, *others = strategies
    return Claim(
        "sources",
        "Drawing the sources at random is better than using all",
        "The paper: a random subset of the sources in every step keeps the student from leaning on "
        "one of them. DGKD drops one source; the authors' code sums over those that a coin keeps.",
        "The whole chain (assistants and student) trained with each way of drawing.",
        (Arm(CONTROL, (VIDEO,)), *arms),
        CONTROL,
        tuple(
            Comparison(f"random subset is better than {name}", (ours,), (name,)) for name in others
        ),
        tuple(condition.name for condition in CONDITIONS[:6]),
        accuracy,
    )


DIRECTIONS, TEMPERATURES, KD_WEIGHTS = ("reverse", "forward"), (1.0, 2.0, 4.0), (0.3, 0.5, 0.7, 0.9)


def loss_arm(direction: str, temperature: float, kd_weight: float) -> str:
    """Name of an arm of the settings of Eq. 9."""
    return f"{direction} KL, T {temperature:g}, weight {kd_weight:g}"


def _settings() -> Claim:
    grid = [(d, t, w) for d in DIRECTIONS for t in TEMPERATURES for w in KD_WEIGHTS]

    def chosen(value: object) -> tuple[str, ...]:  # no value belongs to two settings
        return tuple(loss_arm(*one) for one in grid if value in one)

    def compare(title: str, ours: object, theirs: object) -> Comparison:
        return Comparison(title, chosen(ours), chosen(theirs), "either")

    return Claim(
        "settings",
        "Direction, temperature and weight of the KL term",
        "Nothing is claimed: the paper prints reverse KL (student || source), the field uses "
        "forward KL (source || student); the paper gives no T.",
        "The student of CDGKD under every combination, its sources unchanged. Comparisons are of "
        "the means over all other settings.",
        (
            Arm(CONTROL, (VIDEO,)),
            *(
                Arm(loss_arm(d, t, w), (student(DENSE, Eq9("subset", d, t, w)),))
                for d, t, w in grid
            ),
        ),
        CONTROL,
        (
            compare("forward KL against reverse KL", "forward", "reverse"),
            compare("T 1 against T 2", 1.0, 2.0),
            compare("T 4 against T 2", 4.0, 2.0),
            compare("weight 0.9 against 0.5", 0.9, 0.5),
        ),
        ("usual study", "clean labels", "many wrong labels"),
        accuracy,
    )


def _folds() -> Claim:
    variants = [(d, w) for d in DIRECTIONS for w in (0.5, 0.9)]
    arms, comparisons = [Arm(CONTROL, (VIDEO,))], []
    for direction, weight in variants:
        setting = f"{direction} KL, weight {weight:g}"
        names = (f"in-sample, {setting}", f"out-of-fold, {setting}")
        for name, folds in zip(names, (0, FOLDS), strict=True):
            guidance = Eq9("subset", direction, 2.0, weight)
            arms.append(Arm(name, (student(DENSE, guidance, folds),)))
        title = f"out-of-fold guidance is better ({setting})"
        comparisons.append(Comparison(title, names[1:], names[:1]))
    return Claim(
        "folds",
        "Sources should not have trained on what they teach",
        "Not the paper's: a source that has seen a sample's label repeats that label, right or "
        "wrong; one that has not seen it says what it thinks.",
        f"Teacher and assistants trained {FOLDS} times, each time without the trials that they "
        "then teach (by the trial, with all its samples), against sources trained on everything. "
        f"The former learn from {FOLDS - 1}/{FOLDS} of the trials, which counts against them.",
        tuple(arms),
        CONTROL,
        tuple(comparisons),
        ("usual study", "clean labels", "many wrong labels", "small study", "wide inputs"),
        accuracy,
    )


CLAIMS = (_rebalancing(), _guidance(), _sources(), _settings(), _folds())
