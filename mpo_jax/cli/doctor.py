"""`mpo doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from mpo_jax.cli.arguments import Overrides, expanded, read_config
from mpo_jax.cli.exits import FAULT
from mpo_jax.credentials import hide
from mpo_jax.runtime.console import console

MARK = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]FAIL[/red]"}


def doctor(
    config: Annotated[
        Path | None, typer.Argument(parser=expanded, metavar="[CONFIG]", help="YAML file whose run to check for")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Look at devices, memory, links, libraries, disk, hub and clocks, and say how to fix what will go wrong."""
    from mpo_jax.runtime import machine
    from mpo_jax.runtime.processes import is_main
    from mpo_jax.tools import doctor as checks

    resolved = read_config(config, overrides)
    machine.start(resolved.runtime)
    console.quiet = not is_main()
    failed = False
    for check in checks.examine(resolved):
        console.print(f"{MARK[check.verdict]} {check.name}: ", end="")
        console.print(hide(check.found), markup=False, soft_wrap=True)
        if check.advice:
            console.print(f"       {hide(check.advice)}", markup=False, soft_wrap=True)
        failed |= check.verdict == "fail"
    if failed:
        raise typer.Exit(FAULT)
