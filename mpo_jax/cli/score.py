"""`mpo score`: what a model thinks of the rows of a file, a line each, in the file's order."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpo_jax.cli.models import OpenModel, open_model
from mpo_jax.data import hh, records
from mpo_jax.data.batches import Buckets, map_batches
from mpo_jax.data.sources import Row, Source, open_source
from mpo_jax.data.tokens import Example, tokenize
from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import SHOWN
from mpo_jax.models import forward, loading
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_lines
from mpo_jax.runtime.sharding import check_batch, place_batch


def score(
    path: str, data: str, out: Path, *, batch_size: int, max_rows: int | None, overrides: tuple[str, ...]
) -> None:
    """Writes `out`, whole or not at all, and prints means.

    A language model gives the summed log-probability in nats of each response, EOS included; a reward model its raw
    score. Fields are logp or score, and tokens: with the suffix _chosen and _rejected for {prompt, chosen,
    rejected} rows (or HH-RLHF's two dialogues), without for {prompt, completion} rows. Prompts are put into the
    template and chat of the model's training, except for rows with a field `shown`, such as an evaluation's samples:
    that is the prompt as the policy saw it.
    """
    opened = open_model(path, overrides)
    check_batch(batch_size, opened.config.mesh, "--batch-size")
    source = open_source(data)
    if any(row.get(SHOWN) is not None for _, row in source.rows(1)):
        opened, source = opened.for_rendered_prompts(), _Shown(source)
    sides, rows = _read(opened, source, max_rows)
    if not rows:
        raise UserError(f"{data} holds no rows")
    cache_folder = opened.config.runtime.token_cache_folder
    examples, report = tokenize(opened.codec, rows, cache=cache_folder)
    values_BN = _values(opened, examples, batch_size)
    name = "score" if opened.source.head == "value" else "logp"
    count_BN = np.asarray([[len(ids) for ids in example.responses] for example in examples])
    limits = opened.config.text
    lines = []
    for example, values, counts in zip(examples, values_BN.tolist(), count_BN.tolist(), strict=True):
        line: dict[str, Any] = {f"{name}{side}": value for side, value in zip(sides, values, strict=True)}
        line |= {f"tokens{side}": count for side, count in zip(sides, counts, strict=True)}
        line["tokens_prompt"] = len(example.prompt)
        lines.append(line)
    write_lines(out, lines)
    for n, side in enumerate(sides):
        total, tokens = values_BN[:, n].sum(), count_BN[:, n].sum()
        shown = f"mean {name}{side} {total / len(lines):.4f}"
        per_token = "" if opened.source.head == "value" else f", NLL per token {-total / tokens:.4f}"
        console.print(f"{shown}{per_token}, {tokens / len(lines):.1f} tokens a response", soft_wrap=True)
    if len(sides) == 2:
        console.print(f"chosen above rejected in {np.mean(values_BN[:, 0] > values_BN[:, 1]):.1%} of {len(lines)} rows")
    if report.truncated_prompts or report.truncated_responses:
        console.print(
            f"[yellow]cut to fit: {report.truncated_prompts} prompts (text.max_prompt_tokens="
            f"{limits.max_prompt_tokens}), {report.truncated_responses} responses (text.max_response_tokens="
            f"{limits.max_response_tokens})[/yellow]",
            soft_wrap=True,
        )
    console.print(f"wrote {out}", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A source whose rows' prompts are those that a policy saw."""

    whole: Source

    @property
    def name(self) -> str:
        return self.whole.name

    def files(self) -> list[Path]:
        return self.whole.files()

    def rows(self, max_rows: int | None = None) -> Iterator[tuple[str, Row]]:
        for place, row in self.whole.rows(max_rows):
            yield place, row if row.get(SHOWN) is None else {**row, "prompt": row[SHOWN]}


def _read(
    opened: OpenModel, source: Source, max_rows: int | None
) -> tuple[tuple[str, ...], list[tuple[str, tuple[str, ...]]]]:
    """The suffixes of the fields, and (prompt, responses) of every row."""
    first = next((row for _, row in source.rows(1)), {})
    pairs = "chosen" in first
    dialogues = pairs and "prompt" not in first and isinstance(first["chosen"], str)
    render = opened.renderer
    if dialogues:
        render = dataclasses.replace(render, turns=hh.dialogue_turns)
    options: Any = {"strict": False, "max_rows": max_rows, "render": render}
    rows: list[tuple[str, tuple[str, ...]]]
    if pairs:
        preferences, report = (hh.read_hh if dialogues else records.read_preferences)(source, **options)
        rows = [(row.prompt, (row.chosen, row.rejected)) for row in preferences]
    else:
        demonstrations, report = records.read_demonstrations(source, **options)
        rows = [(row.prompt, (row.response,)) for row in demonstrations]
    if report.dropped:
        reasons = ", ".join(f"{count} rows: {reason}" for reason, count in report.dropped.items())
        raise UserError(f"{source.name}: some rows cannot be scored, so lines would not match rows ({reasons})")
    return ("_chosen", "_rejected") if pairs else ("",), rows


def _values(opened: OpenModel, examples: list[Example], batch_size: int) -> np.ndarray:
    """[rows, responses] log-probabilities or scores."""
    config, mesh, head = opened.config, opened.mesh, opened.source.head
    with jax.set_mesh(mesh):
        model, params = loading.load(opened.path, config, mesh, head=head, frozen=True)
        function = (forward.make_score_pairs if head == "value" else forward.make_response_logps)(model, mesh)
        buckets = Buckets.of(examples, config.text.length_buckets)
        return map_batches(
            examples,
            buckets,
            batch_size,
            lambda batch: function(params, place_batch(batch, mesh)),
            models=str(opened.path),
        )
