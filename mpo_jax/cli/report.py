"""`mpo report`."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from mpo_jax.cli.arguments import Workdir
from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console

if TYPE_CHECKING:
    from mpo_jax.tools.report.results import RunResult


def report(
    workdir: Workdir,
    price: Annotated[
        float | None,
        typer.Option(
            min=0, max=1e6, metavar="X", help="of one device for an hour, in any currency: adds what each stage cost"
        ),
    ] = None,
) -> None:
    """Write the report of a workdir's finished runs again, and list the stages of runs without an evaluation."""
    from mpo_jax.tools.report.place import check_place
    from mpo_jax.tools.report.provenance import evaluation
    from mpo_jax.tools.report.results import collect_unevaluated
    from mpo_jax.tools.report.terminal import print_cautions
    from mpo_jax.tools.runs import report_training, rewrite_report

    if price is not None and not math.isfinite(price):
        raise UserError(f"--price {price}: give a number, such as 2.5")
    check_place(workdir)
    trained = collect_unevaluated(workdir)
    for run in trained:
        console.print(f"{run.name} has no evaluation; {evaluation(run)} makes it:", soft_wrap=True, markup=False)
        for line in _stages(run):
            console.print(f"  {line}", soft_wrap=True, markup=False)
    if trained and not any(workdir.glob("runs/*/evaluate/manifest.json")) and not any(workdir.glob("seed-*/runs")):
        page = report_training(workdir, trained, price)
    else:
        page, by_seed = rewrite_report(workdir, price)
        print_cautions(by_seed)
    console.print(f"report: {page}", soft_wrap=True)


def _stages(run: "RunResult") -> Iterator[str]:
    """A line for each stage of a run: its folder, its time, and what its training ended with."""
    from mpo_jax.runtime.progress import duration
    from mpo_jax.tools.report.unevaluated import in_order_made, last_measures

    ended = {row["stage"]: row for row in last_measures(run)}
    for role in in_order_made(run):
        artifact = run.artifacts[role]
        seconds = artifact.manifest.get("seconds")
        time = "" if seconds is None else f", {duration(seconds)}"
        values = {key: x for key, x in ended.get(role, {}).items() if isinstance(x, int | float)}
        measured = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        yield f"{role}: {artifact.path}{time}{f': {measured}' if measured else ''}"
