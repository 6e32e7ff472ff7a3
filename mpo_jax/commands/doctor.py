"""`mpo doctor`: prints the findings as they are made."""

from mpo_jax import doctor as checks
from mpo_jax import runtime
from mpo_jax.config import Config
from mpo_jax.processes import is_main
from mpo_jax.tracker import console

MARK = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]FAIL[/red]"}


def doctor(config: Config) -> bool:
    """True where nothing fails; warnings are none."""
    runtime.start(config.runtime)
    console.quiet = not is_main()
    fine = True
    for check in checks.examine(config):
        console.print(f"{MARK[check.verdict]} {check.name}: ", end="")
        console.print(check.found, markup=False, soft_wrap=True)
        if check.mend:
            console.print(f"       {check.mend}", markup=False, soft_wrap=True)
        fine &= check.verdict != "fail"
    return fine
