"""`mpo config`."""

import shutil
import sys
from typing import Annotated

import typer

from mpo_jax.cli.arguments import Overrides, read_config
from mpo_jax.errors import UserError


def show_config(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="YAML file; with --keys a section or key, such as ppo.kl")
    ] = None,
    overrides: Overrides = None,
    show_keys: Annotated[
        bool, typer.Option("--keys", help="list the keys of a section, or all: type, default, range, meaning")
    ] = False,
) -> None:
    """Print the resolved configuration, or with --keys what each key means."""
    if show_keys:
        from mpo_jax.config import keys

        if overrides:
            raise UserError(f"mpo config --keys takes one section or key, not {overrides[0]!r} after it")
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        typer.echo(keys.listing(config, width), nl=False)
    elif config is None:
        raise UserError("mpo config needs CONFIG, the YAML file to resolve; mpo config --keys lists every key")
    else:
        from mpo_jax.config.load import to_yaml

        typer.echo(to_yaml(read_config(config, overrides)), nl=False)
