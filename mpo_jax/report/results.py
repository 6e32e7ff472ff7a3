"""What a workdir's finished runs say, as plain rows: the source of every table, figure and page."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mpo_jax.errors import UserError
from mpo_jax.evaluation.statistics import paired_difference
from mpo_jax.experiments import EXPERIMENTS
from mpo_jax.types import Artifact

COLUMNS = {
    "score": "reward",
    "utility": "true utility",
    "kl": "KL to SFT",
    "length": "tokens",
    "has_eos": "EOS rate",
}
"""Evaluation columns in the order of the table, with the names that people read."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One finished run: its artifacts by role and its evaluation's summary."""

    name: str
    folder: Path
    artifacts: dict[str, Artifact]

    @property
    def summary(self) -> dict[str, Any]:
        return self.artifacts["evaluate"].manifest["summary"]

    def samples(self) -> list[dict[str, Any]]:
        """The evaluation's samples, a row a test prompt."""
        with (self.artifacts["evaluate"].path / "samples.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def collect(workdir: Path, names: tuple[str, ...] | None = None) -> list[RunResult]:
    """The finished runs below `<workdir>/runs`, in the order of the experiments' table.

    Raises:
      UserError: if there is none.
    """
    results = []
    for name in tuple(EXPERIMENTS) if names is None else names:
        folder = workdir / "runs" / name
        if not (folder / "evaluate" / "manifest.json").is_file():
            continue
        artifacts = {
            link.name: Artifact(link.resolve(), json.loads((link / "manifest.json").read_text(encoding="utf-8")))
            for link in sorted(folder.iterdir())
            if (link / "manifest.json").is_file()
        }
        results.append(RunResult(name, folder, artifacts))
    if not results:
        raise UserError(f"no finished run in {workdir}: make one with `mpo run CONFIG workdir={workdir}`")
    order = list(EXPERIMENTS)
    return sorted(results, key=lambda result: order.index(result.name))  # type: ignore[arg-type]


def main_rows(results: list[RunResult]) -> list[dict[str, Any]]:
    """A row a run: mean and standard error of each column that the evaluations have."""
    rows = []
    for result in results:
        row: dict[str, Any] = {"run": result.name, "prompts": result.summary["prompts"]}
        for column in COLUMNS:
            if column in result.summary:
                row[column], row[f"{column}_se"] = result.summary[column], result.summary[f"{column}_se"]
        rows.append(row)
    return rows


def difference_rows(results: list[RunResult], *, resamples: int, seed: int = 0) -> list[dict[str, Any]]:
    """Every run against SFT and MPO against every other run, paired by prompt, with 95% bootstrap intervals."""
    by_name = {result.name: result.samples() for result in results}
    pairs = [(name, "sft") for name in by_name if name != "sft" and "sft" in by_name]
    pairs += [("mpo", name) for name in by_name if "mpo" in by_name and name not in ("mpo", "sft")]
    rows = []
    for a, b in pairs:
        for column in ("score", "utility"):
            first, second = ({row["prompt"]: row[column] for row in by_name[name] if column in row} for name in (a, b))
            shared = [prompt for prompt in first if prompt in second]
            if not shared:
                continue
            difference = paired_difference(
                np.asarray([first[p] for p in shared]),
                np.asarray([second[p] for p in shared]),
                resamples=resamples,
                seed=seed,
            )
            rows.append({"run": a, "against": b, "column": column, "prompts": len(shared), **difference})
    return rows


def terminal_table(rows: list[dict[str, Any]], title: str) -> Table:
    """The main table for the terminal: mean ± standard error."""
    table = Table(title=title, title_justify="left")
    table.add_column("run")
    present = [column for column in COLUMNS if any(column in row for row in rows)]
    for column in present:
        table.add_column(COLUMNS[column], justify="right")
    for row in rows:
        table.add_row(row["run"], *(_cell(row, column) for column in present))
    return table


def _cell(row: dict[str, Any], column: str) -> str:
    if column not in row:
        return "-"
    if column == "has_eos":
        return f"{row[column]:.1%}"
    return f"{row[column]:.3f} ± {row[f'{column}_se']:.3f}" if column != "length" else f"{row[column]:.1f}"


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV; the columns are all keys in order of first appearance."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
