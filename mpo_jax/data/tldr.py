"""TL;DR: Reddit posts with summaries, and comparisons of two summaries, in their published layouts.

A query is `SUBREDDIT: r/{subreddit}\\n\\nTITLE: {title}\\n\\nPOST: {post}\\n\\nTL;DR:`; exactly one space separates it
from the summary. A row's fields determine its layout:

    {subreddit, title, post, summary}        a post and its author's summary
    {info, summaries, choice}                a post or news article in info, two summaries, the better one's index
    {prompt, reference, model_1b, preferred} a query, the author's summary, a model's, and which one is better, or null
    {prompt, label}, {prompt, completion}, {prompt, response}    a query and a summary
    {prompt, chosen, rejected}               a query and two summaries

A row's group is its query up to the final `TL;DR:`, so a post has the same group in every layout. Its category is the
subreddit.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from mpo_jax.config.schema import DataConfig
from mpo_jax.data.fields import Drop, text_field, whole
from mpo_jax.data.records import (
    DataReport,
    Demonstration,
    Preference,
    Prompt,
    Readers,
    RowFormat,
    collect,
    demonstration,
    preference,
    prompt_only,
    row_category,
)
from mpo_jax.data.rendering import Renderer, one_line
from mpo_jax.data.sources import Row, Source
from mpo_jax.errors import UserError

Layout = tuple[str, ...]
POST: Layout = ("subreddit", "title", "post", "summary")
COMPARISON: Layout = ("info", "summaries", "choice")
REFERENCE: Layout = ("prompt", "reference", "model_1b", "preferred")
PAIR: Layout = ("prompt", "chosen", "rejected")
SUMMARY_OF: dict[Layout, str] = {
    POST: "summary",
    REFERENCE: "reference",
    ("prompt", "label"): "label",
    ("prompt", "completion"): "completion",
    ("prompt", "response"): "response",
}
END = "TL;DR:"
_SUBREDDIT = re.compile(r"\s*SUBREDDIT: (r/\S+)")


def read_tldr_preferences(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer, keep_news: bool = False
) -> tuple[list[Preference], DataReport]:
    """Reads pairs of summaries of one query.

    Drops, counted by reason: comparisons on news articles unless `keep_news`, rows without a preference, and, if
    strict, equal or empty summaries. A news article's query is `Article:\\n{article}\\n\\nTL;DR:`.

    Raises:
      UserError: for a layout without preferences, or a field that is missing or has the wrong type.
    """

    def convert(place: str, row: Row) -> Preference:
        layout = _layout(row, (COMPARISON, REFERENCE, PAIR), place)
        query = _query(row, place, keep_news)
        if layout == COMPARISON:
            chosen, rejected = _compared(row, place)
        elif layout == REFERENCE:
            chosen, rejected = _preferred(row, place)
        else:
            chosen, rejected = text_field(row, "chosen", place), text_field(row, "rejected", place)
            query, chosen, rejected = _end_in_query(query, chosen, rejected)
        sides = _spaced(chosen), _spaced(rejected)
        return preference(query, *sides, place, **_named(query, row, place), strict=strict, render=render)

    return collect(source, max_rows, convert)


def read_tldr_demonstrations(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer
) -> tuple[list[Demonstration], DataReport]:
    """Reads queries with the summary to imitate (of several, the author's). Strict drops and counts empty ones.

    Raises:
      UserError: for a layout without such a summary, or a field that is missing or has the wrong type.
    """

    def convert(place: str, row: Row) -> Demonstration:
        layout = _layout(row, tuple(SUMMARY_OF), place)
        query = _query(row, place, keep_news=False)
        summary = _spaced(text_field(row, SUMMARY_OF[layout], place))
        return demonstration(query, summary, place, **_named(query, row, place), strict=strict, render=render)

    return collect(source, max_rows, convert)


def read_tldr_prompts(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer, keep_news: bool = False
) -> tuple[list[Prompt], DataReport]:
    """Reads the queries of rows of any layout, or of {prompt} alone. Drops and counts news articles unless `keep_news`.

    Raises:
      UserError: for a layout without a query, or a field that is missing or has the wrong type.
    """

    def convert(place: str, row: Row) -> Prompt:
        layout = _layout(row, (COMPARISON, POST[:-1], PAIR, ("prompt",)), place)
        query = _query(row, place, keep_news)
        if layout == PAIR:
            query, *_ = _end_in_query(query, *(text_field(row, side, place) for side in PAIR[1:]))
        return prompt_only(query, place, **_named(query, row, place), strict=strict, render=render)

    return collect(source, max_rows, convert)


def has_references(source: Source) -> bool:
    """Whether the source's first row has the `REFERENCE` layout, in which every row holds the author's summary."""
    return any(set(REFERENCE) <= row.keys() for _, row in source.rows(1))


def _layout(row: Row, known: Sequence[Layout], place: str) -> Layout:
    for layout in known:
        if all(field in row for field in layout):
            return layout
    layouts = "; ".join("{" + ", ".join(layout) + "}" for layout in known)
    raise UserError(
        f"{place}: unknown layout with the fields {', '.join(row) or '(none)'}; known here: {layouts}. "
        "Rename the fields, or check data.kind and whether the key names the right file"
    )


def _query(row: Row, place: str, keep_news: bool) -> str:
    if "prompt" in row:
        return text_field(row, "prompt", place)
    post = row.get("info", row)
    if not isinstance(post, dict):
        raise UserError(f"{place}: field 'info' must be an object, not {type(post).__name__}")
    where = f"{place}: field 'info'" if "info" in row else place
    # in a table, the columns that a row does not use are null
    if not post.get("post") and post.get("article"):
        if not keep_news:
            raise Drop("news article")
        return f"Article:\n{text_field(post, 'article', where)}\n\n{END}"
    subreddit, title, body = (text_field(post, field, where) for field in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit.removeprefix('r/')}\n\nTITLE: {title}\n\nPOST: {body}\n\n{END}"


def _named(query: str, row: Row, place: str) -> dict[str, str | None]:
    """A row's group and category."""
    found, field = _SUBREDDIT.match(query), row.get("subreddit")
    subreddit = found and found[1]
    if subreddit is None and isinstance(field, str) and field:
        name = whole(field, f"{place}: field 'subreddit'")
        subreddit = f"r/{name.removeprefix('r/')}"
    return {"group": one_line(query.rstrip().removesuffix(END)), "category": row_category(row, place) or subreddit}


def _compared(row: Row, place: str) -> tuple[str, str]:
    summaries, choice = row["summaries"], row["choice"]
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(one, dict) for one in summaries):
        raise UserError(f"{place}: field 'summaries' must be a list of two objects {{text}}")
    if choice not in (0, 1) or isinstance(choice, bool):
        raise UserError(f"{place}: field 'choice' must be 0 or 1, the index of the better summary, not {choice!r}")
    texts = [text_field(one, "text", f"{place}: field 'summaries'") for one in summaries]
    return texts[int(choice)], texts[1 - int(choice)]


def _preferred(row: Row, place: str) -> tuple[str, str]:
    if row["preferred"] is None:
        raise Drop("no preference")
    sides = ["reference", "model_1b"]
    if row["preferred"] not in sides:
        raise UserError(f"{place}: field 'preferred' must be reference, model_1b or null, not {row['preferred']!r}")
    chosen, rejected = sides if row["preferred"] == "reference" else reversed(sides)
    return text_field(row, chosen, place), text_field(row, rejected, place)


def _end_in_query(query: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Moves a `TL;DR:` at the start of both summaries, as in some published pairs, to the end of the query."""
    sides = [text.lstrip() for text in (chosen, rejected)]
    if query.rstrip().endswith(END) or not all(side.startswith(END) for side in sides):
        return query, chosen, rejected
    return f"{query}\n{END}", sides[0].removeprefix(END), sides[1].removeprefix(END)


def _spaced(summary: str) -> str:
    return " " + summary.lstrip()


def _readers(data: DataConfig, options: dict[str, Any]) -> Readers:
    return Readers(
        partial(read_tldr_preferences, keep_news=data.keep_news, **options),
        partial(read_tldr_demonstrations, **options),
        partial(read_tldr_prompts, keep_news=data.keep_news, **options),
    )


_FIELDS = tuple(dict.fromkeys([*POST, *COMPARISON, *REFERENCE, *PAIR, *SUMMARY_OF.values(), "article", "category"]))
FORMAT = RowFormat(_readers, has_references=has_references, fields=_FIELDS)
