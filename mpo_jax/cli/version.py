"""`mpo version`."""

import typer

from mpo_jax.runtime.version import __version__


def version() -> None:
    """Print the version."""
    typer.echo(__version__)
