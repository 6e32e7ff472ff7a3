"""The report: one self-contained HTML page of a workdir's finished runs, with all its numbers as CSV beside it."""

import dataclasses
import json
import math
import os
import shlex
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors import safe_open

from mpo_jax import __version__
from mpo_jax.config import Config, load_config
from mpo_jax.data.pair_table import FILE, PairTable
from mpo_jax.report import figures
from mpo_jax.report.figures import Chart, Series
from mpo_jax.report.results import COLUMNS, RunResult, collect, difference_rows, main_rows, write_csv
from mpo_jax.stages.select import describe
from mpo_jax.types import Artifact

Rows = list[dict[str, Any]]
DATA_KINDS = {
    "toy": "the toy TL;DR world",
    "hh": "preference pairs in the HH-RLHF format",
    "tldr": "Reddit posts with summaries (TL;DR)",
    "pairs": "preference pairs from local files",
}
STAGE_NAMES = {"sft": "SFT", "reward": "Reward model", "dpo": "DPO", "ppo": "PPO"}


@dataclasses.dataclass
class Report:
    """What goes into files beside the page: tables by name, and charts."""

    tables: dict[str, Rows] = dataclasses.field(default_factory=dict)
    charts: list[Chart] = dataclasses.field(default_factory=list)

    def table(self, name: str, rows: Rows) -> Rows:
        """Keeps rows for `tables/<name>.csv`; nothing is kept of an empty table."""
        if rows:
            self.tables[name] = rows
        return rows

    def show(self, *charts: Chart | None) -> list[Chart]:
        """Keeps the charts that there are for `figures/`."""
        there = [chart for chart in charts if chart is not None]
        self.charts += there
        return there


def write_report(workdir: Path, *, resamples: int) -> Path:
    """Writes `<workdir>/report/` from the finished runs and returns its index.html.

    The folder takes its place only when all is written: a killed run leaves the report that was there before.

    Args:
      workdir: a folder with finished runs.
      resamples: bootstrap resamples of the paired differences.

    Raises:
      UserError: if there is no finished run.
    """
    results = collect(workdir)
    final, partial, old = (workdir / name for name in ("report", ".report.partial", ".report.old"))
    with FileLock(workdir / ".report.lock"):
        if old.exists() and not final.exists():
            os.rename(old, final)  # killed between the two renames below
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        _write(partial, workdir, results, resamples)
        if final.exists():
            os.rename(final, old)
        os.rename(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    return final / "index.html"


def _write(folder: Path, workdir: Path, results: list[RunResult], resamples: int) -> None:
    report = Report()
    html = _environment().get_template("page.html.j2").render(_content(report, workdir, results, resamples))
    for name, rows in report.tables.items():
        write_csv(folder / "tables" / f"{name}.csv", rows)
    for chart in report.charts:
        chart.write(folder / "figures")
    # a lone surrogate, which JSON can carry, is not text that a file could hold
    (folder / "index.html").write_text(html, encoding="utf-8", errors="replace")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mpo_jax.report", "."),
        autoescape=True,  # prompts and responses are anybody's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "signed": lambda value: f"{value:+.3f}",
        "percent": lambda value: "-" if value is None else f"{value:.1%}",
        "gap_label": figures.gap_label,
    }
    environment.globals |= {"columns": COLUMNS, "cell": _cell, "color": lambda run: figures.style(run)["color"]}
    return environment


def _content(report: Report, workdir: Path, results: list[RunResult], resamples: int) -> dict[str, Any]:
    """Everything that the template shows; what a workdir has not is empty and its section left out."""
    configs = {result.name: load_config(result.folder / "config.yaml") for result in results}
    rows = report.table("main", main_rows(results))
    differences = report.table("differences", difference_rows(results, resamples=resamples))
    best = _best(rows)
    return {
        "title": workdir.resolve().name,
        "version": __version__,
        "what": _what(results, configs, rows),
        "outcome": _outcome(rows, differences, best),
        "cautions": _cautions(results),
        "rows": rows,
        "best": best,
        "differences": _by_pair(differences),
        "tradeoffs": report.show(*(figures.tradeoff(rows, column) for column in ("score", "utility"))),
        "stages": _stages(report, results),
        "selections": _selections(report, results, configs),
        "accuracy": _accuracy(report, results, configs),
        "samples": _samples(results, max(config.evaluate.num_samples_shown for config in configs.values())),
        "sources": _sources(report, results),
        "truncation": _truncation(report, results),
        "environments": _environments(results),
        "commands": _commands(results, configs),
        "artifacts": _artifacts(workdir, results),
        "tables": list(report.tables),
    }


def distinct(results: list[RunResult], stage: str) -> list[tuple[Artifact, tuple[str, ...]]]:
    """A stage's artifacts, each once, with the names of the runs that use it."""
    found: dict[str, tuple[Artifact, tuple[str, ...]]] = {}
    for result in results:
        for artifact in result.artifacts.values():
            if artifact.manifest["stage"] == stage:
                users = found[artifact.id][1] if artifact.id in found else ()
                found[artifact.id] = artifact, (*users, result.name)
    return list(found.values())


def _what(results: list[RunResult], configs: dict[str, Config], rows: Rows) -> str:
    """What was run, in plain words."""
    kinds = list(dict.fromkeys(DATA_KINDS[config.data.kind] for config in configs.values()))
    models = list(dict.fromkeys(_model(configs[result.name], result.artifacts.get("sft")) for result in results))
    seeds = sorted({config.seed for config in configs.values()})
    names = ", ".join(result.name for result in results)
    prompts = sorted({row["prompts"] for row in rows})
    return (
        f"{len(results)} run{'s' * (len(results) > 1)} ({names}) on {' and '.join(kinds)}, with "
        f"{' and '.join(models)}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. Each final policy "
        f"answered {' or '.join(map(str, prompts))} held-out prompts."
    )


def _model(config: Config, sft: Artifact | None) -> str:
    size = _num_parameters(sft.model) if sft is not None else 0
    sized = f"{size / 1e9:.2f} billion" if size >= 1e9 else f"{size / 1e6:.2f} million"
    count = f" of {sized} parameters" if size else ""
    if config.model.path is not None:
        return f"the base model {Path(config.model.path).name}{count}"
    shape = config.model.architecture
    return f"a model{count} trained from scratch ({shape.num_layers} layers, width {shape.hidden_size})"


def _num_parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, from their headers alone; 0 where there is none."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _best(rows: Rows) -> dict[str, str]:
    """The run with the highest mean reward and the one with the highest true utility, among several."""
    best = {}
    for column in ("score", "utility"):
        having = [row for row in rows if column in row]
        if len(having) > 1:
            best[column] = max(having, key=lambda row: row[column])["run"]
    return best


def _outcome(rows: Rows, differences: Rows, best: dict[str, str]) -> list[str]:
    """What came out, in sentences: the best run by truth where it is known, then MPO (or all) against the others."""
    column = "utility" if any("utility" in row for row in rows) else "score"
    name = COLUMNS[column]
    by_run = {row["run"]: row for row in rows}
    sentences = []
    if column in best:
        row = by_run[best[column]]
        sentences.append(f"Best by {name}: {row['run']}, {row[column]:.3f} ± {row[f'{column}_se']:.3f} (s.e.).")
    if "utility" in best and "score" in best and best["score"] != best["utility"]:
        sentences.append(f"By reward it would be {best['score']}: the reward model and the truth disagree there.")
    shown = [row for row in differences if row["column"] == column]
    if "mpo" in by_run:
        shown = [row for row in shown if row["run"] == "mpo"]
    for row in shown:
        verdict = "no clear difference"
        if row["low"] > 0 or row["high"] < 0:
            verdict = "higher" if row["mean"] > 0 else "lower"
        sentences.append(
            f"{row['run']} against {row['against']}: {verdict}, {row['mean']:+.3f} {name} "
            f"[{row['low']:+.3f}, {row['high']:+.3f}]."
        )
    return sentences


def _cautions(results: list[RunResult]) -> list[str]:
    """What makes the runs' numbers incomparable."""
    manifests = [result.artifacts["evaluate"].manifest for result in results]

    def differ(part: str, key: str | None = None) -> bool:
        values = (manifest.get(part, {}) for manifest in manifests)
        return len({json.dumps(value.get(key) if key else value, sort_keys=True) for value in values}) > 1

    cautions = []
    if differ("parents", "reward"):
        cautions.append("The runs were scored by different reward models: their rewards do not compare.")
    if differ("parents", "sft"):
        cautions.append("The runs start from different SFT models: their KL to SFT does not compare.")
    if differ("settings"):
        cautions.append("The runs were evaluated on other data, or with another seed or other settings.")
    return cautions


def _cell(row: dict[str, Any], column: str) -> str:
    """A number of the main table with its standard error."""
    if column not in row:
        return "-"
    value, se = row[column], row[f"{column}_se"]
    if column == "has_eos":
        return f"{value:.1%} ±\N{NO-BREAK SPACE}{se:.1%}"
    digits = 1 if column == "length" else 3
    return f"{value:.{digits}f} ±\N{NO-BREAK SPACE}{se:.{digits}f}"


def _by_pair(differences: Rows) -> Rows:
    """The differences with a line a pair of runs and the columns beside each other."""
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in differences:
        pair = pairs.setdefault((row["run"], row["against"]), {"run": row["run"], "against": row["against"]})
        pair[row["column"]] = row
    return list(pairs.values())


def _stages(report: Report, results: list[RunResult]) -> list[dict[str, Any]]:
    """The training curves by stage; stages that no run has are left out."""
    stages = []
    for stage, title in STAGE_NAMES.items():
        series = [Series(runs, _metrics(artifact)) for artifact, runs in distinct(results, stage)]
        charts = report.show(*figures.curves(stage, series))
        if charts:
            stages.append({"stage": stage, "title": title, "charts": charts})
    return stages


def _metrics(artifact: Artifact) -> Rows:
    path = artifact.path / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _selections(report: Report, results: list[RunResult], configs: dict[str, Config]) -> list[dict[str, Any]]:
    """Each split that the runs use: the histogram of gaps, and the sizes by threshold."""
    selections = []
    for artifact, runs in distinct(results, "select"):
        if not (artifact.path / FILE).is_file():
            continue
        table = PairTable.read(artifact.path)
        # a threshold is no part of the artifact: runs that share the pairs may split them at different places
        splits: dict[float, list[str]] = {}
        for run in runs:
            splits.setdefault(table.threshold(configs[run].select), []).append(run)
        for threshold, users in splits.items():
            number = f"_{len(selections) + 1}" if selections else ""
            summary = describe(table, configs[users[0]].select)
            chart = figures.gap_histogram(f"gaps{number}", summary["histogram"], threshold)
            selections.append(
                {
                    "runs": users,
                    "threshold": threshold,
                    "summary": summary,
                    "charts": report.show(chart),
                    "sizes": report.table(f"selection{number}", summary["sizes"]),
                    "source": configs[users[0]].select.pair_source,
                    "truth": any(row["easy_accuracy"] is not None for row in summary["sizes"]),
                }
            )
    return selections


def _accuracy(report: Report, results: list[RunResult], configs: dict[str, Config]) -> dict[str, Any]:
    """How often the reward model is right by the size of its gap, on held-out pairs and on those of the selection."""
    rows: Rows = []
    rewards = distinct(results, "reward")
    for artifact, _ in rewards:
        which = f" ({artifact.id})" if len(rewards) > 1 else ""
        for key, name in {"accuracy_by_gap": "their labels", "true_accuracy_by_gap": "the truth"}.items():
            bins = artifact.manifest["summary"].get(key) or []
            rows += figures.accuracy_rows(f"held-out pairs against {name}{which}", bins)
    selections = distinct(results, "select")
    for artifact, runs in selections:
        which = f" ({artifact.id})" if len(selections) > 1 else ""
        pairs = {"sampled": "sampled", "human": "labelled"}[configs[runs[0]].select.pair_source]
        bins = artifact.manifest["summary"].get("accuracy_by_gap", [])
        rows += figures.accuracy_rows(f"{pairs} pairs against the truth{which}", bins)
    summaries = [
        a.manifest["summary"] for a, _ in rewards if a.manifest["summary"].get("held_out_accuracy") is not None
    ]
    return {"charts": report.show(figures.accuracy_by_gap(rows)) if rows else [], "rows": rows, "rewards": summaries}


def _samples(results: list[RunResult], count: int) -> list[dict[str, Any]]:
    """The first prompts, each with what every run answered."""
    by_run = {result.name: {row["prompt"]: row for row in result.samples()} for result in results}
    prompts = list(dict.fromkeys(prompt for rows in by_run.values() for prompt in rows))[:count]
    return [
        {"prompt": prompt, "answers": [(name, rows[prompt]) for name, rows in by_run.items() if prompt in rows]}
        for prompt in prompts
    ]


def _sources(report: Report, results: list[RunResult]) -> Rows:
    """What was read, kept and dropped, a row a source."""
    sources = {
        json.dumps(source, sort_keys=True): source
        for stage in ("sft", "reward")
        for artifact, _ in distinct(results, stage)
        for source in artifact.manifest["summary"].get("data", [])
    }
    rows = list(sources.values())
    report.table("data", [{**row, "dropped": json.dumps(row["dropped"], sort_keys=True)} for row in rows])
    return rows


def _truncation(report: Report, results: list[RunResult]) -> Rows:
    """How many texts were cut to the token limits, a row an artifact that says so."""
    rows: Rows = []
    for stage in ("sft", "reward"):
        for artifact, _ in distinct(results, stage):
            if "tokens" in artifact.manifest["summary"]:
                rows.append({"artifact": artifact.id, **artifact.manifest["summary"]["tokens"]})
    for artifact, _ in distinct(results, "evaluate"):
        summary = artifact.manifest["summary"]
        if "truncated_prompts" in summary:
            cut = {"rows": summary["prompts"], "truncated_prompts": summary["truncated_prompts"]}
            rows.append({"artifact": artifact.id, **cut})
    return report.table("truncation", rows)


def _environments(results: list[RunResult]) -> list[dict[str, Any]]:
    """The different machines and versions, each with the runs that it made; commands are told apart elsewhere."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        path = result.folder / "env.json"
        if path.is_file():
            env = json.loads(path.read_text(encoding="utf-8"))
            env.pop("command", None)
            one = found.setdefault(json.dumps(env, sort_keys=True), {"runs": [], "env": env})
            one["runs"].append(result.name)
    return list(found.values())


def _commands(results: list[RunResult], configs: dict[str, Config]) -> list[dict[str, Any]]:
    """For each different configuration: the command that was given, and the one that repeats it from what is kept."""
    found: dict[Config, dict[str, Any]] = {}
    for result in results:
        config, path = configs[result.name], result.folder / "env.json"
        given = json.loads(path.read_text(encoding="utf-8")).get("command", []) if path.is_file() else []
        command = {
            "runs": [],
            "seed": config.seed,
            "world_seed": config.data.toy.seed if config.data.kind == "toy" else None,
            "given": shlex.join(["mpo", *given[1:]]) if len(given) > 1 else "",
            "again": shlex.join(["mpo", "run", str(result.folder / "config.yaml"), f"workdir={config.workdir}-again"]),
        }
        found.setdefault(config, command)["runs"].append(result.name)
    return list(found.values())


def _artifacts(workdir: Path, results: list[RunResult]) -> Rows:
    """Every run's artifacts by role, in the order they are made, with addresses as seen from the report's folder."""
    order = {"sft": 0, "reward": 1, "select": 2, "evaluate": 4}
    rows: Rows = []
    for result in results:
        roles = sorted(result.artifacts.items(), key=lambda item: order.get(item[0], 3))
        # artifact paths have no links in them, so the folder that they are seen from must not either
        address = {role: os.path.relpath(artifact.path, workdir.resolve() / "report") for role, artifact in roles}
        links = [(role, artifact.id, quote(address[role]) + "/") for role, artifact in roles]
        rows.append({"run": result.name, "artifacts": links})
    return rows
