"""What a workdir's finished runs say, as plain rows: the source of every table, figure and page."""

import csv
import dataclasses
import io
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mpo_jax.artifacts import write_bytes
from mpo_jax.config import Config, SelectConfig, load_config
from mpo_jax.errors import UserError
from mpo_jax.evaluation.statistics import paired_difference
from mpo_jax.experiments import Variant, in_order, is_run
from mpo_jax.types import Artifact

COLUMNS = {
    "score": "reward",
    "utility": "true utility",
    "kl": "KL to SFT",
    "length": "tokens",
    "has_eos": "EOS rate",
}
"""Evaluation columns in the order of the table, with the names that people read."""


LABELS = {
    "sft": "SFT",
    "dpo_base": "DPO-base, human pairs",
    "dpo": "DPO, all sampled pairs",
    "ppo": "PPO, all prompts",
    "mpo": "MPO",
    "mpo_sft_kl": "MPO, KL to SFT",
    "mpo_reverse": "MPO reversed",
    "mpo_reverse_sft": "MPO reversed, DPO's reference SFT",
    "dpo_easy": "DPO, easy pairs",
    "dpo_hard": "DPO, hard pairs",
    "ppo_easy": "PPO, easy prompts",
    "ppo_hard": "PPO, hard prompts",
}
"""Experiments as tables for people name them."""


def split_label(select: SelectConfig) -> str:
    """Where pairs are split: `threshold 1`, `25% easy`."""
    if select.easy_fraction is not None:
        return f"{select.easy_fraction:.0%} easy"
    return f"threshold {select.threshold:g}"


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One finished run: its artifacts by role and its evaluation's summary."""

    name: str
    folder: Path
    artifacts: dict[str, Artifact]

    @property
    def summary(self) -> dict[str, Any]:
        return self.artifacts["evaluate"].manifest["summary"]

    @cached_property
    def config(self) -> Config:
        """The resolved configuration, with the run's own split in the section `select`."""
        return load_config(self.folder / "config.yaml")

    @property
    def experiment(self) -> str:
        return Variant.of(self.name).experiment

    @property
    def label(self) -> str:
        """The run as tables for people name it; MPO with its split."""
        label = LABELS[self.experiment]
        return f"{label}, {split_label(self.config.select)}" if self.experiment == "mpo" else label

    def samples(self) -> list[dict[str, Any]]:
        """The evaluation's samples, a row a test prompt."""
        with (self.artifacts["evaluate"].path / "samples.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def collect(workdir: Path, names: tuple[str, ...] | None = None) -> list[RunResult]:
    """The finished runs below `<workdir>/runs`, or those of them that are named, in the order of the tables.

    Raises:
      UserError: if there is none.
    """
    results = []
    folders = sorted((workdir / "runs").glob("*")) if names is None else [workdir / "runs" / name for name in names]
    for folder in folders:
        if not is_run(folder.name) or not (folder / "evaluate" / "manifest.json").is_file():
            continue
        artifacts = {
            link.name: Artifact(link.resolve(), json.loads((link / "manifest.json").read_text(encoding="utf-8")))
            for link in sorted(folder.iterdir())
            if (link / "manifest.json").is_file()
        }
        results.append(RunResult(folder.name, folder, artifacts))
    if not results:
        raise UserError(f"no finished run in {workdir}: make one with `mpo run CONFIG workdir={workdir}`")
    order = in_order(result.name for result in results)
    return sorted(results, key=lambda result: order.index(result.name))


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
            pair_N2 = paired(by_name[a], by_name[b], column)
            if not len(pair_N2):
                continue
            difference = paired_difference(*pair_N2.T, resamples=resamples, seed=seed)
            rows.append({"run": a, "against": b, "column": column, "prompts": len(pair_N2), **difference})
    return rows


def paired(first: list[dict[str, Any]], second: list[dict[str, Any]], column: str) -> np.ndarray:
    """[N, 2] a column of two runs' samples over the prompts that both answered; N is 0 where they share none."""
    values = [{row["prompt"]: row[column] for row in rows if column in row} for rows in (first, second)]
    shared = [prompt for prompt in values[0] if prompt in values[1]]
    return np.asarray([[side[prompt] for side in values] for prompt in shared], np.float64).reshape(-1, 2)


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
    """Rows as CSV, whole or not at all; the columns are all keys in order of first appearance."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    # prompts may hold lone surrogates, which no file can
    write_bytes(path, [text.getvalue().encode("utf-8", errors="replace")])
