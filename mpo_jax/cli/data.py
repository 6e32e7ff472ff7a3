"""`mpo data`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mpo_jax.cli.arguments import BaseModel, ConfigPath, DataPaths, Overrides, expanded, read_config, short_keys
from mpo_jax.runtime.console import console
from mpo_jax.runtime.words import counted

if TYPE_CHECKING:
    from mpo_jax.config.schema import TextConfig
    from mpo_jax.data.corpus import Corpus
    from mpo_jax.data.text import TextCodec
    from mpo_jax.data.token_lists import Ids
    from mpo_jax.data.tokens import Example, TokenReport

PROMPT, RESPONSE, SPECIAL, BORDER = "dim", "green", "reverse", "yellow"


def show_data(
    config: ConfigPath = None,
    overrides: Overrides = None,
    model: BaseModel = None,
    data: DataPaths = None,
    examples: Annotated[int, typer.Option(min=0, help="rows of each kind to show")] = 2,
    export: Annotated[
        Path | None,
        typer.Option(parser=expanded, metavar="DIR", help="folder for each set as a file, such as held_out.jsonl"),
    ] = None,
) -> None:
    """Show what a configuration reads, drops and cuts, and some rows token by token, without training."""
    from mpo_jax.tools.data_report import report_data

    resolved = read_config(config, [*(overrides or ()), *short_keys(model, data, None)])
    if export is not None:
        from mpo_jax.runtime.outputs import check_output_folder
        from mpo_jax.tools.data_files import FILES

        check_output_folder("--export", export, FILES, resolved.data.sources)
    found = report_data(resolved)
    console.print(_sources(found.corpus))
    console.print(f"{found.corpus.sizes} (data.prompts={resolved.data.prompts})", soft_wrap=True)
    console.print(_lengths(resolved.text, {name: report for name, (_, report) in found.sets.items()}))
    for finding in found.findings:
        console.print(f"[yellow]{escape(finding)}[/yellow]", soft_wrap=True)
    console.print(
        "tokens of the first rows, each between \u2039 and \u203a: ",
        Text("prompt, no loss", PROMPT),
        ", ",
        Text("response, in the loss", RESPONSE),
        ", ",
        Text("special token", SPECIAL),
        sep="",
    )
    for name in ("demonstrations", "pairs"):
        for number, example in enumerate(found.sets[name][0][:examples]):
            console.print(f"\n[bold]{name}, row {number + 1}[/bold]")
            console.print(_row(found.codec, example), soft_wrap=True)
    if export is not None:
        from mpo_jax.data.corpus import turns_of
        from mpo_jax.tools.data_files import export_sets

        for name, rows in export_sets(found.corpus, turns_of(resolved), export).items():
            console.print(f"wrote {export / name}: {counted(rows, 'row')}", soft_wrap=True)


def _sources(corpus: "Corpus") -> Table:
    table = Table("source", "read", "kept", "dropped, by reason", title="Rows")
    for report in corpus.reports:
        dropped = "\n".join(f"{count}: {reason}" for reason, count in report.dropped.items())
        table.add_row(escape(report.source), str(report.read), str(report.kept), escape(dropped))
    return table


def _lengths(limits: "TextConfig", reports: "dict[str, TokenReport]") -> Table:
    table = Table(title=f"Tokens before cutting to {limits.max_prompt_tokens} + {limits.max_response_tokens}")
    table.add_column("set")
    for column in ("rows", "prompt p50/p90/p99/max", "cut", "response p50/p90/p99/max", "cut"):
        table.add_column(column, justify="right")
    for name, report in reports.items():
        prompt, response = ("/".join(map(str, p.values())) for p in (report.prompt_tokens, report.response_tokens))
        cut = str(report.truncated_responses) if response else ""
        table.add_row(name, str(report.rows), prompt, str(report.truncated_prompts), response, cut)
    return table


def _row(codec: "TextCodec", example: "Example") -> Text:
    """A prompt and its responses, each token between \u2039 and \u203a."""
    text = Text()
    _append(text, codec, example.prompt, PROMPT)
    for number, ids in enumerate(example.responses):
        text.append(
            f"\n  response {number + 1}, {len(ids)} tokens: " if len(example.responses) > 1 else "\n  response: "
        )
        _append(text, codec, ids, RESPONSE)
    return text


def _append(text: Text, codec: "TextCodec", ids: "Ids", style: str) -> None:
    special = set(codec.tokenizer.all_special_ids) | {*codec.end_ids}
    for token in map(int, ids):
        text.append("\u2039", BORDER)
        if token in special:
            text.append(str(codec.tokenizer.convert_ids_to_tokens(token)), SPECIAL)
        else:
            shown = str(codec.tokenizer.decode([token]))
            # alone, a token of SentencePiece is decoded without its leading space
            spaced = str(codec.tokenizer.convert_ids_to_tokens(token)).startswith("\u2581") and shown[:1] != " "
            text.append(_shown(" " * spaced + shown), style)
        text.append("\u203a", BORDER)


def _shown(token: str) -> str:
    """A token's text without line breaks and tabs of its own, which would move what follows."""
    return "".join(repr(letter)[1:-1] if letter in "\n\r\t" else letter for letter in token)
