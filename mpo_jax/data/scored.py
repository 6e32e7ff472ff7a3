"""Rows that bring their scores: {prompt, responses, scores}, from any sampler and any reward model.

A row with more than two responses becomes the pair of its best and its worst one.
"""

import dataclasses
import math
from functools import partial
from typing import Any

from mpo_jax.config.schema import DataConfig
from mpo_jax.data import layouts, records
from mpo_jax.data.columns import renamed
from mpo_jax.data.fields import MissingField, said, text_field
from mpo_jax.data.records import DataReport, Demonstration, Preference, Readers, RowFormat, collect
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.sources import Row, Source, open_source
from mpo_jax.errors import UserError

RESPONSES, SCORES = "responses", "scores"
LARGEST = 1e38
"""Scores are kept in float32, and so is the difference of two."""


def read_scored(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer
) -> tuple[list[Preference], DataReport]:
    """Reads rows {prompt, responses, scores}: two or more strings, and a finite number for each.

    The response with the highest score is chosen, the one with the lowest rejected; of equal scores the first in the
    row counts as the higher. `prompt` is a string, or a conversation that the responses continue. Strict drops, counted
    by reason: two equal responses, empty prompts or responses.

    Raises:
      UserError: for a row of another form, with its place.
    """

    def convert(place: str, row: Row) -> Preference:
        prompt = said(row, "prompt", place)
        responses, scores = _scored_responses(row, place)
        best, worst = _best_and_worst(scores)
        category = records.row_category(row, place)
        pair = records.preference(
            prompt, responses[best], responses[worst], place, category=category, strict=strict, render=render
        )
        return dataclasses.replace(pair, scores=(scores[best], scores[worst]))

    return collect(source, max_rows, convert)


def check_scores(data: DataConfig) -> None:
    """Raises UserError if the first row of a file of data.path brings no scores: it would be a pair without a gap."""
    for spec in data.path:
        for place, row in renamed(open_source(spec), data.columns).rows(1):
            if RESPONSES not in row:
                raise UserError(
                    f"data.path: {place}: the row brings no scores, which select.pair_source=scored splits by: give "
                    f"rows {{prompt, responses, scores}}; this one has: {', '.join(row) or 'nothing'}"
                )


def _scored_responses(row: Row, place: str) -> tuple[list[str], list[float]]:
    """The responses and their scores, checked."""
    for field in (RESPONSES, SCORES):
        if field not in row:
            raise MissingField(f"{place}: the row has no field {field!r}; it has: {', '.join(row) or 'nothing'}", field)
        if not isinstance(row[field], list):
            raise UserError(f"{place}: field {field!r} must be a list, not {type(row[field]).__name__}")
    responses, scores = row[RESPONSES], row[SCORES]
    if len(responses) < 2:
        raise UserError(f"{place}: a pair needs two responses or more, not {len(responses)}: drop the row")
    if len(responses) != len(scores):
        raise UserError(f"{place}: {len(responses)} responses have {len(scores)} scores: give one for each")
    texts = [_text(response, number, place) for number, response in enumerate(responses, 1)]
    return texts, [_score(score, number, place) for number, score in enumerate(scores, 1)]


def _text(response: Any, number: int, place: str) -> str:
    name = f"response {number} of {RESPONSES}"
    return text_field({name: response}, name, place)


def _score(score: Any, number: int, place: str) -> float:
    where = f"{place}: score {number}"
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise UserError(f"{where} must be a number, not {score!r}")
    if not (abs(score) <= LARGEST):
        kind = "not finite" if isinstance(score, float) and not math.isfinite(score) else "too large"
        raise UserError(f"{where} is {kind}: score the response again, or drop the row")
    return float(score)


def _best_and_worst(scores: list[float]) -> tuple[int, int]:
    """The places of the highest and the lowest score: of equal ones the first and the last, so that both differ."""
    places = range(len(scores))
    return max(places, key=lambda place: (scores[place], -place)), min(places, key=lambda p: (scores[p], -p))


def _preferences(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer
) -> tuple[list[Preference], DataReport]:
    """Scored rows, or plain pairs, such as those of a test set."""
    read = read_scored if _is_scored(source) else records.read_preferences
    return read(source, strict=strict, max_rows=max_rows, render=render)


def _demonstrations(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer
) -> tuple[list[Demonstration], DataReport]:
    """The best response of each scored row, or plain demonstrations."""
    if not _is_scored(source):
        return records.read_demonstrations(source, strict=strict, max_rows=max_rows, render=render)
    pairs, report = read_scored(source, strict=strict, max_rows=max_rows, render=render)
    return [Demonstration(row.prompt, row.chosen, row.group, row.category) for row in pairs], report


def _is_scored(source: Source) -> bool:
    """Whether a source holds scored rows, by its first row; one without a side of a pair is taken for one."""
    first = next((row for _, row in source.rows(1)), {})
    return RESPONSES in first or not {"chosen", "response", "completion", "messages"} & first.keys()


def _readers(_: DataConfig, options: dict[str, Any]) -> Readers:
    return Readers(
        partial(_preferences, **options), partial(_demonstrations, **options), partial(records.read_prompts, **options)
    )


FIELDS = (*layouts.FIELDS, RESPONSES, SCORES)
FORMAT = RowFormat(_readers, fields=FIELDS)
