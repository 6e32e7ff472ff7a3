"""Results over seeds: one figure a run, whose uncertainty is that of repeating everything with another seed."""

from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.evaluation.statistics import mean_and_se
from mpo_jax.report.results import COLUMNS, RunResult, difference_rows, main_rows, write_csv


def over_seeds(by_seed: dict[int, list[RunResult]]) -> list[dict[str, Any]]:
    """A row a run: mean over seeds of each column's mean, and its standard error over seeds."""
    rows_by_run: dict[str, list[dict[str, Any]]] = {}
    for results in by_seed.values():
        for row in main_rows(results):
            rows_by_run.setdefault(row["run"], []).append(row)
    rows = []
    for run, seeds in rows_by_run.items():
        row: dict[str, Any] = {"run": run, "seeds": len(seeds)}
        for column in COLUMNS:
            if all(column in seed for seed in seeds):
                row[column], row[f"{column}_se"] = mean_and_se(np.asarray([seed[column] for seed in seeds]))
        rows.append(row)
    return rows


def write_seeds(workdir: Path, by_seed: dict[int, list[RunResult]]) -> list[Path]:
    """Writes `tables/seeds.csv` (a row a run), `tables/by_seed.csv` and `tables/differences_by_seed.csv`."""
    folder = workdir / "tables"
    per_seed = [{"seed": seed, **row} for seed, results in by_seed.items() for row in main_rows(results)]
    differences = [
        {"seed": seed, **row, "z": row["mean"] / row["se"] if row["se"] else float("nan")}
        for seed, results in by_seed.items()
        for row in difference_rows(results, resamples=2000)
    ]
    files = {"seeds": over_seeds(by_seed), "by_seed": per_seed, "differences_by_seed": differences}
    for name, rows in files.items():
        write_csv(folder / f"{name}.csv", rows)
    return [folder / f"{name}.csv" for name in files]
