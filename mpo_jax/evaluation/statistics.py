"""Means with their uncertainty, and tests of differences over prompts and seeds."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import bootstrap

Verdict = Literal["supported", "contradicted", "undecided"]
LEVEL = 0.05
"""The family-wise error rate of a table's claims."""


def mean_and_se(x_N: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of the mean; the error is 0 for a single value."""
    x_N = np.asarray(x_N, np.float64)
    return float(x_N.mean()), float(x_N.std(ddof=1) / np.sqrt(len(x_N))) if len(x_N) > 1 else 0.0


def paired_difference(a_N: np.ndarray, b_N: np.ndarray, *, resamples: int, seed: int) -> dict[str, float]:
    """Mean of a - b over the same prompts, its standard error, and a 95% percentile bootstrap interval over prompts."""
    difference_N = np.asarray(a_N, np.float64) - np.asarray(b_N, np.float64)
    mean, se = mean_and_se(difference_N)
    low = high = mean
    if len(difference_N) > 1 and difference_N.std() > 0:
        interval = bootstrap(
            (difference_N,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"mean": mean, "se": se, "low": low, "high": high}


def resampled_means(groups: Sequence[np.ndarray], *, resamples: int, seed: int) -> np.ndarray:
    """[R] means of a hierarchical bootstrap: groups with replacement, then values with replacement within each.

    A resample's mean is the mean of its groups' means, so that every group weighs alike whatever its size; so does the
    plain mean that they scatter around. With one group only its values are resampled.

    Args:
      groups: the values of each seed, a paired difference a prompt.
    """
    rng = np.random.default_rng(seed)
    chosen_RG = rng.integers(len(groups), size=(resamples, len(groups)))
    mean_RG = np.empty(chosen_RG.shape)
    for number, values in enumerate(groups):
        x_N = np.asarray(values, np.float64)
        where = np.nonzero(chosen_RG == number)
        drawn = np.empty(len(where[0]))
        # in portions, since all draws at once would be resamples x prompts indices
        portion = max(1, 4_000_000 // len(x_N))
        for begin in range(0, len(drawn), portion):
            rows = len(drawn[begin : begin + portion])
            drawn[begin : begin + portion] = x_N[rng.integers(len(x_N), size=(rows, len(x_N)))].mean(1)
        mean_RG[where] = drawn
    return mean_RG.mean(1)


def bootstrap_p(mean_R: np.ndarray) -> float:
    """Two-sided p-value of a mean difference of 0: twice the smaller share of resamples beyond 0, never below 2/(R+1).

    It is below 0.05 where the 95% percentile interval leaves out 0.
    """
    beyond = min(int((mean_R <= 0).sum()), int((mean_R >= 0).sum()))
    return min(1.0, 2.0 * (1 + beyond) / (len(mean_R) + 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of one family of tests, in the order given. Scandinavian J. of Statistics 6 (1979)."""
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted


def verdict(mean: float, adjusted_p: float) -> Verdict:
    """What data say of "the difference is positive": decided by its sign where the adjusted p-value is below LEVEL."""
    if adjusted_p >= LEVEL or mean == 0:
        return "undecided"
    return "supported" if mean > 0 else "contradicted"
