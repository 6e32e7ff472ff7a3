"""`mpo verify`."""

from typing import Annotated

import typer

from mpo_jax.cli.arguments import Workdir
from mpo_jax.cli.exits import FAULT


def verify(
    workdir: Workdir,
    stage: Annotated[str | None, typer.Option(help="one kind of stage (sft, ...) or one stage's folder name")] = None,
    sha256: Annotated[
        bool, typer.Option("--sha256", help="compare sha256 of the checkpoints' arrays, not the hashes of training")
    ] = False,
) -> None:
    """Train a stretch between stored checkpoints again and compare hashes; status 1 where they differ."""
    from mpo_jax.tools.verify import verify as same_again

    if not same_again(workdir, stage, sha256=sha256):
        raise typer.Exit(FAULT)
