"""`mpo data`: what a configuration reads, drops and cuts, and a few rows as the model gets them. Nothing is trained."""

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from mpo_jax.config.schema import Config
from mpo_jax.data.corpus import Corpus, base_tokenizer, load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, Ids, Row, TokenReport, tokenize
from mpo_jax.runtime.console import console

PROMPT, RESPONSE, SPECIAL = "dim", "green", "reverse"


def show(config: Config, *, num_examples: int) -> None:
    """Prints the report of every source and set, then the first demonstrations and pairs, token by token."""
    corpus = load_corpus(config)
    codec = TextCodec(base_tokenizer(config), config.text)
    console.print(_sources(corpus))
    console.print(f"{corpus.sizes} (data.prompts={config.data.prompts})", soft_wrap=True)
    tokenized = {name: tokenize(codec, rows, cache=config.runtime.token_cache_folder) for name, rows in _sets(corpus)}
    console.print(_lengths(config, {name: report for name, (_, report) in tokenized.items()}))
    console.print(
        "tokens of the first rows: ",
        Text("prompt, no loss", PROMPT),
        ", ",
        Text("response, in the loss", RESPONSE),
        ", ",
        Text("special token", SPECIAL),
        sep="",
    )
    for name in ("demonstrations", "pairs"):
        for number, example in enumerate(tokenized[name][0][:num_examples]):
            console.print(f"\n[bold]{name}, row {number + 1}[/bold]")
            console.print(_row(codec, example), soft_wrap=True)


def _sets(corpus: Corpus) -> Iterable[tuple[str, Sequence[Row]]]:
    yield "demonstrations", [(row.prompt, (row.response,)) for row in corpus.demonstrations]
    yield "pairs", [(row.prompt, (row.chosen, row.rejected)) for row in corpus.pairs]
    yield "reward model's pairs", [(row.prompt, (row.chosen, row.rejected)) for row in corpus.reward_pairs]
    yield "validation", [(row.prompt, (row.chosen, row.rejected)) for row in corpus.validation]
    yield "held out", [(row.prompt, (row.chosen, row.rejected)) for row in corpus.held_out]
    yield "prompts", [(prompt, ()) for prompt in corpus.prompts]
    yield "test prompts", [(prompt, ()) for prompt in corpus.test_prompts]


def _sources(corpus: Corpus) -> Table:
    table = Table("source", "read", "kept", "dropped, by reason", title="Rows")
    for report in corpus.reports:
        dropped = "\n".join(f"{count}: {reason}" for reason, count in report.dropped.items())
        table.add_row(report.source, str(report.read), str(report.kept), dropped)
    return table


def _lengths(config: Config, reports: dict[str, TokenReport]) -> Table:
    limits = config.text
    table = Table(title=f"Tokens before cutting to {limits.max_prompt_tokens} + {limits.max_response_tokens}")
    table.add_column("set")
    for column in ("rows", "prompt p50/p90/p99/max", "cut", "response p50/p90/p99/max", "cut"):
        table.add_column(column, justify="right")
    for name, report in reports.items():
        prompt, response = ("/".join(map(str, p.values())) for p in (report.prompt_tokens, report.response_tokens))
        cut = str(report.truncated_responses) if response else ""
        table.add_row(name, str(report.rows), prompt, str(report.truncated_prompts), response, cut)
    return table


def _row(codec: TextCodec, example: Example) -> Text:
    """A prompt and its responses with a bar between tokens."""
    text = Text()
    _append(text, codec, example.prompt, PROMPT)
    for number, ids in enumerate(example.responses):
        text.append(
            f"\n  response {number + 1}, {len(ids)} tokens: " if len(example.responses) > 1 else "\n  response: "
        )
        _append(text, codec, ids, RESPONSE)
    return text


def _append(text: Text, codec: TextCodec, ids: Ids, style: str) -> None:
    special = set(codec.tokenizer.all_special_ids) | {codec.eos_id}
    for place, token in enumerate(int(i) for i in ids):
        if place:
            text.append("|", "dim")
        if token in special:
            text.append(str(codec.tokenizer.convert_ids_to_tokens(token)), SPECIAL)
        else:
            text.append(str(codec.tokenizer.decode([token])), style)
