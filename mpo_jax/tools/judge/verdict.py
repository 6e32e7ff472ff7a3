"""From a judge's totals to win, tie and lose."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mpo_jax.evaluation.answers import Pair
from mpo_jax.evaluation.statistics import common_slope, correlation, mean_and_se, paired_difference
from mpo_jax.evaluation.verdicts import Outcome, Rate, Tally, by_category, compare, rate
from mpo_jax.tools.judge.calls import Call, Failure, Reply
from mpo_jax.tools.judge.parse import parse_totals


@dataclasses.dataclass(frozen=True)
class Grade:
    """The result of one call.

    Attributes:
      swapped: whether A was response 2.
      totals: of A and of B, in this order; None if there are none.
      status: "unparsed": an answer without totals; "failed": no answer.
      text: the answer, or the reason why there is none.
    """

    swapped: bool
    totals: tuple[float, float] | None
    status: Literal["ok", "unparsed", "failed"] = "ok"
    text: str = ""


def grade(call: Call, outcome: Reply | Failure) -> Grade:
    """Grades an answer."""
    if isinstance(outcome, Failure):
        return Grade(call.swapped, None, "failed", outcome.reason)
    found = parse_totals(outcome.text)
    if found is None:
        return Grade(call.swapped, None, "unparsed", outcome.text)
    first, second = found
    return Grade(call.swapped, (second, first) if call.swapped else found, "ok", outcome.text)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A pair with its grades, one an order.

    Attributes:
      tokens: of A and of B as the judge read them; None where it read text, whose words count instead.
    """

    pair: Pair
    grades: tuple[Grade, ...]
    tokens: tuple[int, int] | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        """Of A and of B, in tokens if they are known, else in words."""
        return self.tokens or (len(self.pair.a.split()), len(self.pair.b.split()))

    @property
    def totals(self) -> tuple[float, float] | None:
        """A's and B's totals, averaged over the orders; None unless every order has both.

        One order alone would count the judge's position bias as a preference for a side.
        """
        found = [grade.totals for grade in self.grades if grade.totals is not None]
        if len(found) < len(self.grades):
            return None
        a, b = np.mean(np.asarray(found, np.float64), 0).tolist()
        return a, b

    @property
    def outcome(self) -> Outcome | None:
        return None if self.totals is None else compare(*self.totals)

    @property
    def status(self) -> Literal["ok", "unparsed", "failed"]:
        statuses = [grade.status for grade in self.grades]
        return "failed" if "failed" in statuses else "unparsed" if "unparsed" in statuses else "ok"

    def to_dict(self) -> dict[str, Any]:
        a, b = self.totals or (None, None)
        grades = [dataclasses.asdict(grade) for grade in self.grades]
        row = dataclasses.asdict(self.pair)
        return {**row, "outcome": self.outcome, "status": self.status, "total_a": a, "total_b": b, "grades": grades}


@dataclasses.dataclass(frozen=True)
class Places:
    """A judge's position bias.

    Attributes:
      agree: of the pairs with a verdict, the share in which both orders give one outcome.
      first: of parsed calls, how often response 1 has the higher total.
      equal: how often both have the same.
      second: how often response 2 has the higher total.
    """

    agree: Rate | None
    first: int
    equal: int
    second: int


def places(judged: Sequence[Judged]) -> Places:
    """Position consistency of pairs that were judged in both orders."""
    decided = [one for one in judged if one.outcome is not None]
    same = sum(len({compare(*g.totals) for g in one.grades if g.totals is not None}) == 1 for one in decided)
    parsed = [g.totals[::-1] if g.swapped else g.totals for one in judged for g in one.grades if g.totals is not None]
    tally = Tally.of(compare(*totals) for totals in parsed)
    return Places(rate(same, len(decided)), tally.win, tally.tie, tally.lose)


def summary(judged: Sequence[Judged], *, resamples: int, seed: int) -> dict[str, Any]:
    """Counts and rates with intervals, in all and by category; totals' means; differences paired by prompt.

    At equal length: what is left of the difference in totals after that in length times `common_slope`, since judges
    too like long answers; nothing where all of a side's answers have one length, and the other's another.
    """
    outcomes: list[Outcome | None] = [one.outcome for one in judged]
    statuses = [one.status for one in judged]
    result: dict[str, Any] = {
        "prompts": len(judged),
        "verdict": Tally.of(outcomes).to_dict(),
        "unparsed": statuses.count("unparsed"),
        "failed": statuses.count("failed"),
    }
    categories: Mapping[str, Tally] = by_category([one.pair.category for one in judged], outcomes)
    if categories:
        result["by_category"] = {name: tally.to_dict() for name, tally in categories.items()}
    grades = [grade.status for one in judged for grade in one.grades]
    result["calls"] = {name: grades.count(name) for name in ("ok", "unparsed", "failed")}
    totals = np.asarray([one.totals for one in judged if one.totals is not None], np.float64)
    if len(totals):
        for side, column in (("a", totals[:, 0]), ("b", totals[:, 1])):
            result[f"total_{side}"], result[f"total_{side}_se"] = mean_and_se(column)
        result["difference"] = paired_difference(totals[:, 0], totals[:, 1], resamples=resamples, seed=seed)
        result |= _by_length([one for one in judged if one.totals is not None], totals, resamples=resamples, seed=seed)
    if any(len(one.grades) > 1 for one in judged):
        result["places"] = dataclasses.asdict(places(judged))
    return result


def _by_length(judged: Sequence[Judged], totals: np.ndarray, *, resamples: int, seed: int) -> dict[str, Any]:
    """Lengths, how totals go with them, and the difference at equal length; null where nothing tells."""
    lengths = np.asarray([one.lengths for one in judged], np.float64)
    slope = common_slope(zip(lengths.T, totals.T, strict=True))
    known = not math.isnan(slope)
    result: dict[str, Any] = {
        "length_in": "words" if any(one.tokens is None for one in judged) else "tokens",
        "total_per_length": slope if known else None,
        "difference_at_equal_length": None,
    }
    for side, x, y in zip("ab", lengths.T, totals.T, strict=True):
        found = correlation(x, y)
        result[f"length_{side}"] = float(x.mean())
        result[f"correlation_{side}"] = None if math.isnan(found) else found
    if known or not np.ptp(lengths, axis=1).any():
        left = totals - slope * lengths if known else totals
        result["difference_at_equal_length"] = paired_difference(left[:, 0], left[:, 1], resamples=resamples, seed=seed)
    return result
