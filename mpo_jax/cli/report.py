"""`mpo report`."""

from mpo_jax.cli.arguments import Workdir
from mpo_jax.runtime.console import console


def report(workdir: Workdir) -> None:
    """Write the report of a workdir's finished runs again, and list the stages of runs without an evaluation."""
    from mpo_jax.tools.report.terminal import print_cautions
    from mpo_jax.tools.report.unevaluated import stage_lines, unevaluated
    from mpo_jax.tools.runs import rewrite_report

    names = unevaluated(workdir)
    for name in names:
        console.print(f"{name} has no evaluation (mpo evaluate with the same settings makes it):", markup=False)
        for line in stage_lines(workdir, name):
            console.print(f"  {line}", soft_wrap=True, markup=False)
    if names and not any(workdir.glob("runs/*/evaluate/manifest.json")) and not any(workdir.glob("seed-*/runs")):
        return
    page, by_seed = rewrite_report(workdir)
    print_cautions(by_seed)
    console.print(f"report: {page}", soft_wrap=True)
