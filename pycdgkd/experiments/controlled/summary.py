"""From finished jobs to the numbers of controlled.json: means, paired differences, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pycdgkd.experiments.statistics import Difference, holm, paired_difference

from .claim import Claim, Comparison
from .verdicts import allowance, verdict

Jobs = Mapping[tuple[str, int], Mapping[str, Any]]


def summarise(
    claims: Sequence[Claim], conditions: Sequence[str], seeds: Sequence[int], jobs: Jobs
) -> dict[str, Any]:
    """Entries "ground" and "claims" of the results; jobs: one for each condition and seed."""
    ground = {
        name: {
            figure: mean_and_error([jobs[name, seed]["ground"][figure] for seed in seeds])
            for figure in jobs[name, seeds[0]]["ground"]
        }
        for name in conditions
    }
    tables = [_Table(claim, conditions, seeds, jobs) for claim in claims]
    return {"ground": ground, "claims": [table.summary() for table in tables if table.conditions]}


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error of the mean (0 for one value) and the values."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "error": error, "values": list(values)}


class _Table:
    """One claim's numbers by condition, arm, metric and seed."""

    def __init__(
        self, claim: Claim, conditions: Sequence[str], seeds: Sequence[int], jobs: Jobs
    ) -> None:
        self.claim = claim
        self.conditions = [name for name in conditions if name in claim.conditions]
        self.cells = {
            name: [jobs[name, seed]["values"][claim.key] for seed in seeds]
            for name in self.conditions
        }

    def values(self, condition: str, arms: Sequence[str], metric: str) -> list[float]:
        """The mean over arms, seed by seed."""
        rows = self.cells[condition]
        return [float(np.mean([row[arm][metric] for arm in arms])) for row in rows]

    def summary(self) -> dict[str, Any]:
        """The claim with what came out."""
        claim = self.claim
        others = [arm.name for arm in claim.arms if arm.name != claim.reference]
        beside = [
            Comparison(name, (name,), (claim.reference,), "either", claim.metric) for name in others
        ]
        return {
            "key": claim.key,
            "title": claim.title,
            "says": claim.says,
            "tested": claim.tested,
            "conditions": self.conditions,
            "reference": claim.reference,
            "metric": claim.metric,
            "arms": {name: self._arms(name) for name in self.conditions},
            "comparisons": self._compared(claim.comparisons),
            "beside_reference": self._compared(beside),
        }

    def _arms(self, condition: str) -> dict[str, Any]:
        return {
            arm.name: {
                metric: mean_and_error(self.values(condition, [arm.name], metric))
                for metric in self.cells[condition][0][arm.name]
            }
            for arm in self.claim.arms
        }

    def _compared(self, comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
        """Each comparison under each condition; Holm's family is all of them."""
        pairs = [(one, name) for one in comparisons for name in self.conditions]
        found = [self._difference(*pair) for pair in pairs]
        corrected = holm([difference.p for difference in found])
        outcome = dict(zip(pairs, zip(found, corrected, strict=True), strict=True))
        return [
            {
                "title": one.title,
                "expects": one.expects,
                "metric": one.metric,
                "by_condition": {
                    name: _entry(*outcome[one, name], one.expects) for name in self.conditions
                },
            }
            for one in comparisons
        ]

    def _difference(self, comparison: Comparison, condition: str) -> Difference:
        ours, theirs = (
            self.values(condition, arms, comparison.metric)
            for arms in (comparison.ours, comparison.theirs)
        )
        allowed = allowance(comparison.expects)  # "not lower": better than theirs minus a point
        found = paired_difference([value + allowed for value in ours], theirs)
        shift = dict(zip(("mean", "low", "high"), (v - allowed for v in found[:3]), strict=True))
        return found._replace(**shift)


def _entry(difference: Difference, p: float, expects: str) -> dict[str, Any]:
    entry: dict[str, Any] = difference._asdict()
    return {**entry, "p_holm": p, "verdict": verdict(difference, p, expects)}
