"""Means with their uncertainty."""

import numpy as np
from scipy.stats import bootstrap


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
