"""How often the chosen response has the higher reward: overall, by group, and in RewardBench's sections."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mpo_jax.evaluation.statistics import wilson
from mpo_jax.selection import ordered_right

SECTIONS: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
"""The weight of each subset in its section: RewardBench (arXiv:2403.13787), `rewardbench/constants.py` of its code.

A weight is the subset's number of rows, but for math-prm, whose 447 rows weigh as much as the rows about code together.
"""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The share of pairs whose chosen response has the higher reward; a tie counts half.

    Attributes:
      mean: the share, in [0, 1].
      low, high: its 95% Wilson interval. Of weighted rows it is that of as many equal ones as have the same variance.
      rows, ties: their numbers.
      margin: mean of the chosen reward minus the rejected one, with the rows' weights.
    """

    mean: float
    low: float
    high: float
    rows: int
    ties: int
    margin: float

    @classmethod
    def of(cls, margin_B: np.ndarray, weight_B: np.ndarray | None = None) -> "Accuracy":
        """
        Args:
          margin_B: [B] chosen reward minus rejected reward; at least one.
          weight_B: [B] positive weights; None: all alike.
        """
        margin_B = np.asarray(margin_B, np.float64)
        weight_B = np.ones(len(margin_B)) if weight_B is None else np.asarray(weight_B, np.float64)
        share_B = weight_B / weight_B.sum()
        # one division: a hundred of a hundred is 1, and no share exceeds it by rounding
        mean = min(float(ordered_right(margin_B) @ weight_B / weight_B.sum()), 1.0)
        low, high = wilson(mean, 1 / float(share_B @ share_B))
        return cls(mean, low, high, len(margin_B), int((margin_B == 0).sum()), float(margin_B @ share_B))


def length_baseline(pairs: Sequence[Sequence[str]]) -> Accuracy:
    """The accuracy of a reward that is the response's number of characters: the least that a reward model should beat.

    Args:
      pairs: chosen and rejected response of each row; at least one.
    """
    return Accuracy.of(np.asarray([len(chosen) - len(rejected) for chosen, rejected in pairs]))


def unlike(name: str, others: Collection[str | None]) -> str:
    """The name, in brackets where another one is the same: `all` of a table whose groups have one called `all`."""
    while name in others:
        name = f"({name})"
    return name


def by_group(margin_B: np.ndarray, groups: Sequence[str]) -> dict[str, Accuracy]:
    """The accuracy within each group, in the order of their names."""
    names = np.asarray(groups)
    return {str(name): Accuracy.of(margin_B[names == name]) for name in sorted(set(groups))}


@dataclasses.dataclass(frozen=True)
class RewardBench:
    """Accuracy by RewardBench's sections.

    Attributes:
      subsets: by name, of those that rows name, in the benchmark's order.
      sections: by name, those with rows; their subsets weigh as the benchmark weighs them.
      missing: subsets of the benchmark without a row.
      unknown: rows of other subsets, or of none.
      score: the mean of the sections' accuracies, with its 95% interval; None unless all four have rows.
      without_ties: the same mean with a tie as wrong, as the benchmark's own code counts it.
    """

    subsets: dict[str, Accuracy]
    sections: dict[str, Accuracy]
    missing: list[str]
    unknown: int
    score: tuple[float, float, float] | None
    without_ties: float | None

    @classmethod
    def of(cls, margin_B: np.ndarray, subsets: Sequence[str | None]) -> "RewardBench | None":
        """From each row's subset; None if no row names one of the benchmark's."""
        weights = {name: weight for section in SECTIONS.values() for name, weight in section.items()}
        names = np.asarray([subset if subset in weights else "" for subset in subsets])
        rows = {name: np.flatnonzero(names == name) for name in weights}
        found = {name: Accuracy.of(margin_B[places]) for name, places in rows.items() if len(places)}
        if not found:
            return None
        weight_B = np.asarray([weights[name] / len(rows[name]) if name else 0.0 for name in names.tolist()])
        sections = {}
        for section, own in SECTIONS.items():
            places = np.concatenate([rows[name] for name in own])
            if len(places):
                sections[section] = Accuracy.of(margin_B[places], weight_B[places])
        score = without_ties = None
        if len(sections) == len(SECTIONS):
            places = [np.concatenate([rows[name] for name in own]) for own in SECTIONS.values()]
            score = _mean_of([one.mean for one in sections.values()], [weight_B[own] for own in places])
            right_B = np.asarray(margin_B) > 0
            without_ties = float(np.mean([np.average(right_B[own], weights=weight_B[own]) for own in places]))
        missing = [name for name in weights if name not in found]
        return cls(found, sections, missing, int((names == "").sum()), score, without_ties)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        score = None if self.score is None else dict(zip(("mean", "low", "high"), self.score, strict=True))
        return {**dataclasses.asdict(self), "score": score}


def _mean_of(means: Sequence[float], weights: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The mean of several groups' weighted means, all groups alike, with its interval."""
    share_B = np.concatenate([weight_B / weight_B.sum() / len(weights) for weight_B in weights])
    mean = float(np.mean(means))
    return mean, *wilson(mean, 1 / float(share_B @ share_B))
