"""Arguments that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mpo_jax.config.schema import Config

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, or more YAML files")]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="run, stage or model folder, .gguf file, or hub id")]
Workdir = Annotated[Path, typer.Argument(metavar="WORKDIR")]

SideA = Annotated[str, typer.Argument(metavar="A", help="run, file of rows {prompt, response}, or model with --data")]
SideB = Annotated[str, typer.Argument(metavar="B", help="the other side, likewise")]
ComparedOn = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help="rows {prompt} to compare on, which a model answers")
]


def read_config(config: Path | None, overrides: list[str] | None) -> "Config":
    """The configuration that a command line names."""
    from mpo_jax.config.load import load_config

    return load_config(config, tuple(overrides or ()))
