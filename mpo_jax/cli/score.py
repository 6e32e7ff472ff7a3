"""`mpo score`."""

from pathlib import Path
from typing import Annotated

import typer

from mpo_jax.cli.arguments import ModelPath, Overrides, expanded, refuse_rows, short_keys
from mpo_jax.runtime.console import console


def score(
    model: ModelPath,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="rows {prompt, chosen, rejected}, {prompt, completion} or {prompt, responses}"
        ),
    ],
    out: Annotated[Path, typer.Option(parser=expanded, metavar="OUT.jsonl", help="file to write, a line for each row")],
    overrides: Overrides = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_rows: Annotated[int | None, typer.Option(min=1, max=2**62, help="the first rows only")] = None,
) -> None:
    """Log-probabilities (language model) or scores (reward model) of every row's responses."""
    from mpo_jax.runtime.files import write_lines
    from mpo_jax.runtime.outputs import check_output_file

    check_output_file("--out", out, (data, model))
    refuse_rows(overrides)
    from mpo_jax.tools.opening import open_model
    from mpo_jax.tools.scoring import score as score_rows

    opened = open_model(model, (*short_keys(None, [data], None), *(overrides or ())))
    found = score_rows(opened, data, batch_size=batch_size, max_rows=max_rows)
    write_lines(out, found.lines())
    kind = "reward model" if opened.source.head == "value" else "language model"
    console.print(f"scored by the {kind} {opened.path}", soft_wrap=True, markup=False)
    num_rows, what = len(found.values_BN), "row" if found.prompt_tokens_B is None else "response"
    for n, side in enumerate(found.sides):
        total, tokens = found.values_BN[:, n].sum(), found.tokens_BN[:, n].sum()
        shown = f"mean {found.name}{side} {total / num_rows:.4f}"
        per_token = f", NLL per token {-total / tokens:.4f}" if found.name == "logp" else ""
        console.print(f"{shown}{per_token}, {tokens / num_rows:.1f} tokens a {what}", soft_wrap=True)
    if len(found.sides) == 2:
        share = (found.values_BN[:, 0] > found.values_BN[:, 1]).mean()
        console.print(f"chosen above rejected in {share:.1%} of {num_rows} rows")
    for remark in filter(None, (found.cut, found.stripped)):
        console.print(remark, style="yellow", soft_wrap=True, markup=False)
    console.print(f"wrote {out}", soft_wrap=True)
