"""`mpo report`."""

from mpo_jax.cli.arguments import Workdir
from mpo_jax.runtime.console import console


def report(workdir: Workdir) -> None:
    """Write the report of a workdir's finished runs again."""
    from mpo_jax.tools.runs import rewrite_report

    console.print(f"report: {rewrite_report(workdir)}", soft_wrap=True)
