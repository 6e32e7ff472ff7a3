"""Results over seeds: one row a run, with the uncertainty of repeating everything with another seed."""

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mpo_jax.errors import UserError
from mpo_jax.evaluation.statistics import mean_and_se, resampled_means
from mpo_jax.experiments import in_order
from mpo_jax.report.results import COLUMNS, RunResult, collect, difference_rows, main_rows, paired

BySeed: TypeAlias = dict[int, list[RunResult]]
Rows: TypeAlias = list[dict[str, Any]]


def collect_seeds(workdir: Path) -> BySeed:
    """The finished runs of a table's seeds (`<workdir>/seed-N`), or of a single workdir under its seed.

    Raises:
      UserError: if there is no finished run.
    """
    numbers = [folder.name.removeprefix("seed-") for folder in workdir.glob("seed-*")]
    by_seed: BySeed = {}
    for seed in sorted(int(number) for number in numbers if number.isdigit()):
        try:
            by_seed[seed] = collect(workdir / f"seed-{seed}")
        except UserError:
            # a seed whose first run is still being made
            continue
    if by_seed:
        return by_seed
    results = collect(workdir)
    return {results[0].config.seed: results}


def run_names(by_seed: BySeed) -> list[str]:
    """The runs that any seed has, in the order of the tables."""
    return in_order({result.name for results in by_seed.values() for result in results})


def of_run(by_seed: BySeed, name: str) -> dict[int, RunResult]:
    """A run's results by the seeds that have it."""
    return {seed: result for seed, results in by_seed.items() for result in results if result.name == name}


def over_seeds(by_seed: BySeed) -> Rows:
    """A row a run: the mean over seeds of each column's mean, and its standard errors.

    `<column>_se` is over seeds, which takes in what another draw of prompts, labels and initial weights changes where
    the seeds differ in them; with one seed it is over prompts, and `error_over` says so. `<column>_se_prompts` is over
    the prompts of the seeds at hand alone.
    """
    rows: Rows = []
    for name in run_names(by_seed):
        seeds = main_rows(list(of_run(by_seed, name).values()))
        row: dict[str, Any] = {"run": name, "seeds": len(seeds), "prompts": sum(seed["prompts"] for seed in seeds)}
        row["error_over"] = "seeds" if len(seeds) > 1 else "prompts"
        for column in COLUMNS:
            if all(column in seed for seed in seeds):
                over_prompts = float(np.sqrt(sum(seed[f"{column}_se"] ** 2 for seed in seeds)) / len(seeds))
                row[column], error = mean_and_se(np.asarray([seed[column] for seed in seeds]))
                row[f"{column}_se"] = error if len(seeds) > 1 else over_prompts
                row[f"{column}_se_prompts"] = over_prompts
        rows.append(row)
    return rows


def seed_rows(by_seed: BySeed) -> Rows:
    """A row a seed and run."""
    return [{"seed": seed, **row} for seed, results in by_seed.items() for row in main_rows(results)]


def seed_differences(by_seed: BySeed, *, resamples: int) -> Rows:
    """Every run against SFT and MPO against the others, within each seed, with z = mean / standard error."""
    return [
        {"seed": seed, **row, "z": row["mean"] / row["se"] if row["se"] else float("nan")}
        for seed, results in by_seed.items()
        for row in difference_rows(results, resamples=resamples)
    ]


def pair_differences(by_seed: BySeed, *, resamples: int) -> Rows:
    """Every run against SFT and MPO against the others, paired by prompt, with 95% bootstrap intervals.

    With several seeds these are resampled too, and the standard error is that of the resampled means.
    """
    if len(by_seed) == 1:
        return difference_rows(next(iter(by_seed.values())), resamples=resamples)
    names = run_names(by_seed)
    pairs = [(name, "sft") for name in names if name != "sft" and "sft" in names]
    pairs += [("mpo", name) for name in names if "mpo" in names and name not in ("mpo", "sft")]
    rows: Rows = []
    for run, against in pairs:
        for column in ("score", "utility"):
            groups = differences(by_seed, run, against, column)
            if groups:
                mean_R = resampled_means(groups, resamples=resamples, seed=0)
                low, high = map(float, np.percentile(mean_R, [2.5, 97.5]))
                mean, prompts = float(np.mean([group.mean() for group in groups])), sum(map(len, groups))
                row = {"run": run, "against": against, "column": column, "prompts": prompts}
                rows.append(row | {"mean": mean, "se": float(mean_R.std()), "low": low, "high": high})
    return rows


def differences(by_seed: BySeed, better: str, worse: str, column: str) -> list[np.ndarray]:
    """A column's paired differences of two runs over the prompts, an array a seed that has both runs and the column."""
    first, second = of_run(by_seed, better), of_run(by_seed, worse)
    groups = []
    for seed in first.keys() & second.keys():
        pair_N2 = paired(first[seed].samples(), second[seed].samples(), column)
        if len(pair_N2):
            groups.append(pair_N2[:, 0] - pair_N2[:, 1])
    return groups
