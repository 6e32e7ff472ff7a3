"""`mpo accuracy`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mpo_jax.cli.arguments import ModelPath, Overrides, expanded, refuse_rows, short_keys
from mpo_jax.runtime.console import console

if TYPE_CHECKING:
    from rich.table import Table

    from mpo_jax.evaluation.accuracy import Accuracy, RewardBench


def accuracy(
    model: ModelPath,
    data: Annotated[str, typer.Argument(metavar="DATA", help="rows {prompt, chosen, rejected}")],
    overrides: Overrides = None,
    by: Annotated[str | None, typer.Option(metavar="FIELD", help="by the values of a field, such as category")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="of a language model's implicit reward: what DPO started from")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(min=1e-9, help="of the implicit reward; default: its training's, or 0.1")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_rows: Annotated[int | None, typer.Option(min=1, max=2**62, help="the first rows only")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", parser=expanded, metavar="FILE")] = None,
) -> None:
    """How often a reward model, or a policy's implicit reward, prefers the chosen response; RewardBench's sections."""
    from mpo_jax.runtime.files import write_json
    from mpo_jax.runtime.outputs import check_output_file

    refuse_rows(overrides)
    if json_file is not None:
        check_output_file("--json", json_file, (data, model, *([] if reference is None else [reference])))
    from mpo_jax.evaluation.accuracy import unlike
    from mpo_jax.tools.accuracy import measure
    from mpo_jax.tools.opening import open_model

    given = (*short_keys(None, [data], None), *(overrides or ()))
    opened = open_model(model, given)
    found = measure(
        opened,
        data,
        reference=None if reference is None else open_model(reference, given),
        beta=beta,
        by=by,
        batch_size=batch_size,
        max_rows=max_rows,
    )
    rows = {unlike("all", found.groups): found.overall, **found.groups}
    console.print(_table("Accuracy" if by is None else f"Accuracy by {by}", "rows of", rows))
    if found.bench is not None:
        console.print(_table("RewardBench", "section and subset", _sections(found.bench)))
        for line in _about(found.bench):
            console.print(line, soft_wrap=True, markup=False)
        if opened.codec.tokenizer.chat_template and not opened.knows("chat"):
            console.print(
                "[yellow]plain prompts stay outside the model's chat template, into which RewardBench puts them: "
                "text.chat=true does so[/yellow]",
                soft_wrap=True,
            )
    longer = found.longer
    console.print(
        f"Choosing the longer response, in characters, is right in {longer.mean:.1%} of all rows "
        f"({longer.low:.1%} to {longer.high:.1%}).",
        soft_wrap=True,
    )
    console.print("Ties count half; intervals are 95%, Wilson's.", soft_wrap=True)
    for remark in filter(None, (found.cut, found.stripped)):
        console.print(remark, style="yellow", soft_wrap=True, markup=False)
    if json_file is not None:
        named = {"model": model, "reference": reference, "data": data, "by": by}
        write_json(json_file, {**named, **found.to_dict()})
        console.print(f"wrote {json_file}", soft_wrap=True)


def _table(title: str, first: str, rows: "dict[str, Accuracy]") -> "Table":
    from rich.table import Table

    table = Table(title=title, title_style="bold")
    table.add_column(first)
    for column in ("rows", "accuracy", "95% interval", "ties", "mean margin"):
        table.add_column(column, justify="right")
    for name, one in rows.items():
        interval = f"{one.low:.1%} to {one.high:.1%}"
        table.add_row(escape(name), str(one.rows), f"{one.mean:.1%}", interval, str(one.ties), f"{one.margin:.4g}")
    return table


def _sections(bench: "RewardBench") -> "dict[str, Accuracy]":
    """Each section, and under it its subsets."""
    from mpo_jax.evaluation.accuracy import SECTIONS

    rows = {}
    for section, whole in bench.sections.items():
        rows[section] = whole
        rows |= {f"  {name}": bench.subsets[name] for name in SECTIONS[section] if name in bench.subsets}
    return rows


def _about(bench: "RewardBench") -> list[str]:
    """What the sections are made of, in sentences."""
    lines = []
    if bench.score is not None:
        mean, low, high = bench.score
        lines.append(f"RewardBench score, the mean of the four sections: {mean:.1%} ({low:.1%} to {high:.1%})")
        if any(one.ties for one in bench.sections.values()):
            lines.append(f"RewardBench's own code counts a tie as wrong, which gives {bench.without_ties:.1%}")
    if bench.missing:
        lines.append(f"subsets without rows, left out of their sections: {', '.join(bench.missing)}")
    if bench.unknown:
        lines.append(f"rows of no subset of RewardBench, in no section: {bench.unknown}")
    return lines
