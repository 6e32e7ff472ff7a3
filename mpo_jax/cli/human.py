"""`mpo human export` and `mpo human import`: a double-blind study of which side's answers people prefer."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mpo_jax.cli.arguments import ComparedOn, Overrides, SideA, SideB, expanded, short_keys
from mpo_jax.runtime.console import console

ANNOTATORS = 3
"""Fewer give no majority."""

human = typer.Typer(help="A double-blind study of which answers people prefer.", no_args_is_help=True)


@human.command("export")
def export_study(
    a: SideA,
    b: SideB,
    overrides: Overrides = None,
    data: ComparedOn = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="items, or with --by items of each category")] = None,
    by: Annotated[str | None, typer.Option(metavar="FIELD", help="the field of a row that names its category")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the items, their order and their sides")] = 0,
    out: Annotated[Path, typer.Option(parser=expanded, metavar="DIR", help="folder to write to")] = Path("human"),
) -> None:
    """Write a double-blind page and table for people, and the key apart from them."""
    from mpo_jax.evaluation.accuracy import unlike
    from mpo_jax.evaluation.answers import CATEGORY
    from mpo_jax.runtime.outputs import check_output_folder
    from mpo_jax.tools.human.export import write_study
    from mpo_jax.tools.human.sheets import make_study
    from mpo_jax.tools.sides import compared, named_rows

    check_output_folder("--out", out)
    given = (*short_keys(None, named_rows(a, b, data), None), *(overrides or ()))
    pairs = compared(a, b, data, out=out, overrides=given, by=by or CATEGORY)
    study = make_study(pairs, (a, b), n=n, by=by, seed=seed)
    key = write_study(study, out)
    named = [item.category for item in study.items]
    unnamed = unlike("(none)" if any(named) else "all", named)
    counts = Counter(name or unnamed for name in named)
    each = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    console.print(f"study {study.id}: {len(study.items)} items ({each})", soft_wrap=True)
    console.print(f"for people:  {out / 'sheets' / 'study.html'} or {out / 'sheets' / 'study.csv'}", soft_wrap=True)
    console.print(f"for you:     {key} tells which side is whose: keep it from them", soft_wrap=True)
    console.print(f"afterwards:  mpo human import FILE FILE FILE --key {key}", soft_wrap=True)


@human.command("import")
def import_study(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="filled sheets, .json or .csv, one a person")],
    key: Annotated[Path, typer.Option(parser=expanded, metavar="FILE", help="key.json of the export")] = Path(
        "human/key.json"
    ),
    out: Annotated[
        Path | None, typer.Option(parser=expanded, metavar="DIR", help="folder to write to; default: the key's")
    ] = None,
) -> None:
    """Check filled sheets, and print Win/Tie/Lose by category and Fleiss' kappa."""
    from mpo_jax.runtime.outputs import check_output_folder
    from mpo_jax.tools.human.agreement import import_sheets
    from mpo_jax.tools.report.terminal import verdict_table

    if out is not None:
        check_output_folder("--out", out)
    result, folder = import_sheets(files, key=key, out=out)
    console.print(verdict_table(f"{result['a']} (A) against {result['b']} (B)", "items", result))
    for line in _remarks(result):
        console.print(line, soft_wrap=True)
    console.print(f"wrote {folder / 'result.json'} and {folder / 'votes.jsonl'}", soft_wrap=True)


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """Notes on the result, a line each."""
    from mpo_jax.evaluation.accuracy import unlike

    people, votes = result["annotators"], result["votes"]
    lines = [
        f"An item counts by the most votes of {people} people, a tie where no outcome has most; 95% Wilson intervals.",
        f"Votes: A {votes['win']}, tie {votes['tie']}, B {votes['lose']}; "
        f"left {result['sides']['left']}, right {result['sides']['right']}.",
    ]
    kappas = [*result.get("kappa_by_category", {}).items()]
    if "kappa" in result:
        kappas.append((unlike("all", [name for name, _ in kappas]), result["kappa"]))
    for name, kappa in kappas:
        lines.append(
            f"Fleiss' kappa, {name}: {kappa['value']:.2f} [{kappa['low']:.2f}, {kappa['high']:.2f}], {kappa['band']}"
        )
    if kappas:
        lines.append("(95% bootstrap over items; bands of Landis and Koch: slight, fair, moderate, substantial, ...)")
    if people < ANNOTATORS:
        lines.append(f"[yellow]{people} of {ANNOTATORS} people or more: too few for a majority[/yellow]")
    return lines
