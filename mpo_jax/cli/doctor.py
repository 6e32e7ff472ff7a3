"""`mpo doctor`: prints the findings as they are made."""

from mpo_jax.config.schema import Config
from mpo_jax.runtime import machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.processes import is_main
from mpo_jax.tools import doctor as checks

MARK = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]FAIL[/red]"}


def doctor(config: Config) -> bool:
    """True where nothing fails; warnings are none."""
    machine.start(config.runtime)
    console.quiet = not is_main()
    fine = True
    for check in checks.examine(config):
        console.print(f"{MARK[check.verdict]} {check.name}: ", end="")
        console.print(check.found, markup=False, soft_wrap=True)
        if check.mend:
            console.print(f"       {check.mend}", markup=False, soft_wrap=True)
        fine &= check.verdict != "fail"
    return fine
