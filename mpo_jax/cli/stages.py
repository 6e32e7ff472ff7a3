"""`mpo sft`, `reward`, `select`, `dpo`, `ppo` and `evaluate`: the method up to one stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mpo_jax.cli.arguments import ConfigPath, Overrides
from mpo_jax.cli.starting import starting
from mpo_jax.config.registry import TRAINED
from mpo_jax.runtime.console import console

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
        app.command(name, help=text)((_training_command if name in TRAINED else _stage_command)(name))


def _stage_command(name: str) -> Callable[..., None]:
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        _run(config, tuple(overrides or ()), name)

    return command


def _training_command(name: str) -> Callable[..., None]:
    def command(
        config: ConfigPath,
        overrides: Overrides = None,
        log_every: Annotated[
            int | None, typer.Option(min=1, help="train.log_every; with 1 a line a step, where there is no terminal")
        ] = None,
    ) -> None:
        given = [*(overrides or ()), *([] if log_every is None else [f"train.log_every={log_every}"])]
        _run(config, tuple(given), name)

    return command


def _run(path: Path, overrides: tuple[str, ...], stage: str) -> None:
    from mpo_jax.config.load import load_config

    config = load_config(path, overrides, stage=stage if stage in TRAINED else None)
    with starting(stage, path, config):
        from mpo_jax.tools import runs

    runs.start(config)
    for name, artifact in runs.run_until(config, stage):  # type: ignore[arg-type]
        console.print(f"{name}: {artifact.path}", soft_wrap=True)
