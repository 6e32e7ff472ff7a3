"""`mpo run` and its parts: build runs through the pipeline, print and report them."""

import json
import time
from pathlib import Path

from rich.markup import escape

from mpo_jax import __version__
from mpo_jax.cli.summary import show_categories, show_cautions
from mpo_jax.config.registry import EXPERIMENTS
from mpo_jax.config.schema import Config, ExperimentName
from mpo_jax.errors import UserError
from mpo_jax.pipeline.artifacts import Store
from mpo_jax.pipeline.bucket import Bucket
from mpo_jax.pipeline.pipeline import Pipeline, StageName
from mpo_jax.runtime import machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_json
from mpo_jax.runtime.processes import is_main
from mpo_jax.tools.report import results
from mpo_jax.tools.report.page import write_report
from mpo_jax.tools.report.seeds import collect_seeds
from mpo_jax.training import wandb_log


def run(config: Config) -> None:
    """`mpo run`: every experiment of the configuration, the table, and the report."""
    _start(config)
    _build(config)


def _start(config: Config) -> None:
    machine.start(config.runtime)
    console.quiet = not is_main()
    if is_main():
        wandb_log.check(config.runtime.wandb)


def _build(config: Config) -> None:
    begin = time.perf_counter()
    store = Store(Path(config.workdir), bucket=Bucket.of(config))
    pipeline = Pipeline(config, store)
    runs = []
    for name in config.experiment:
        runs.append(pipeline.experiment(name))
        pipeline.record(runs[-1])
    if not is_main():
        return
    workdir = Path(config.workdir)
    finished = results.collect(workdir, tuple(made.name for made in runs))
    page = _report(workdir, config)
    if store.bucket is not None:
        store.bucket.send_results(workdir)
    console.print(results.terminal_table(results.main_rows(finished), "Held-out prompts: mean ± standard error"))
    by_seed = {config.seed: finished}
    show_categories(by_seed)
    _show_samples(finished)
    show_cautions(by_seed)
    made, reused = len(store.made), len(store.reused)
    console.print(
        f"{made} stages made, {reused} reused in {time.perf_counter() - begin:.0f} s"
        + ("" if made else ": everything was there already, nothing was computed")
    )
    console.print(f"report: {page}", soft_wrap=True)


def _report(workdir: Path, config: Config) -> Path:
    """Writes the report, unless the one that is there was written from the very same runs by this version."""
    shown = {run.name: {role: made.id for role, made in run.artifacts.items()} for run in results.collect(workdir)}
    inputs = {"version": __version__, "runs": shown, "config": config.model_dump(mode="json")}
    page, record = workdir / "report" / "index.html", workdir / "report" / "inputs.json"
    if page.is_file() and record.is_file() and json.loads(record.read_text(encoding="utf-8")) == inputs:
        return page
    by_seed = {config.seed: results.collect(workdir)}
    page = write_report(workdir, resamples=config.evaluate.bootstrap_resamples, by_seed=by_seed)
    write_json(record, inputs)
    wandb_log.log_report(config, workdir)
    return page


def _show_samples(finished: list[results.RunResult], count: int = 2) -> None:
    """The first prompts' responses side by side."""
    samples = {result.name: result.samples() for result in finished}
    for row in range(min(count, *(len(rows) for rows in samples.values()))):
        prompt = next(iter(samples.values()))[row]["prompt"].strip()
        shown = prompt if len(prompt) < 600 else "..." + prompt[-600:]
        console.print(f"\n[bold]prompt[/bold] {escape(shown)}", soft_wrap=True)
        for name, rows in samples.items():
            values = f"reward {rows[row]['score']:.2f}"
            if "utility" in rows[row]:
                values += f", true utility {rows[row]['utility']:.2f}"
            console.print(f"[bold]{name}[/bold] ({values}):{escape(rows[row]['response'])}", soft_wrap=True)
    console.print()


def run_until(config: Config, stage: StageName) -> None:
    """`mpo sft`, `mpo reward`, ...: one stage and what it needs, for every experiment that has it."""
    _start(config)
    always = stage not in ("dpo", "ppo")
    names: list[ExperimentName] = [
        name for name in config.experiment if always or any(s.algorithm == stage for s in EXPERIMENTS[name])
    ]
    if not names:
        raise UserError(
            f"experiment={','.join(config.experiment)} has no {stage} step: choose another, experiment=NAME"
        )
    pipeline = Pipeline(config, Store(Path(config.workdir), bucket=Bucket.of(config)))
    for name in names:
        made = pipeline.experiment(name, until=stage)
        if stage == "evaluate":
            pipeline.record(made)
        built = [artifact for artifact in made.artifacts.values() if artifact.manifest["stage"] == stage]
        console.print(f"{name}: {built[-1].path}", soft_wrap=True)


def report(workdir: Path) -> None:
    """`mpo report`: the report of a workdir from its finished runs, or from those of a table's seeds."""
    by_seed = collect_seeds(workdir)
    config = next(iter(by_seed.values()))[0].config
    page = write_report(workdir, resamples=config.evaluate.bootstrap_resamples, by_seed=by_seed)
    wandb_log.log_report(config, workdir)
    console.print(f"report: {page}", soft_wrap=True)
