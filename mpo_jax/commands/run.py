"""`mpo run` and its parts: build runs through the pipeline, print and report them."""

import json
import time
from pathlib import Path

from rich.markup import escape

from mpo_jax import __version__, runtime
from mpo_jax.artifacts import write_json
from mpo_jax.config import Config, ExperimentName, load_config
from mpo_jax.errors import UserError
from mpo_jax.experiments import EXPERIMENTS
from mpo_jax.pipeline import Pipeline, StageName
from mpo_jax.processes import is_main
from mpo_jax.report import results
from mpo_jax.report.page import write_report
from mpo_jax.report.seeds import over_seeds, write_seeds
from mpo_jax.tracker import console


def run(config: Config) -> None:
    """`mpo run`: every experiment of the configuration, the table, and the report."""
    _start(config)
    _build(config)


def _start(config: Config) -> None:
    runtime.start(config.runtime)
    console.quiet = not is_main()


def _build(config: Config) -> None:
    begin = time.perf_counter()
    pipeline = Pipeline(config)
    runs = [pipeline.experiment(name) for name in config.experiment]
    if not is_main():
        return
    workdir = Path(config.workdir)
    finished = results.collect(workdir, tuple(made.experiment for made in runs))
    page = _report(workdir, config)
    console.print(results.terminal_table(results.main_rows(finished), "Held-out prompts: mean ± standard error"))
    _show_samples(finished)
    made, reused = len(pipeline.store.made), len(pipeline.store.reused)
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
    page = write_report(workdir, resamples=config.evaluate.bootstrap_resamples)
    write_json(record, inputs)
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
    pipeline = Pipeline(config)
    for name in names:
        made = pipeline.experiment(name, until=stage)
        built = [artifact for artifact in made.artifacts.values() if artifact.manifest["stage"] == stage]
        console.print(f"{name}: {built[-1].path}", soft_wrap=True)


def table(config: Config, seeds: tuple[int, ...]) -> None:
    """`mpo table`: the configuration's experiments for each seed, in `<workdir>/seed-N`, and the table over seeds."""
    _start(config)
    workdir = Path(config.workdir)
    for seed in seeds:
        console.rule(f"seed {seed}")
        toy = config.data.toy.model_copy(update={"seed": config.data.toy.seed + seed})
        data = config.data.model_copy(update={"toy": toy})
        _build(config.model_copy(update={"seed": seed, "workdir": str(workdir / f"seed-{seed}"), "data": data}))
    if not is_main():
        return
    by_seed = {seed: results.collect(workdir / f"seed-{seed}", config.experiment) for seed in seeds}
    rows = over_seeds(by_seed)
    console.print(results.terminal_table(rows, f"{len(seeds)} seeds: mean over seeds ± standard error over seeds"))
    for path in write_seeds(workdir, by_seed):
        console.print(f"wrote {path}", soft_wrap=True)


def report(workdir: Path) -> None:
    """`mpo report`: the report of a workdir from its finished runs."""
    finished = results.collect(workdir)
    config = load_config(finished[0].folder / "config.yaml")
    console.print(f"report: {write_report(workdir, resamples=config.evaluate.bootstrap_resamples)}", soft_wrap=True)
