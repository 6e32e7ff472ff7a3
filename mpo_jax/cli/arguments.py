"""Arguments that several commands share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpo_jax.errors import UserError

if TYPE_CHECKING:
    from mpo_jax.config.schema import Config


def expanded(path: str | Path) -> Path:
    """A path of the command line, with a `~` that the shell has left: in quotes, or behind a `=`."""
    if path == "":
        # a shell variable that is not set would stand for the current folder
        raise UserError("an empty path was given: name a file or folder, or . for the current one")
    return Path(path).expanduser()


ConfigPath = Annotated[
    str | None, typer.Argument(metavar="CONFIG", help="YAML file; may be left out where KEY=VALUE follows")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, or more YAML files")]
ModelPath = Annotated[
    str, typer.Argument(metavar="MODEL", help="workdir, run, stage or model folder, .gguf file, or hub id")
]
Workdir = Annotated[Path, typer.Argument(parser=expanded, metavar="WORKDIR")]

BaseModel = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="model.path")]
DataPaths = Annotated[
    list[str] | None, typer.Option("--data", metavar="ROWS", help="data.path; give it again for further files")
]
Out = Annotated[str | None, typer.Option("--out", metavar="DIR", help="workdir")]

SideA = Annotated[
    str, typer.Argument(metavar="A", help="run, rows {prompt, response}, FILE:FIELD, or model with --data")
]
SideB = Annotated[str, typer.Argument(metavar="B", help="the other side, likewise")]
ComparedOn = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help="rows {prompt} to compare on, which a model answers")
]


PLAIN = {"sft": "sft", "dpo": "dpo_base", "ppo": "ppo"}
"""The experiment of a training command without a YAML file: its own stage alone, on the rows as they are."""


def short_keys(model: str | None, data: list[str] | None, out: str | None) -> list[str]:
    """The overrides that --model, --data and --out stand for."""
    given = {"model.path": model, "data.path": data or None, "workdir": out}
    # as JSON, which YAML reads back to the same text whatever it looks like
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


def refuse_rows(overrides: Sequence[str] | None) -> None:
    """Raises UserError for an override of the rows, which the command takes as an argument."""
    if given := [one for one in overrides or () if one.partition("=")[0] == "data.path"]:
        raise UserError(f"{given[0]}: the rows are the argument DATA; leave the override out")


def split_config(config: str | Path | None, overrides: Sequence[str] | None) -> tuple[Path | None, tuple[str, ...]]:
    """The YAML file, None where the first argument is KEY=VALUE already, and the overrides."""
    given = tuple(overrides or ())
    if config is None:
        return None, given
    if "=" in str(config) and not Path(config).exists():
        return None, (str(config), *given)
    return Path(config), given


def read_config(config: str | Path | None, overrides: Sequence[str] | None, *, stage: str | None = None) -> "Config":
    """The configuration that a command line names.

    Args:
      stage: as for `load_config`.
    """
    from mpo_jax.config.load import load_config

    path, given = split_config(config, overrides)
    return load_config(path, given, stage=stage)


def read_run(
    command: str, config: str | None, overrides: Sequence[str], *, stage: str | None = None
) -> "tuple[Path | None, Config]":
    """The YAML file and the configuration of a command that makes stages.

    Raises:
      UserError: if the command line names neither.
    """
    path, given = split_config(config, overrides)
    if path is None and not given:
        raise UserError(
            f"mpo {command} needs CONFIG, a YAML file such as configs/quickstart.yaml, or settings without one: "
            f"mpo {command} --model MODEL --data ROWS"
        )
    if path is None and command in PLAIN:
        # first, so that whatever is given wins
        given = (f"experiment={PLAIN[command]}", *given)
    return path, read_config(path, given, stage=stage)
