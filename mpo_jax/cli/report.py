"""`mpo report`."""

from mpo_jax.cli.arguments import Workdir
from mpo_jax.runtime.console import console


def report(workdir: Workdir) -> None:
    """Write the report of a workdir's finished runs again."""
    from mpo_jax.tools.report.terminal import print_cautions
    from mpo_jax.tools.runs import rewrite_report

    page, by_seed = rewrite_report(workdir)
    print_cautions(by_seed)
    console.print(f"report: {page}", soft_wrap=True)
