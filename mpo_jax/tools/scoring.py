"""What a model thinks of the rows of a file: log-probabilities or scores of their responses."""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpo_jax.data import hh, records
from mpo_jax.data.sources import Row, Source, open_source
from mpo_jax.data.tokens import Example, TokenReport, tokenize
from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import SHOWN
from mpo_jax.evaluation.scoring import score_examples
from mpo_jax.runtime.sharding import check_batch
from mpo_jax.tools.opening import OpenModel
from mpo_jax.training.tracker import Tracker


@dataclasses.dataclass(frozen=True)
class Scored:
    """A file's rows with a value for each response, in the file's order.

    Attributes:
      name: logp, the summed log-probability in nats with EOS, or score, a reward model's raw score.
      sides: the suffixes of the fields: _chosen and _rejected, or none.
      values_BN: [rows, responses].
      tokens_BN: [rows, responses], EOS included.
      prompt_tokens_B: [rows].
      report: what was cut to fit.
    """

    name: str
    sides: tuple[str, ...]
    values_BN: np.ndarray
    tokens_BN: np.ndarray
    prompt_tokens_B: np.ndarray
    report: TokenReport

    def lines(self) -> list[dict[str, Any]]:
        """A row as JSON has it: its values, then tokens of each response and of the prompt."""
        lines = []
        columns = self.values_BN.tolist(), self.tokens_BN.tolist(), self.prompt_tokens_B.tolist()
        for values, tokens, prompt in zip(*columns, strict=True):
            line = {f"{self.name}{side}": value for side, value in zip(self.sides, values, strict=True)}
            line |= {f"tokens{side}": count for side, count in zip(self.sides, tokens, strict=True)}
            lines.append({**line, "tokens_prompt": prompt})
        return lines


def score(opened: OpenModel, data: str, *, batch_size: int, max_rows: int | None = None) -> Scored:
    """Values of {prompt, chosen, rejected} rows (or HH-RLHF's two dialogues), or of {prompt, completion} rows.

    Prompts are put into the template and chat of the model's training, except for rows with a field `shown`, such as
    an evaluation's samples: that is the prompt as the policy saw it.

    Args:
      max_rows: the first rows only.

    Raises:
      UserError: if there are no rows, or some cannot be scored.
    """
    check_batch(batch_size, opened.mesh, "--batch-size")
    source = open_source(data)
    if any(row.get(SHOWN) is not None for _, row in source.rows(1)):
        opened, source = opened.for_rendered_prompts(), _Shown(source)
    sides, rows = _read(opened, source, max_rows)
    if not rows:
        raise UserError(f"{data} holds no rows")
    examples, report = tokenize(opened.codec, rows, cache=opened.config.runtime.token_cache_folder)
    return Scored(
        "score" if opened.source.head == "value" else "logp",
        sides,
        _values(opened, examples, batch_size),
        np.asarray([[len(ids) for ids in example.responses] for example in examples]),
        np.asarray([len(example.prompt) for example in examples]),
        report,
    )


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A source whose prompts are the ones that a policy saw."""

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
        model, params = opened.load(head)
        with contextlib.closing(Tracker(None, "score", len(examples), tensorboard=False)) as tracker:
            return score_examples(
                model, params, examples, head=head, batch_size=batch_size, length_buckets=config.text.length_buckets,
                mesh=mesh, name=str(opened.path), progress=partial(tracker.update, log=True),
            )  # fmt: skip
