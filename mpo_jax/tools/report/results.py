"""A workdir's finished runs as plain rows: the source of every table, figure and page."""

import csv
import dataclasses
import io
import math
import os
import sys
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.config.schema import Config, SelectConfig
from mpo_jax.data.pair_table import PairTable
from mpo_jax.errors import Damaged, UserError
from mpo_jax.evaluation.answers import CATEGORY, SAMPLES
from mpo_jax.evaluation.calibration import accuracy_by_gap, against_truth, read_gap_categories, read_gaps
from mpo_jax.evaluation.repetition import repeated
from mpo_jax.evaluation.statistics import mean_and_se
from mpo_jax.pipeline.experiments import AT_SPLITS, Variant, in_order, is_run
from mpo_jax.pipeline.recipe import MANIFEST, read_manifest
from mpo_jax.pipeline.run_folder import CONFIG, read_config, read_environment, remedy, roles, stage_links
from mpo_jax.runtime.files import anew, naming_damage, read_lines, write_bytes
from mpo_jax.selection import ordered_right
from mpo_jax.tools.human.export import FORMULA
from mpo_jax.types import Artifact

STATE_HASH = "state_hash"
METRICS = "metrics.jsonl"
"""What a stage logged, a line a step."""

COLUMNS = {
    "score": "reward",
    "utility": "true utility",
    "kl": "KL to SFT",
    "length": "tokens",
    "has_eos": "EOS rate",
}
"""Evaluation columns in the order of the table, with the names that people read."""

REPETITION = "repetition"
"""Column of `repeated`, which is no evaluation's own."""

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


LARGEST = 1e30
"""Of a measure's mean; rewards are float32."""


class NoRuns(UserError):
    """A workdir without a finished run."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """An evaluation's numbers, without its texts, which would not fit into memory for all runs of a table.

    Attributes:
      prompts: the test prompts. One that comes again has its number after it, so that all differ.
      category: of each prompt, None where its row names none.
      columns: by name the value of each prompt, NaN where its row has none; `REPETITION` beside `COLUMNS`.
    """

    prompts: list[str]
    category: list[str | None]
    columns: dict[str, np.ndarray]

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> "Measured":
        """The numbers of an evaluation's samples."""
        seen: Counter[str] = Counter()
        prompts = []
        for row in rows:
            prompt, number = row["prompt"], seen[row["prompt"]]
            seen[prompt] += 1
            # runs have the same prompts: one string for all of them
            prompts.append(sys.intern(f"{prompt}\0{number}" if number else prompt))
        columns = {
            name: np.asarray([row.get(name, math.nan) for row in rows], np.float64)
            for name in COLUMNS
            if any(name in row for row in rows)
        }
        columns[REPETITION] = np.asarray([repeated(row.get("response") or "") for row in rows], np.float64)
        return cls(prompts, [row.get(CATEGORY) for row in rows], columns)

    def only(self, category: str) -> "Measured":
        """The prompts of one category."""
        places = [place for place, name in enumerate(self.category) if name == category]
        columns = {name: values[places] for name, values in self.columns.items()}
        return Measured([self.prompts[place] for place in places], [category] * len(places), columns)

    def values(self, column: str) -> dict[str, float]:
        """A column by prompt, without prompts that lack it."""
        values = self.columns.get(column, np.empty(0))
        return {prompt: float(x) for prompt, x in zip(self.prompts, values, strict=False) if not math.isnan(x)}

    def summary(self) -> dict[str, Any]:
        """As a run's evaluation summarises itself; errors are NaN for a single prompt."""
        summary: dict[str, Any] = {"prompts": len(self.prompts)}
        for name in COLUMNS:
            values = self.columns.get(name, np.empty(0))
            known = values[~np.isnan(values)]
            if len(known):
                mean, error = mean_and_se(known)
                summary |= {name: mean, f"{name}_se": error if len(known) > 1 else math.nan}
        return summary


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One finished run: its artifacts by role and its evaluation.

    Attributes:
      category: the only one whose prompts and pairs count; None: all of them.
      environment: versions and devices that it was made on, and its command; empty if that is not known.
      cautions: what is damaged in its workdir, and what the report lacks for it.
    """

    name: str
    folder: Path
    artifacts: dict[str, Artifact]
    category: str | None = None
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    cautions: tuple[str, ...] = ()

    def of_category(self, name: str) -> "RunResult":
        """The same run, judged by its prompts and held-out pairs of one category alone."""
        view = dataclasses.replace(self, category=name)
        # reuse what is already read
        view.__dict__.update(measured=self.measured.only(name), config=self.config)
        return view

    @property
    def summary(self) -> dict[str, Any]:
        """The evaluation's means, standard errors and counts."""
        return self.artifacts["evaluate"].manifest["summary"] if self.category is None else self.measured.summary()

    @property
    def reward_summary(self) -> dict[str, Any]:
        """How often the reward model is right, as its stage wrote it, or on the held-out pairs of the category."""
        artifact = self.artifacts["reward"]
        if self.category is None:
            return artifact.manifest["summary"]
        kept, names = read_gaps(artifact.path), read_gap_categories(artifact.path)
        inside = np.asarray([name == self.category for name in names or []], bool)
        if kept is None or not inside.any():
            return {}
        gap, truth = kept[0][inside], None if kept[1] is None else kept[1][inside]
        summary: dict[str, Any] = {"pairs": len(gap), "held_out_accuracy": float(ordered_right(gap).mean())}
        summary["accuracy_by_gap"] = accuracy_by_gap(gap)
        signed = np.empty(0) if truth is None else against_truth(gap, truth)
        if truth is not None and len(signed):
            summary |= {
                "true_accuracy": float(ordered_right(signed).mean()),
                "true_accuracy_by_gap": accuracy_by_gap(signed),
            }
            summary["label_accuracy"] = float((truth[np.isfinite(truth) & (truth != 0)] > 0).mean())
        return summary

    @cached_property
    def config(self) -> Config:
        """The resolved configuration, with the run's own split in the section `select`."""
        return read_config(self.folder / CONFIG)

    @property
    def experiment(self) -> str:
        return Variant.of(self.name).experiment

    @property
    def label(self) -> str:
        """The run as tables for people name it, with its split where the same experiment is run at several."""
        label = LABELS[self.experiment]
        return f"{label}, {split_label(self.config.select)}" if self.experiment in AT_SPLITS else label

    @cached_property
    def measured(self) -> Measured:
        """The numbers of the evaluation's samples."""
        rows, folder = self.samples(), self.artifacts["evaluate"].path
        with naming_damage(folder / SAMPLES, anew(folder)):
            return Measured.of(rows)

    def samples(self) -> list[dict[str, Any]]:
        """The evaluation's samples, a row a test prompt of whatever category."""
        folder = self.artifacts["evaluate"].path
        rows = read_lines(folder / SAMPLES, anew(folder))
        for number, row in enumerate(rows, 1):
            if not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
                raise Damaged(folder / SAMPLES, f"lacks the prompt or the response in line {number}", anew(folder))
            if not isinstance(row.get(CATEGORY), str | None):
                raise Damaged(folder / SAMPLES, f"has no text for {CATEGORY} in line {number}", anew(folder))
            # a score that is not finite ends an evaluation; of a truth that is not known there is NaN
            if wrong := [name for name in ("score", "utility") if not _is_measured(row, name)]:
                raise Damaged(folder / SAMPLES, f"has no number for {wrong[0]} in line {number}", anew(folder))
        return rows


def collect_unevaluated(workdir: Path) -> list[RunResult]:
    """The runs of a workdir that were made up to a stage before the evaluation, in the order of the tables.

    Raises:
      Damaged: if one of them cannot be read.
    """
    folders = [run for run in (workdir / "runs").glob("*") if is_run(run.name) and (run / CONFIG).is_file()]
    results = {
        folder.name: _open(folder, made) for folder in folders if "evaluate" not in (made := tuple(roles(folder)))
    }
    return [results[name] for name in in_order(results)]


def collect(workdir: Path, names: tuple[str, ...] | None = None) -> list[RunResult]:
    """The finished runs below `<workdir>/runs`, or those of them that are named, in the order of the tables.

    A run that cannot be read is left out, and the others say so in their cautions, unless it is named.

    Raises:
      Damaged: if a run that is named cannot be read.
      NoRuns: if there is none.
      UserError: if none can be read.
    """
    results: list[RunResult] = []
    left_out: list[str] = []
    folders = sorted((workdir / "runs").glob("*")) if names is None else [workdir / "runs" / name for name in names]
    for folder in folders:
        if not is_run(folder.name) or not os.path.lexists(folder):
            continue
        try:
            results.append(_open(folder))
        except Damaged as damage:
            if names is not None:
                raise
            left_out.append(f"the run {folder.name} is left out: {damage}")
    if left_out and not results:
        raise UserError("\n".join(left_out))
    if not results:
        run = is_run(workdir.name) and (workdir / CONFIG).is_file()
        hint = (
            f"name its workdir, {workdir.parent.parent}" if run else f"make one with `mpo run CONFIG workdir={workdir}`"
        )
        raise NoRuns(f"no finished run in {workdir}: {hint}")
    results[0] = dataclasses.replace(results[0], cautions=(*left_out, *results[0].cautions))
    order = in_order(result.name for result in results)
    return sorted(results, key=lambda result: order.index(result.name))


def _open(folder: Path, needed: tuple[str, ...] = ("sft", "reward", "evaluate")) -> RunResult:
    """A run, checked to have all that a report needs; what it can do without is a caution.

    Args:
      needed: the roles of its stages that must be there.

    Raises:
      Damaged: for the first file that is missing or damaged.
    """
    artifacts = {role: Artifact(path, read_manifest(path)) for role, path in stage_links(folder).items()}
    lacking = [role for role in needed if role not in artifacts]
    known = {artifact.id for artifact in artifacts.values()}
    # a missing link to a step shows in what was made from it
    used = [one.manifest["parents"].get(role) for one in artifacts.values() for role in ("policy", "init", "pairs")]
    lacking += [name for name in used if name is not None and name not in known]
    if lacking:
        raise Damaged(folder, f"has no link to its {lacking[0]}", remedy(folder))
    cautions = [caution for artifact in artifacts.values() for caution in _check(artifact)]
    environment: dict[str, Any] = {}
    try:
        environment = read_environment(folder)
    except Damaged as damage:
        cautions.append(f"the report lacks a machine and a command: {damage}")
    result = RunResult(folder.name, folder, artifacts, environment=environment, cautions=tuple(cautions))
    # read now, and kept
    assert result.config and ("evaluate" not in artifacts or result.measured)
    return result


def _check(artifact: Artifact) -> list[str]:
    """Reads what a report needs of a stage; returns what of it the report can do without, if it is damaged.

    Raises:
      Damaged: for what it needs.
    """
    folder, summary = artifact.path, artifact.manifest.get("summary", {})
    stage = artifact.manifest["stage"]
    if stage == "select":
        PairTable.read(folder)
    if stage == "reward":
        read_gaps(folder)
    if stage == "evaluate":
        _check_summary(summary, folder)
    if os.path.lexists(folder / METRICS) or summary.get("train"):
        try:
            read_metrics(folder)
        except Damaged as damage:
            return [f"the report lacks the curves of {artifact.id}: {damage}"]
    return []


def _check_summary(summary: dict[str, Any], folder: Path) -> None:
    """Raises Damaged unless an evaluation's summary has a count, and a mean with its error for each measure."""
    means = [name for name in COLUMNS if name in summary]
    right = {
        "prompts": type(summary.get("prompts")) is int and summary["prompts"] >= 1,
        "score": "score" in summary,
        **{name: _is_number(summary[name]) and abs(summary[name]) <= LARGEST for name in means},
        # the error of a single prompt is NaN
        **{f"{name}_se": _is_number(summary.get(f"{name}_se")) for name in means},
    }
    if "has_eos" in means:
        right["has_eos"] = right["has_eos"] and 0 <= summary["has_eos"] <= 1
    if wrong := [name for name, is_right in right.items() if not is_right]:
        why = f"has no number that an evaluation has for {wrong[0]} in its summary"
        raise Damaged(folder / MANIFEST, why, anew(folder))


def _is_measured(row: dict[str, Any], name: str) -> bool:
    if name == "utility":
        value = row.get(name, math.nan)
        return _is_number(value) and (math.isnan(value) or abs(value) <= LARGEST)
    return _is_number(row.get(name)) and abs(row[name]) <= LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What a stage logged, a row for each logged step.

    Raises:
      Damaged: if the file is missing or damaged.
    """
    rows = read_lines(folder / METRICS, anew(folder))
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), int):
            raise Damaged(folder / METRICS, f"names no step in line {number}", anew(folder))
        if wrong := [key for key, value in row.items() if key != STATE_HASH and not isinstance(value, int | float)]:
            raise Damaged(folder / METRICS, f"has no number for {wrong[0]} in line {number}", anew(folder))
    return rows


def main_rows(results: list[RunResult]) -> list[dict[str, Any]]:
    """A row a run: mean and standard error of each column; a single prompt has no error."""
    rows = []
    for result in results:
        summary = result.summary
        row: dict[str, Any] = {"run": result.name, "prompts": summary["prompts"]}
        for column in COLUMNS:
            if column in summary:
                error = summary[f"{column}_se"]
                known = summary["prompts"] > 1 and not math.isnan(error)
                row[column], row[f"{column}_se"] = summary[column], error if known else None
        rows.append(row)
    return rows


def no_formula(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe in front."""
    if not isinstance(value, str) or not value.startswith((*FORMULA, " ")):
        return value
    try:
        float(value)
        return value
    except ValueError:
        return f"'{value}" if value.strip(" ").startswith(FORMULA) else value


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV, whole or not at all; the columns are all keys in order of first appearance."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows({key: no_formula(value) for key, value in row.items()} for row in rows)
    # prompts may hold lone surrogates, which no file can
    write_bytes(path, [text.getvalue().encode("utf-8", errors="replace")])
