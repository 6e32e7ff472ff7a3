"""`mpo sft`, `reward`, `select`, `dpo`, `ppo` and `evaluate`: the method up to one stage."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpo_jax.cli.arguments import (
    PLAIN,
    BaseModel,
    ConfigPath,
    DataPaths,
    Out,
    Overrides,
    expanded,
    read_run,
    short_keys,
)
from mpo_jax.cli.starting import print_tensorboard, starting
from mpo_jax.config.registry import TRAINED
from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console
from mpo_jax.runtime.words import counted

if TYPE_CHECKING:
    from mpo_jax.config.schema import Config

STAGES = {
    "sft": "supervised fine-tuning",
    "reward": "the reward model",
    "select": "data selection",
    "dpo": "the experiment's last DPO step",
    "ppo": "the experiment's last PPO step",
    "evaluate": "evaluation, without the report",
}
"""Each stage's command and what it runs up to."""


def register(app: typer.Typer) -> None:
    """Adds a command for each stage."""
    for name, what in STAGES.items():
        text = f"Run the method up to {what}."
        if name in TRAINED:
            text += f" train.KEY=VALUE stands for {name}.train.KEY=VALUE."
        if name in PLAIN:
            text += f" Without CONFIG the experiment is {PLAIN[name]}."
        command = select if name == "select" else (_training_command if name in TRAINED else _stage_command)(name)
        app.command(name, help=text)(command)


def select(
    config: ConfigPath = None,
    overrides: Overrides = None,
    model: BaseModel = None,
    data: DataPaths = None,
    out: Out = None,
    export: Annotated[
        Path | None,
        typer.Option(
            parser=expanded,
            metavar="DIR",
            help="folder for easy.jsonl and hard.jsonl, TRL's pairs, and hard_prompts.jsonl",
        ),
    ] = None,
) -> None:
    """`mpo select`."""
    if export is not None:
        from mpo_jax.runtime.outputs import check_output_folder
        from mpo_jax.tools.selected import FILES

        check_output_folder("--export", export, FILES)
        given = read_run("select", config, [*(overrides or ()), *short_keys(model, data, out)])[1]
        for name in ("stages", "runs", "report"):
            if (Path(given.workdir) / name).resolve() in (export.resolve(), *export.resolve().parents):
                raise UserError(f"--export {export} lies in the workdir's own folder {name}: name another")
        check_output_folder("--export", export, FILES, given.data.path or ())
    resolved, artifacts = _run(config, [*(overrides or ()), *short_keys(model, data, out)], "select")
    if export is None:
        return
    from mpo_jax.data.corpus import turns_of
    from mpo_jax.runtime.processes import is_main
    from mpo_jax.tools.report.results import split_label
    from mpo_jax.tools.selected import export_selection

    # all experiments have one selection
    if is_main():
        for name, rows in export_selection(artifacts[0], resolved.select, turns_of(resolved), export).items():
            console.print(f"wrote {export / name}: {counted(rows, 'row')}", soft_wrap=True)
            if not rows:
                console.print(
                    f"{name} is empty: no pair is on that side of the split ({split_label(resolved.select)})",
                    style="yellow",
                    soft_wrap=True,
                )
        if share := resolved.data.validation_fraction:
            console.print(
                f"rows whose prompt is held out (data.validation_fraction={share:g}) are in none of these files; "
                "data.validation_fraction=0 holds out none",
                soft_wrap=True,
            )


def _stage_command(name: str) -> Callable[..., None]:
    def command(
        config: ConfigPath = None,
        overrides: Overrides = None,
        model: BaseModel = None,
        data: DataPaths = None,
        out: Out = None,
    ) -> None:
        _run(config, [*(overrides or ()), *short_keys(model, data, out)], name)

    return command


def _training_command(name: str) -> Callable[..., None]:
    def command(
        config: ConfigPath = None,
        overrides: Overrides = None,
        model: BaseModel = None,
        data: DataPaths = None,
        out: Out = None,
        log_every: Annotated[
            int | None, typer.Option(min=1, help="train.log_every; with 1 a line a step, where there is no terminal")
        ] = None,
    ) -> None:
        every = [] if log_every is None else [f"train.log_every={log_every}"]
        _run(config, [*(overrides or ()), *short_keys(model, data, out), *every], name)

    return command


def _run(given: str | None, overrides: Sequence[str], stage: str) -> tuple["Config", list[Path]]:
    """Makes a stage and prints where it is, each folder once; returns the configuration and the folders."""
    path, config = read_run(stage, given, overrides, stage=stage if stage in TRAINED else None)
    with starting(stage, path, config):
        from mpo_jax.tools import runs

    runs.start(config)
    users: dict[Path, list[str]] = {}
    for name, artifact in runs.run_until(config, stage):  # type: ignore[arg-type]
        users.setdefault(artifact.path, []).append(name)
    for made, names in users.items():
        console.print(f"{', '.join(names)}: {made}", soft_wrap=True)
    if stage in TRAINED:
        print_tensorboard(config)
    return config, list(users)
