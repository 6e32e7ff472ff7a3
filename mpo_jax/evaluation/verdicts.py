"""Win, tie and lose with their uncertainty, and agreement between raters."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from mpo_jax.errors import UserError

Outcome = Literal["win", "tie", "lose"]
"""Of A against B."""

OUTCOMES: tuple[Outcome, ...] = ("win", "tie", "lose")

Z = 1.959963984540054
"""The 97.5% quantile of the normal distribution."""

BANDS = ((0.2, "slight"), (0.4, "fair"), (0.6, "moderate"), (0.8, "substantial"), (1.0, "almost perfect"))
"""Upper ends of the bands of kappas from 0 up, with their words; below 0 agreement is poor. Landis and Koch (1977), The
measurement of observer agreement for categorical data."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of items with its 95% Wilson interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def rate(count: float, total: int) -> Rate | None:
    """count / total with its 95% Wilson score interval (Wilson 1927), for independent items; None if total is 0.

    Args:
      count: a tie may count as half.
    """
    if total == 0:
        return None
    share = count / total
    centre = (2 * count + Z**2) / (2 * (total + Z**2))
    half = Z * math.sqrt(4 * total * share * (1 - share) + Z**2) / (2 * (total + Z**2))
    # exactly 0 and 1 at the ends, which rounding would miss
    return Rate(share, 0.0 if count == 0 else centre - half, 1.0 if count == total else centre + half)


@dataclasses.dataclass(frozen=True)
class Tally:
    """How often A won, tied and lost against B; items without a verdict are counted apart and in no rate."""

    win: int
    tie: int
    lose: int
    without: int = 0

    @classmethod
    def of(cls, outcomes: Iterable[Outcome | None]) -> "Tally":
        """Counts; None is an item without a verdict."""
        found = list(outcomes)
        return cls(*(found.count(name) for name in OUTCOMES), without=found.count(None))

    @property
    def decided(self) -> int:
        return self.win + self.tie + self.lose

    def rates(self) -> dict[Outcome, Rate | None]:
        return {name: rate(getattr(self, name), self.decided) for name in OUTCOMES}

    def to_dict(self) -> dict[str, Any]:
        """Counts, and each rate with its interval; null if there are no verdicts."""
        rates = {name: found and dataclasses.asdict(found) for name, found in self.rates().items()}
        return {**dataclasses.asdict(self), "rates": rates}


def compare(a: float, b: float) -> Outcome:
    """Win, tie or lose by >, =, <."""
    return "win" if a > b else "lose" if a < b else "tie"


def by_category(categories: Sequence[str | None], outcomes: Sequence[Outcome | None]) -> dict[str, Tally]:
    """A tally of each category, by name; empty if all items are of one category, or of none."""
    kinds = set(categories)
    if len(kinds) < 2:
        return {}
    names = sorted(category for category in kinds if category is not None)
    return {name: Tally.of(o for c, o in zip(categories, outcomes, strict=True) if c == name) for name in names}


def plurality(votes: Sequence[Outcome]) -> Outcome:
    """The outcome with the most votes; a tie if several have as many."""
    counts = [votes.count(name) for name in OUTCOMES]
    most = max(counts)
    return OUTCOMES[counts.index(most)] if counts.count(most) == 1 else "tie"


@dataclasses.dataclass(frozen=True)
class Kappa:
    """Fleiss' kappa, its 95% percentile bootstrap interval over items, and its band after Landis and Koch."""

    value: float
    low: float
    high: float
    band: str

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], {self.band}"


def fleiss_kappa(votes_IC: np.ndarray, *, resamples: int, seed: int) -> Kappa:
    """(P - Pe) / (1 - Pe): agreement of raters beyond chance. Fleiss (1971), Measuring nominal scale agreement.

    If every vote is for one category, agreement is complete, and kappa, 0/0 by the equation, is 1.

    Args:
      votes_IC: how many raters put each item into each category; each row sums to the number of raters, 2 or more.
      resamples: of items, with replacement.
      seed: of the resampling.

    Raises:
      UserError: where statsmodels is not installed.
    """
    try:
        from statsmodels.stats import inter_rater
    except ImportError as error:
        raise UserError(
            "Fleiss' kappa needs the package statsmodels, which is not installed: pip install statsmodels "
            "(or: bash launch/setup.sh judge)"
        ) from error

    def kappa(table_IC: np.ndarray) -> float:
        if np.count_nonzero(table_IC.sum(0)) == 1:
            return 1.0
        return float(inter_rater.fleiss_kappa(table_IC, method="fleiss"))

    value, rng, items = kappa(votes_IC), np.random.default_rng(seed), len(votes_IC)
    drawn = [kappa(votes_IC[rng.integers(items, size=items)]) for _ in range(resamples)]
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    return Kappa(value, low, high, band(value))


def band(kappa: float) -> str:
    """The words of Landis and Koch for a kappa."""
    # the largest kappa may exceed 1 by a rounding error
    return "poor" if kappa < 0 else next(word for top, word in BANDS if kappa <= top or top == 1.0)
