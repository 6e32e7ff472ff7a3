"""Length and repetition beside the reward: what a policy may gain from a reward model without answering better."""

import math
from typing import Any

import numpy as np

from mpo_jax.evaluation.statistics import common_slope, correlation, mean_and_se
from mpo_jax.tools.report.results import REPETITION, RunResult
from mpo_jax.tools.report.seeds import BySeed, Rows, compared_runs, differences, of_run, paired, run_names

LENGTH_NOTE = (
    "Mean over seeds. Correlation: of reward and tokens over a run's answers. Repeated: the share of an answer's "
    "three-word sequences that stand in it before, which rises where a policy repeats itself for its reward."
)
EQUAL_NOTE = (
    "Differences paired by prompt. At equal length: what is left of a difference in reward after that in tokens times "
    "the reward a token, the common slope of the reward against tokens within the runs (analysis of covariance), a "
    "seed's own. A reward model that knew nothing but length would leave nothing. The intervals are over prompts and "
    "seeds as elsewhere, and take the slope as known; answers that were cut off make it a rough one. Empty: each run's "
    "answers have one length, so nothing tells what length alone would give."
)


def length_rows(by_seed: BySeed) -> Rows:
    """A row a run: tokens, their correlation with the reward, and repetition."""
    rows: Rows = []
    for name in run_names(by_seed):
        found = list(of_run(by_seed, name).values())
        row: dict[str, Any] = {"run": name}
        columns = {
            "length": [_mean(result, "length") for result in found],
            "correlation": [_correlation(result) for result in found],
            "repetition": [_mean(result, REPETITION) for result in found],
        }
        for column, values in columns.items():
            known = [value for value in values if not math.isnan(value)]
            row[column] = float(np.mean(known)) if known else None
        rows.append(row)
    return rows


def equal_length_rows(by_seed: BySeed, *, resamples: int) -> Rows:
    """A row a pair of `compared_runs`: its difference in reward, in tokens, and in reward at equal length."""
    slopes = {seed: reward_per_token(results) for seed, results in by_seed.items()}

    def at_equal_length(seed: int, result: RunResult) -> dict[str, float]:
        tokens, reward = (result.measured.values(column) for column in ("length", "score"))
        # a prompt that neither side answers with another length needs no slope
        slope = 0.0 if math.isnan(slopes[seed]) else slopes[seed]
        return {prompt: reward[prompt] - slope * tokens[prompt] for prompt in reward if prompt in tokens}

    rows: Rows = []
    for run, against in compared_runs(by_seed):
        reward, tokens = (differences(by_seed, run, against, column) for column in ("score", "length"))
        left = paired(by_seed, run, against, at_equal_length)
        if reward is None or tokens is None or left is None:
            continue
        row = {"run": run, "against": against, "prompts": reward.num_prompts, "reward": reward.mean}
        row |= {"tokens": tokens.mean, "equal_length": None, "ci_low": None, "ci_high": None}
        # where each run's answers are all of one length, theirs and another, nothing tells what length alone would give
        if not (any(map(math.isnan, slopes.values())) and any(group.any() for group in tokens.groups)):
            mean, low, high, _ = left.interval(resamples=resamples)
            row["equal_length"] = mean
            # a single prompt has no interval
            if math.isfinite(low):
                row |= {"ci_low": low, "ci_high": high}
        rows.append(row)
    return rows


def reward_per_token(results: list[RunResult]) -> float:
    """The common slope of reward against tokens within the runs of a seed; NaN where each has answers of one length."""
    parts = [(result.measured.columns.get("length"), result.measured.columns.get("score")) for result in results]
    known = [(x[ok], y[ok]) for x, y in parts if x is not None and y is not None and (ok := np.isfinite(x * y)).any()]
    return common_slope(known)


def _mean(result: RunResult, column: str) -> float:
    values = list(result.measured.values(column).values())
    return mean_and_se(np.asarray(values))[0] if values else math.nan


def _correlation(result: RunResult) -> float:
    """NaN where reward or tokens are the same for all prompts."""
    tokens, reward = (result.measured.values(column) for column in ("length", "score"))
    both = [prompt for prompt in tokens if prompt in reward]
    return correlation(*(np.asarray([values[prompt] for prompt in both]) for values in (tokens, reward)))
