"""`mpo table`: the paper's runs for several seeds, and from them its tables, figures and claims."""

from pathlib import Path

from mpo_jax.cli.summary import show_categories, show_cautions
from mpo_jax.config.load import to_yaml
from mpo_jax.config.schema import Config
from mpo_jax.errors import NothingSelected
from mpo_jax.pipeline.artifacts import Store
from mpo_jax.pipeline.bucket import Bucket
from mpo_jax.pipeline.experiments import table_variants
from mpo_jax.pipeline.pipeline import Pipeline
from mpo_jax.pipeline.table import Planned, estimates, plan_table, seed_config
from mpo_jax.runtime import machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_text
from mpo_jax.runtime.processes import is_main
from mpo_jax.runtime.progress import Expected, Overall, duration
from mpo_jax.tools.report import results
from mpo_jax.tools.report.evidence import gather, write_evidence
from mpo_jax.tools.report.page import write_report
from mpo_jax.tools.report.provenance import TABLE_CONFIG
from mpo_jax.tools.report.verdict_rows import find_verdicts
from mpo_jax.training import wandb_log


def table(config: Config) -> None:
    """Makes what is missing, seed by seed in `<workdir>/seed-N`, then writes tables, figures and the report.

    A run whose split leaves nothing to train on is left out and named; everything else that fails ends the command,
    and the same command goes on from there.
    """
    machine.start(config.runtime)
    console.quiet = not is_main()
    if is_main():
        wandb_log.check(config.runtime.wandb)
    workdir = Path(config.workdir)
    stages = plan_table(config)
    overall = Overall(estimates(config, stages))
    _announce(config, stages, overall)
    if is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / TABLE_CONFIG, [to_yaml(config)])
    left_out: dict[str, str] = {}
    for seed in config.table.seeds:
        console.rule(f"seed {seed}")
        _make(seed_config(config, seed), config, overall, stages, left_out)
    if not is_main():
        return
    names = tuple(variant.name for variant in table_variants(config.table, config.select))
    by_seed = {seed: results.collect(workdir / f"seed-{seed}", names) for seed in config.table.seeds}
    resamples = config.evaluate.bootstrap_resamples
    evidence = gather(by_seed, find_verdicts(workdir), resamples=resamples)
    title = f"{len(by_seed)} seed{'s' * (len(by_seed) > 1)}: mean ± standard error over {evidence.error_over}"
    console.print(results.terminal_table(evidence.over, title))
    show_categories(by_seed)
    claims = write_evidence(workdir, evidence, resamples=resamples, left_out=left_out)
    console.print(f"\n{claims}", markup=False, soft_wrap=True)
    show_cautions(by_seed)
    for folder in ("tables", "figures"):
        console.print(f"{folder}: {workdir / folder}", soft_wrap=True)
    page = write_report(workdir, resamples=resamples, by_seed=by_seed, evidence=evidence)
    if (bucket := Bucket.of(config)) is not None:
        bucket.send_results(workdir)
    wandb_log.log_report(config, workdir)
    console.print(f"report: {page}", soft_wrap=True)


def _make(config: Config, whole: Config, overall: Overall, stages: list[Planned], left_out: dict[str, str]) -> None:
    """All runs of one seed."""
    store = Store(Path(config.workdir), overall, bucket=Bucket.of(config))
    pipeline = Pipeline(config, store)
    for variant in table_variants(whole.table, whole.select):
        try:
            pipeline.record(pipeline.experiment(variant.name))
        except NothingSelected as nothing:
            left_out[f"{variant.name}, seed {config.seed}"] = str(nothing)
            console.print(f"{variant.name} is left out: {nothing}", soft_wrap=True, markup=False)
            own = {s.name for s in stages if s.seed == config.seed and s.runs == [variant.name]}
            overall.leave_out(own)
    console.print(f"seed {config.seed}: {len(store.made)} stages made, {len(store.reused)} reused")


def _announce(config: Config, stages: list[Planned], overall: Overall) -> None:
    names = [variant.name for variant in table_variants(config.table, config.select)]
    seeds = ", ".join(map(str, config.table.seeds))
    console.print(f"runs, in this order, for seed {seeds}: {', '.join(names)}", soft_wrap=True)
    there = sum(stage.is_there for stage in stages)
    console.print(f"{len(stages)} stages: {there} there already, {len(stages) - there} to make; {overall.text()}")


def dry_run(config: Config) -> None:
    """`mpo table --dry-run`: the graph of stages, what is there, and what the rest will take; makes nothing."""
    machine.start(config.runtime)
    console.quiet = not is_main()
    stages = plan_table(config)
    expected = {one.name: one for one in estimates(config, stages)}
    seed = None
    for stage in stages:
        if stage.seed != seed:
            seed = stage.seed
            console.print(f"seed {seed}, in the order in which stages are made:")
        console.print(_line(stage, expected.get(stage.name)), soft_wrap=True, markup=False)
    seconds = sum(one.seconds or 0.0 for one in expected.values())
    console.print(f"{len(stages)} stages: {len(stages) - len(expected)} there already, {len(expected)} to make")
    if expected:
        guessed = sum(not one.measured for one in expected.values())
        basis = "as long as the same stages of other seeds took"
        if guessed:
            basis = (
                f"{guessed} of them by counted arithmetic and a matrix product timed just now, which a factor of three "
                "can be off; finished stages of one seed give the next ones' times"
            )
        console.print(f"about {duration(seconds)} to go ({basis})", soft_wrap=True)


def _line(stage: Planned, expected: Expected | None) -> str:
    """A stage of the graph: its state, what it is made from, and the runs that it is for."""
    if stage.seconds is not None:
        state = f"there, {duration(stage.seconds)}"
    elif expected is not None and expected.seconds is not None:
        state = f"to make, {'' if expected.measured else 'roughly '}{duration(expected.seconds)}"
    else:
        state = "to make"
    parents = ", ".join(dict.fromkeys(stage.recipe["parents"].values()))
    return f"  {state:24} {stage.name}{f' <- {parents}' if parents else ''}  [{', '.join(stage.runs)}]"
