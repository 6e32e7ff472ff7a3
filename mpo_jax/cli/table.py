"""`mpo table`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpo_jax.cli.arguments import BaseModel, ConfigPath, DataPaths, Out, Overrides, read_run, short_keys
from mpo_jax.cli.starting import print_tensorboard, starting
from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console
from mpo_jax.runtime.progress import Expected, duration
from mpo_jax.runtime.words import counted, size

if TYPE_CHECKING:
    from mpo_jax.config.schema import Config
    from mpo_jax.pipeline.disk import DiskUse
    from mpo_jax.pipeline.table import TableStage


def table(
    config: ConfigPath = None,
    overrides: Overrides = None,
    model: BaseModel = None,
    data: DataPaths = None,
    out: Out = None,
    seeds: Annotated[
        str | None, typer.Option(help="comma-separated seeds, each in its own folder of the workdir; as seeds=0,1,2")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="show the stages, what is there, time and disk space; make nothing")
    ] = False,
) -> None:
    """Make the paper's runs for every seed, then its tables, figures and claims over seeds, and the report.

    seeds=0,1,2 and experiment=NAME,NAME stand for table.seeds and table.experiment.
    """
    words = [*([] if config is None else [config]), *(overrides or ()), *short_keys(model, data, out)]
    words += [] if seeds is None else [f"seeds={seeds}"]
    whole = [f"table.{word}" if word.startswith(("seeds=", "experiment=")) else word for word in words]
    path, resolved = read_run("table", whole[0] if whole else None, whole[1:])
    if single := next((word for word in words if word.startswith("seed=")), None):
        # a table ignores `seed`: its folder seed-0 would pass for the seed that was asked for
        raise UserError(f"{single}: a table makes the seeds of table.seeds: give seeds={single.removeprefix('seed=')}")
    if dry:
        _dry_run(resolved)
    else:
        _make(path, resolved)


def _make(path: Path | None, config: "Config") -> None:
    with starting("table", path, config):
        from mpo_jax.tools import runs
        from mpo_jax.tools.report import terminal
        from mpo_jax.tools.seed_table import SeedTable

    runs.start(config)
    made = SeedTable(config)
    console.print(f"runs, in this order, for seed {made.seed_list}: {', '.join(made.names)}", soft_wrap=True)
    there = sum(stage.is_there for stage in made.stages)
    console.print(
        f"{counted(len(made.stages), 'stage')}: {there} there already, {len(made.stages) - there} to make; "
        f"{made.overall.text()}"
    )
    made.begin()
    for seed in config.table.seeds:
        console.rule(f"seed {seed}")
        store = made.make(seed, left_out=_print_left_out)
        console.print(f"seed {seed}: {counted(len(store.made), 'stage')} made, {len(store.reused)} reused")
    finished = made.finish()
    if finished is None:
        return
    num_seeds = len(finished.by_seed)
    title = f"{num_seeds} seed{'s' * (num_seeds > 1)}: mean ± standard error over {finished.evidence.error_over}"
    console.print(terminal.runs_table(finished.evidence.over, title))
    terminal.print_categories(finished.by_seed)
    console.print(f"\n{finished.claims}", markup=False, soft_wrap=True)
    terminal.print_cautions(finished.by_seed)
    for folder in finished.folders:
        console.print(f"{folder.name}: {folder}", soft_wrap=True)
    console.print(f"report: {finished.page}", soft_wrap=True)
    print_tensorboard(config)


def _print_left_out(name: str, reason: str) -> None:
    console.print(f"{name} is left out: {reason}", soft_wrap=True, markup=False)


def _dry_run(config: "Config") -> None:
    """Prints the graph of stages, what is there, how long the rest will take, and the disk space of all."""
    from mpo_jax.pipeline.basis import Basis
    from mpo_jax.pipeline.disk import disk_use
    from mpo_jax.pipeline.table import estimates, table_stages
    from mpo_jax.runtime import machine
    from mpo_jax.runtime.processes import is_main

    machine.start(config.runtime)
    console.quiet = not is_main()
    stages, read = table_stages(config), Basis(config)
    expected = {one.name: one for one in estimates(config, stages, read)}
    seed = None
    for stage in stages:
        if stage.seed != seed:
            seed = stage.seed
            console.print(f"seed {seed}, in the order in which stages are made:")
        console.print(_line(stage, expected.get(stage.name)), soft_wrap=True, markup=False)
    seconds = sum(one.seconds or 0.0 for one in expected.values())
    there = len(stages) - len(expected)
    console.print(f"{counted(len(stages), 'stage')}: {there} there already, {len(expected)} to make")
    if expected:
        guessed = sum(not one.measured for one in expected.values())
        basis = "as long as the same stages of other seeds took"
        if guessed:
            basis = (
                f"{guessed} of them by counted arithmetic and a matrix product timed just now, which a factor of three "
                "can be off; finished stages of one seed give the next ones' times"
            )
        console.print(f"about {duration(seconds)} to go, without compilation ({basis})", soft_wrap=True)
    _print_disk(config, stages, disk_use(config, stages, read))


def _print_disk(config: "Config", stages: "list[TableStage]", use: "DiskUse") -> None:
    from mpo_jax.runtime import machine

    kinds = {stage.kind: use.sizes[stage.name] for stage in reversed(stages) if not stage.is_there}
    if kinds:
        each = ", ".join(f"{kind} {size(own.kept)}" for kind, own in reversed(kinds.items()))
        dtype = machine.save_dtype(config.runtime)
        console.print(f"disk for each stage (models in {dtype}, rows at full length): {each}", soft_wrap=True)
    most = f", {size(use.peak)} at its peak" + (f", during {use.at}" if use.at else "")
    console.print(
        f"disk of the workdir: {size(use.there)} there, {size(use.total)} at the end{most}; {size(use.free)} free "
        "(TensorBoard's files and the report are not counted)",
        soft_wrap=True,
    )
    if use.lacking:
        console.print(
            f"[yellow]the disk lacks {size(use.lacking)}: use another workdir, or save space with runtime.keep=last, "
            "ppo.save_critic=false, runtime.save_dtype=bfloat16, *.train.keep_checkpoints=1 or a runtime.bucket"
            "[/yellow]",
            soft_wrap=True,
        )


def _line(stage: "TableStage", expected: Expected | None) -> str:
    """A stage of the graph: its state, its parents, and the runs that use it."""
    if stage.seconds is not None:
        state = f"there, {duration(stage.seconds)}"
    elif expected is not None and expected.seconds is not None:
        state = f"to make, {'' if expected.measured else 'roughly '}{duration(expected.seconds)}"
    else:
        state = "to make"
    parents = ", ".join(dict.fromkeys(stage.recipe["parents"].values()))
    return f"  {state:24} {stage.name}{f' <- {parents}' if parents else ''}  [{', '.join(stage.runs)}]"
