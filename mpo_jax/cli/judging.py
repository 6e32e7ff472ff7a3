"""The command line of `mpo judge` and `mpo human`: which of two sides' answers are better."""

from pathlib import Path
from typing import Annotated

import typer

human = typer.Typer(help="A double-blind study of which answers people prefer.", no_args_is_help=True)
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, or more YAML files")]
SideA = Annotated[str, typer.Argument(metavar="A", help="run, file of rows {prompt, response}, or model with --data")]
SideB = Annotated[str, typer.Argument(metavar="B", help="the other side, likewise")]
ComparedOn = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help="rows {prompt} to compare on, which a model answers")
]
Category = Annotated[str, typer.Option(metavar="FIELD", help="the field of a row that names its category")]


def judge(
    a: SideA,
    b: SideB,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="of the judge at the endpoint; without one a model on this machine")
    ],
    overrides: Overrides = None,
    data: ComparedOn = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible, http://localhost:8000/v1; key: OPENAI_API_KEY")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="another prompt, with {instruction}, {response_1} and {response_2}")
    ] = None,
    swap: Annotated[bool, typer.Option(help="ask in both orders and average")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say how many calls and tokens, and ask nothing")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder to write to")] = Path("judge"),
    cache: Annotated[Path, typer.Option(metavar="DIR", help="folder of answers from before")] = Path(
        "~/.cache/mpo_jax/judge"
    ),
    concurrency: Annotated[int, typer.Option(min=1, help="calls at once")] = 8,
    tries: Annotated[int, typer.Option(min=1, help="of one call, the first included")] = 6,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds of one try")] = 120.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    request: Annotated[
        str | None, typer.Option(metavar="JSON", help="further fields of the request; null takes one out")
    ] = None,
    by: Category = "category",
) -> None:
    """Ask a judge which of two sides answers better: Win/Tie/Lose with intervals."""
    from mpo_jax.cli import judge as command

    command.judge(
        a,
        b,
        data=data,
        model=model,
        endpoint=endpoint,
        prompt_file=prompt_file,
        swap=swap,
        dry_run=dry_run,
        out=out,
        cache_folder=cache,
        concurrency=concurrency,
        tries=tries,
        timeout_s=timeout,
        max_tokens=max_tokens,
        temperature=temperature,
        fields=request,
        by=by,
        overrides=tuple(overrides or ()),
    )


@human.command("export")
def human_export(
    a: SideA,
    b: SideB,
    overrides: Overrides = None,
    data: ComparedOn = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="items, or with --by items of each category")] = None,
    by: Annotated[str | None, typer.Option(metavar="FIELD", help="the field of a row that names its category")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the items, their order and their sides")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder to write to")] = Path("human"),
) -> None:
    """Write a double-blind page and table for people, and the key apart from them."""
    from mpo_jax.cli import human as command

    command.export(a, b, data=data, n=n, by=by, seed=seed, out=out, overrides=tuple(overrides or ()))


@human.command("import")
def human_import(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="filled sheets, .json or .csv, one a person")],
    key: Annotated[Path, typer.Option(metavar="FILE", help="key.json of the export")] = Path("human/key.json"),
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="folder to write to; default: the key's")] = None,
) -> None:
    """Check filled sheets, and print Win/Tie/Lose by category and Fleiss' kappa."""
    from mpo_jax.cli import human as command

    command.import_sheets(files, key=key, out=out)
