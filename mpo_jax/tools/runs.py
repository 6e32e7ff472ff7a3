"""Runs of the method: made through the pipeline, collected, and reported."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpo_jax.config.registry import EXPERIMENTS
from mpo_jax.config.schema import Config, ExperimentName
from mpo_jax.errors import Damaged, UserError
from mpo_jax.pipeline import preflight
from mpo_jax.pipeline.keeping import ModelStore
from mpo_jax.pipeline.pipeline import Pipeline, StageName
from mpo_jax.runtime import machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import read_json, write_json
from mpo_jax.runtime.outputs import check_output_folder
from mpo_jax.runtime.processes import REPORTED, is_main, wait
from mpo_jax.runtime.version import __version__
from mpo_jax.tools.report import results
from mpo_jax.tools.report.place import FOLDER, INPUTS, PAGE, check_place
from mpo_jax.tools.report.provenance import TABLE_CONFIG
from mpo_jax.training import wandb_log
from mpo_jax.types import Artifact

if TYPE_CHECKING:
    from mpo_jax.tools.report.seeds import BySeed


@dataclasses.dataclass(frozen=True)
class Finished:
    """Runs that were made or reused.

    Attributes:
      page: the report.
      num_made, num_reused: stages.
      seconds: the time all of it took.
    """

    results: list[results.RunResult]
    page: Path
    num_made: int
    num_reused: int
    seconds: float


def start(config: Config) -> None:
    """Applies the runtime section; of several processes only the main one prints, and checks that W&B can log."""
    machine.start(config.runtime)
    console.quiet = not is_main()
    if is_main():
        wandb_log.check(config.runtime.wandb)


def run_experiments(config: Config) -> Finished | None:
    """Makes what is missing of every experiment of the configuration, and the report; None except in process 0."""
    begin = time.perf_counter()
    check_place(Path(config.workdir))
    store, pipeline = _checked(config, config.experiment)
    store.request(pipeline, config.experiment)
    runs = []
    for name in config.experiment:
        runs.append(pipeline.experiment(name))
        pipeline.record(runs[-1])
    store.finish()
    if not is_main():
        # a process that ends waits for the others only as long as for a heartbeat
        wait(REPORTED)
        return None
    workdir = Path(config.workdir)
    finished = results.collect(workdir, tuple(made.name for made in runs))
    page = _report(workdir, config)
    if store.bucket is not None:
        store.bucket.send_results(workdir)
    wait(REPORTED)
    return Finished(finished, page, len(store.made), len(store.reused), time.perf_counter() - begin)


def _checked(config: Config, names: Sequence[str], until: StageName = "evaluate") -> tuple[ModelStore, Pipeline]:
    """The store and the pipeline, once everything that the missing stages need is known to be there."""
    inputs_checked = preflight.check_fresh(config, until)
    store = ModelStore(config)
    pipeline = Pipeline(config, store)
    preflight.check_missing(pipeline, names, until, inputs_checked=inputs_checked)
    wait(preflight.CHECKED)
    return store, pipeline


def run_until(config: Config, stage: StageName) -> Iterator[tuple[ExperimentName, Artifact]]:
    """Makes one stage and what it needs for every experiment that has it, and gives each experiment's last of the kind.

    Raises:
      UserError: if no experiment of the configuration has the stage.
    """
    always = stage not in ("dpo", "ppo")
    names: list[ExperimentName] = [
        name for name in config.experiment if always or any(s.algorithm == stage for s in EXPERIMENTS[name])
    ]
    if not names:
        raise UserError(
            f"experiment={','.join(config.experiment)} has no {stage} step: choose another, experiment=NAME"
        )
    store, pipeline = _checked(config, names, stage)
    for name in names:
        made = pipeline.experiment(name, until=stage)
        pipeline.record(made)
        built = [artifact for artifact in made.artifacts.values() if artifact.manifest["stage"] == stage]
        yield name, store.restored(built[-1])


def rewrite_report(workdir: Path, price: float | None = None) -> tuple[Path, "BySeed"]:
    """Writes the report of a workdir's finished runs, or of those of a table's seeds; its page, and the runs.

    A table's folders `tables` and `figures` are written again too: since it ended there may be new verdicts.

    Args:
      price: of a device for an hour; the stages' costs are shown with it.
    """
    from mpo_jax.tools.report.page import write_report, write_table_report
    from mpo_jax.tools.report.seeds import collect_seeds

    by_seed = collect_seeds(workdir)
    check_output_folder("WORKDIR", workdir)
    config = next(iter(by_seed.values()))[0].config
    resamples = config.evaluate.bootstrap_resamples
    if (workdir / TABLE_CONFIG).is_file():
        page, _, _ = write_table_report(workdir, by_seed, resamples=resamples, price=price)
    else:
        page = write_report(workdir, resamples=resamples, by_seed=by_seed, price=price)
    wandb_log.log_report(config, workdir)
    return page, by_seed


def report_training(workdir: Path, trained: list[results.RunResult], price: float | None = None) -> Path:
    """Writes the report of runs without an evaluation; its page."""
    from mpo_jax.tools.report.page import write_training_report

    check_output_folder("WORKDIR", workdir)
    return write_training_report(workdir, trained, price)


def _report(workdir: Path, config: Config) -> Path:
    """Writes the report, unless this version has already written it from the same runs."""
    shown = {run.name: {role: made.id for role, made in run.artifacts.items()} for run in results.collect(workdir)}
    inputs = {"version": __version__, "runs": shown, "config": config.model_dump(mode="json")}
    page, record = workdir / FOLDER / PAGE, workdir / FOLDER / INPUTS
    with contextlib.suppress(Damaged):
        if page.is_file() and record.is_file() and read_json(record, "") == inputs:
            return page
    # figures need Matplotlib and SciPy, a quarter of what a start would import
    from mpo_jax.tools.report.page import write_report

    by_seed = {config.seed: results.collect(workdir)}
    page = write_report(workdir, resamples=config.evaluate.bootstrap_resamples, by_seed=by_seed)
    write_json(record, inputs)
    wandb_log.log_report(config, workdir)
    return page
