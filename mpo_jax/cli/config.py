"""`mpo config`."""

import typer

from mpo_jax.cli.arguments import ConfigPath, Overrides, read_config
from mpo_jax.config.load import to_yaml


def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved configuration."""
    typer.echo(to_yaml(read_config(config, overrides)), nl=False)
