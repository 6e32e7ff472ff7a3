"""What a model thinks of the rows of a file: log-probabilities or scores of their responses."""

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from mpo_jax.config.base import Names
from mpo_jax.config.schema import TextConfig
from mpo_jax.data import hh, records
from mpo_jax.data.batches import Progress
from mpo_jax.data.chat import Message
from mpo_jax.data.columns import advice, check_columns, renamed
from mpo_jax.data.corpus import FIRST_ROWS
from mpo_jax.data.fields import Drop, MissingField
from mpo_jax.data.layouts import BETTER, FIELDS, standard
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.scored import RESPONSES
from mpo_jax.data.sources import Changed, Row, Source, open_source
from mpo_jax.data.special_tokens import SpelledTokens
from mpo_jax.data.text_rows import TextRow
from mpo_jax.data.tokens import Example, TokenReport, tokenize
from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import SHOWN
from mpo_jax.evaluation.scoring import score_examples
from mpo_jax.runtime.sharding import check_batch
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.runtime.words import counted
from mpo_jax.tools.opening import OpenModel
from mpo_jax.training.tracker import Tracker

SUBSET = "subset"
"""The field in which RewardBench names a row's subset."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """A file's rows with a value for each response, in the file's order.

    Attributes:
      name: logp, the summed log-probability in nats with EOS, or score, a reward model's raw score.
      sides: the suffixes of the fields: _chosen and _rejected, or none.
      values_BN: [rows, responses].
      tokens_BN: [rows, responses], tokens of each response, EOS included; where the model reads a row as one text, of
        prompt and response together.
      prompt_tokens_B: [rows]; None where the model reads a row as one text.
      responses: of each row, as they were read, before any cut.
      cut: what was cut to fit, as one sentence; None if nothing was.
      stripped: how many responses were without an end marker, as one sentence; None if none was.
      given: rows {prompt, responses} as the file has them, whose responses the values are of, one after the other;
        empty for rows of another form.
    """

    name: str
    sides: tuple[str, ...]
    values_BN: np.ndarray
    tokens_BN: np.ndarray
    prompt_tokens_B: np.ndarray | None
    responses: Sequence[Sequence[str]]
    cut: str | None
    stripped: str | None
    given: Sequence[Row] = ()

    def lines(self) -> list[dict[str, Any]]:
        """A row as JSON has it: its values, then tokens of each response and, if known, of the prompt.

        Rows {prompt, responses} come back with `scores` (or `logps`), as data.kind=scored reads them.
        """
        if self.given:
            values, tokens = (iter(column[:, 0].tolist()) for column in (self.values_BN, self.tokens_BN))
            part = lambda column, row: list(itertools.islice(column, len(row[RESPONSES])))  # noqa: E731
            return [{**row, f"{self.name}s": part(values, row), "tokens": part(tokens, row)} for row in self.given]
        columns = {f"{self.name}{side}": self.values_BN[:, n] for n, side in enumerate(self.sides)}
        columns |= {f"tokens{side}": self.tokens_BN[:, n] for n, side in enumerate(self.sides)}
        if self.prompt_tokens_B is not None:
            columns["tokens_prompt"] = self.prompt_tokens_B
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]


def score(opened: OpenModel, data: str, *, batch_size: int, max_rows: int | None = None) -> Scored:
    """Values of {prompt, chosen, rejected} rows (or HH-RLHF's two dialogues), of {prompt, completion} rows, or of
    {prompt, responses} rows, whose responses are a list.

    Prompts are put into the template and chat of the model's training, except for rows with a field `shown`, such as
    an evaluation's samples: that is the prompt as the policy saw it. Fields are taken from other columns by
    data.columns, and end markers are taken off responses by text.end_markers, as in a run.

    A reward model that a run reads as text (`scorer.OwnTokens`), in whatever run, is read so here too: a row is the
    whole conversation by its own chat template, and `shown` is left aside.

    Args:
      max_rows: the first rows only.

    Raises:
      UserError: if there are no rows, or some cannot be scored.
    """
    check_batch(batch_size, opened.mesh, "--batch-size")
    source, spelled = open_rows(data, opened.config.data.columns), _spelled(opened)
    given = _given(source, max_rows)
    found = _score(opened, Changed(source, _one_by_one) if given else source, spelled, batch_size, max_rows)
    return dataclasses.replace(found, given=given)


def _score(opened: OpenModel, source: Source, spelled: SpelledTokens, batch_size: int, max_rows: int | None) -> Scored:
    """`score` of rows that are read already by their form."""
    shown = any(row.get(SHOWN) is not None for _, row in source.rows(1))
    if opened.reads_text:
        return _score_texts(opened, source, batch_size, max_rows, spelled, shown=shown)
    if shown:
        opened, source = opened.for_rendered_prompts(), Changed(source, _as_shown)
    sides, rows = _read(dataclasses.replace(opened.renderer, spelled=spelled), source, max_rows)
    examples, report = tokenize(opened.codec, rows, cache=opened.config.runtime.token_cache_folder)
    with _shown_progress(len(examples)) as progress:
        values = values_of(opened, examples, batch_size=batch_size, progress=progress)
    return Scored(
        "score" if opened.source.head == "value" else "logp",
        sides,
        values,
        np.asarray([[len(ids) for ids in example.responses] for example in examples]),
        np.asarray([len(example.prompt) for example in examples]),
        [responses for _, responses in rows],
        _what_was_cut(report, opened.config.text),
        spelled.stripped(),
    )


def open_rows(data: str, columns: Names) -> Source:
    """Rows to score, with fields taken from columns of other names.

    Raises:
      UserError: for a field that such rows cannot have, or a column that the first rows lack.
    """
    source = renamed(open_source(data), columns)
    check_columns([source], columns, (*FIELDS, SHOWN, SUBSET, RESPONSES), FIRST_ROWS)
    return Changed(source, _standard)


def _standard(place: str, row: Row) -> Iterable[Row]:
    """Rows {prompt, response_0, response_1, better_response_id} as {prompt, chosen, rejected}."""
    try:
        yield standard(row, place) if BETTER in row else row
    except Drop as reason:
        raise UserError(f"{place}: {reason}, so the row is no pair: drop it") from reason


def _one_by_one(_: str, row: Row) -> Iterable[Row]:
    """A row {prompt, responses} as rows {prompt, response}, one for each response."""
    rest = {name: value for name, value in row.items() if name != RESPONSES}
    yield from ({**rest, "response": response} for response in row[RESPONSES])


def _as_shown(_: str, row: Row) -> Iterable[Row]:
    """A row whose prompt is the one that a policy saw."""
    yield row if row.get(SHOWN) is None else {**row, "prompt": row[SHOWN]}


def _given(source: Source, max_rows: int | None) -> list[Row]:
    """The rows of a file whose first one has a list of responses; empty for files of another form.

    Raises:
      UserError: for a row that has none.
    """
    if not any(RESPONSES in row for _, row in source.rows(1)):
        return []
    rows = []
    for place, row in source.rows(max_rows):
        if not isinstance(row.get(RESPONSES), list) or not row[RESPONSES]:
            raise UserError(f"{place}: {RESPONSES!r} must be a list of one response or more, as in the first row")
        rows.append(row)
    return rows


def _spelled(opened: OpenModel) -> SpelledTokens:
    """What takes end markers off responses, as in the model's training."""
    return SpelledTokens(lambda: opened.codec.tokenizer, opened.config.text.end_markers)


def _score_texts(
    opened: OpenModel, source: Source, batch_size: int, max_rows: int | None, spelled: SpelledTokens, *, shown: bool
) -> Scored:
    """`score` by a reward model that reads each row as one text."""
    if shown and any(row.get(SHOWN) == row.get("prompt") for _, row in source.rows()):
        raise UserError(
            f"{source.name}: its prompts are as the policy's chat template has written them, but {opened.path} reads "
            "conversations by its own: give rows whose prompts are lists of turns"
        )
    conversations: dict[str, tuple[Message, ...]] = {}
    render = dataclasses.replace(opened.text_renderer(conversations), spelled=spelled)
    sides, rows = _read(render, source, max_rows)
    texts = [
        TextRow.of(prompt, response, complete=True, conversations=conversations)
        for prompt, responses in rows
        for response in responses
    ]
    with _shown_progress(len(texts)) as progress:
        values, tokens, cut = score_texts(opened, texts, batch_size=batch_size * len(sides), progress=progress)
    shape = len(rows), len(sides)
    said = f"{cut} of {len(texts)} texts lose the start of their prompt, to fit the model" if cut else None
    responses = [responses for _, responses in rows]
    values, tokens = values.reshape(shape), tokens.reshape(shape)
    return Scored("score", sides, values, tokens, None, responses, said, spelled.stripped())


def score_texts(
    opened: OpenModel, rows: Sequence[TextRow], *, batch_size: int, progress: Progress
) -> tuple[np.ndarray, np.ndarray, int]:
    """[rows] float32 raw scores by a reward model that reads text, [rows] tokens, and how many rows were cut.

    Raises:
      UserError: if a row cannot be read, or a score is not finite.
    """
    codec = opened.reward_codec
    examples, cut = codec.examples(rows)
    values = values_of(opened, examples, batch_size=batch_size, progress=progress)
    return values[:, 0], np.asarray([len(example.prompt) + 1 for example in examples]), cut


def _what_was_cut(report: TokenReport, limits: TextConfig) -> str | None:
    if not (report.truncated_prompts or report.truncated_responses):
        return None
    return (
        f"cut to fit: {report.truncated_prompts} prompts (text.max_prompt_tokens={limits.max_prompt_tokens}), "
        f"responses of {counted(report.truncated_responses, 'row')} "
        f"(text.max_response_tokens={limits.max_response_tokens})"
    )


def _read(
    render: Renderer, source: Source, max_rows: int | None
) -> tuple[tuple[str, ...], list[tuple[str, tuple[str, ...]]]]:
    """The suffixes of the fields, and (prompt, responses) of every row."""
    first = next((row for _, row in source.rows(1)), {})
    pairs = "chosen" in first
    # dialogues without HH-RLHF's marks are split as rows of data.kind=pairs are
    dialogues = pairs and "prompt" not in first and hh.ASSISTANT in str(first["chosen"])
    if dialogues:
        render = dataclasses.replace(render, turns=hh.dialogue_turns)
    render = dataclasses.replace(render, ignored=Counter())
    options: Any = {"strict": False, "max_rows": max_rows, "render": render}
    rows: list[tuple[str, tuple[str, ...]]]
    try:
        if pairs:
            preferences, report = (hh.read_hh if dialogues else records.read_preferences)(source, **options)
            rows = [(row.prompt, (row.chosen, row.rejected)) for row in preferences]
            if dialogues and (bare := next((n for n, row in enumerate(rows, 1) if not row[0]), None)):
                raise UserError(f"{source.name} row {bare}: it has no turn of 'Assistant:', which the first row has")
        else:
            demonstrations, report = records.read_demonstrations(source, **options)
            rows = [(row.prompt, (row.response,)) for row in demonstrations]
    except MissingField as error:
        raise UserError(advice(error)) from error
    if report.dropped:
        reasons = ", ".join(f"{count} rows: {reason}" for reason, count in report.dropped.items())
        raise UserError(f"{source.name}: some rows cannot be scored, so lines would not match rows ({reasons})")
    if not rows:
        raise UserError(f"{source.name} holds no rows")
    for message in render.warnings():
        warn(message)
    return ("_chosen", "_rejected") if pairs else ("",), rows


def values_of(opened: OpenModel, examples: Sequence[Example], *, batch_size: int, progress: Progress) -> np.ndarray:
    """[rows, responses] float32 log-probabilities in nats, or raw scores.

    Raises:
      UserError: if one is not finite.
    """
    config, mesh, head = opened.config, opened.mesh, opened.source.head
    with jax.set_mesh(mesh):
        model, params = opened.load(head)
        return score_examples(
            model, params, examples, head=head, batch_size=batch_size, length_buckets=config.text.length_buckets,
            mesh=mesh, name=str(opened.path), progress=progress,
        )  # fmt: skip


@contextlib.contextmanager
def _shown_progress(total: int) -> Iterator[Progress]:
    with contextlib.closing(Tracker(None, "score", total, tensorboard=False, bursts=True)) as tracker:
        yield partial(tracker.update, log=True)
