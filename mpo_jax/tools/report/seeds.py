"""Results over seeds: one row a run, with the uncertainty of repeating everything with another seed."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mpo_jax.evaluation.statistics import Errors, Interval, mean_and_se, paired_bootstrap, standard_errors
from mpo_jax.pipeline.experiments import in_order
from mpo_jax.pipeline.shared import seed_folders
from mpo_jax.tools.report.results import COLUMNS, NoRuns, RunResult, collect, main_rows

BySeed: TypeAlias = dict[int, list[RunResult]]
Rows: TypeAlias = list[dict[str, Any]]


def collect_seeds(workdir: Path) -> BySeed:
    """The finished runs of a table's seeds (`<workdir>/seed-N`), or of a single workdir under its seed.

    Raises:
      UserError: if there is no finished run.
    """
    by_seed: BySeed = {}
    for seed, folder in seed_folders(workdir).items():
        try:
            by_seed[seed] = collect(folder)
        except NoRuns:
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


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A quantity by seed and prompt, and how seeds and prompts go together.

    Attributes:
      groups: an array of prompts for each seed.
      shared_prompts: every seed has the same prompts, in one order (crossed); else each has its own (nested).
    """

    groups: list[np.ndarray]
    shared_prompts: bool

    @classmethod
    def of(cls, by_seed: Sequence[Mapping[str, float]]) -> "Repeated":
        """From each seed's values by prompt. Where seeds share their prompts, those count that all of them have."""
        common = shared_prompts(by_seed)
        if common is None:
            return cls([np.asarray(list(values.values())) for values in by_seed], shared_prompts=False)
        return cls([np.asarray([values[p] for p in common]) for values in by_seed], shared_prompts=True)

    @property
    def num_prompts(self) -> int:
        """Different prompts."""
        return len(self.groups[0]) if self.shared_prompts else sum(map(len, self.groups))

    @property
    def mean(self) -> float:
        """Of the seeds' means."""
        return float(np.mean([values.mean() for values in self.groups]))

    def interval(self, *, resamples: int) -> Interval:
        """The mean with its 95% interval and p-value."""
        return paired_bootstrap(self.groups, shared_prompts=self.shared_prompts, resamples=resamples, seed=0)

    def errors(self) -> Errors:
        """Standard errors of the mean."""
        return standard_errors(self.groups, shared_prompts=self.shared_prompts)


def shared_prompts(by_seed: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The prompts that all seeds have, if they are at least half of each seed's; None where each has its own.

    Real test sets are the same for every seed; toy worlds meet in a prompt by chance at most.
    """
    common = [prompt for prompt in by_seed[0] if all(prompt in other for other in by_seed[1:])]
    return common if len(by_seed) > 1 and common and 2 * len(common) >= max(map(len, by_seed)) else None


def share_prompts(by_seed: BySeed) -> bool:
    """Whether the seeds' evaluations have the same test prompts."""
    prompts = [dict.fromkeys(results[0].measured.prompts) for results in by_seed.values()]
    return shared_prompts(prompts) is not None


def over_seeds(by_seed: BySeed) -> Rows:
    """A row a run: the mean over seeds of each column's mean, and its standard errors.

    `<column>_se` is the error of repeating everything. If each seed has its own prompts, the spread of the seeds' means
    includes the effect of prompts, labels and initial weights. If seeds share their prompts, the error over prompts is
    added to the spread of seeds beyond it. With one seed it is over prompts. `error_over` names the case.
    `<column>_se_prompts` is over prompts alone, for the seeds at hand; `<column>_se_seeds` is the spread of the seeds'
    means alone, over the root of their number.
    """
    rows: Rows = []
    for name in run_names(by_seed):
        results = list(of_run(by_seed, name).values())
        seeds = main_rows(results)
        several = len(seeds) > 1
        common = shared_prompts([dict.fromkeys(result.measured.prompts) for result in results]) if several else None
        prompts = sum(seed["prompts"] for seed in seeds) if common is None else len(common)
        row: dict[str, Any] = {"run": name, "seeds": len(seeds), "prompts": prompts}
        row["error_over"] = ("seeds" if common is None else "seeds and prompts") if several else "prompts"
        for column in COLUMNS:
            if not all(column in seed for seed in seeds):
                continue
            row[column], spread = mean_and_se(np.asarray([seed[column] for seed in seeds]))
            within = [math.nan if seed[f"{column}_se"] is None else seed[f"{column}_se"] for seed in seeds]
            over_prompts = float(np.sqrt(np.sum(np.square(within))) / len(seeds))
            error = spread if several else over_prompts
            if common is not None:
                found = Repeated.of([result.measured.values(column) for result in results]).errors()
                over_prompts, error = found.prompts, found.total
            row[f"{column}_se"] = _known(error)
            if several:
                row[f"{column}_se_seeds"] = spread
            row[f"{column}_se_prompts"] = _known(over_prompts)
        rows.append(row)
    return rows


def _known(error: float) -> float | None:
    return None if math.isnan(error) else error


def seed_rows(by_seed: BySeed) -> Rows:
    """A row a seed and run."""
    return [{"seed": seed, **row} for seed, results in by_seed.items() for row in main_rows(results)]


def seed_differences(by_seed: BySeed, *, resamples: int) -> Rows:
    """The differences of `compared_runs` within each seed, with z = mean / standard error."""
    return [
        {"seed": seed, **row, "z": row["mean"] / row["se"] if row["se"] else float("nan")}
        for seed, results in by_seed.items()
        for row in pair_differences({seed: results}, resamples=resamples)
    ]


def compared_runs(by_seed: BySeed) -> list[tuple[str, str]]:
    """The pairs of runs that are compared: each run with SFT, MPO with the others, at other splits with DPO and PPO."""
    names = run_names(by_seed)
    experiments = {result.name: result.experiment for results in by_seed.values() for result in results}
    pairs = [(name, "sft") for name in names if name != "sft" and "sft" in names]
    pairs += [("mpo", name) for name in names if "mpo" in names and name not in ("mpo", "sft")]
    splits = [name for name in names if experiments[name] == "mpo" != name]
    return pairs + [(name, baseline) for name in splits for baseline in ("dpo", "ppo") if baseline in names]


def pair_differences(by_seed: BySeed, *, resamples: int, at_least: int = 1) -> Rows:
    """The differences of `compared_runs`, paired by prompt, with standard errors and 95% intervals.

    Args:
      at_least: prompts; a difference over fewer has no interval.
    """
    rows: Rows = []
    for run, against in compared_runs(by_seed):
        for column in ("score", "utility"):
            found = differences(by_seed, run, against, column)
            if found is None:
                continue
            mean, low, high, _ = found.interval(resamples=resamples)
            row = {"run": run, "against": against, "column": column, "prompts": found.num_prompts, "mean": mean}
            enough = found.num_prompts >= at_least
            interval = (found.errors().total, low, high) if enough else (None, None, None)
            rows.append(row | dict(zip(("se", "low", "high"), interval, strict=True)))
    return rows


def differences(by_seed: BySeed, better: str, worse: str, column: str) -> Repeated | None:
    """A column's differences of two runs, paired by prompt, over the seeds that have both; None where none has."""
    return paired(by_seed, better, worse, lambda _, result: result.measured.values(column))


def paired(
    by_seed: BySeed, better: str, worse: str, values: Callable[[int, RunResult], Mapping[str, float]]
) -> Repeated | None:
    """The same of any values by prompt, which `values(seed, result)` gives."""
    first, second = of_run(by_seed, better), of_run(by_seed, worse)
    groups = []
    for seed in [seed for seed in first if seed in second]:
        ours, theirs = (values(seed, run[seed]) for run in (first, second))
        if both := {prompt: value - theirs[prompt] for prompt, value in ours.items() if prompt in theirs}:
            groups.append(both)
    return Repeated.of(groups) if groups else None
