"""Row types, and the generic readers for strings and conversations: they check rows, render them and count drops."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from mpo_jax.config.schema import DataConfig
from mpo_jax.data.chat import Message, Reply, offering
from mpo_jax.data.fields import Drop, Unusable, said, tools_of, whole
from mpo_jax.data.layouts import BETTER, FIELDS, RESPONSES, standard
from mpo_jax.data.rendering import Renderer, user_turn
from mpo_jax.data.sources import Source
from mpo_jax.data.text_files import Row, columns_of
from mpo_jax.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the model sees it.

    Attributes:
      group: prompt text before rendering, independent of layout and whitespace (see `Renderer.group`). All rows of a
        group fall on the same side of every split.
      category: label by which tables are broken down, if the row or its source names one.
    """

    prompt: str
    group: str
    category: str | None = None


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and a response to imitate; `group` and `category` as in `Prompt`."""

    prompt: str
    response: str
    group: str
    category: str | None = None


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and a rejected response; `group` and `category` as in `Prompt`.

    Attributes:
      scores: of the chosen and the rejected response, where the row brings them.
    """

    prompt: str
    chosen: str
    rejected: str
    group: str
    category: str | None = None
    scores: tuple[float, float] | None = None


@dataclasses.dataclass
class DataReport:
    """Row counts of one source: read = kept + dropped; drops are counted by reason."""

    source: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "read": self.read, "kept": self.kept, "dropped": dict(self.dropped)}


def collect(source: Source, max_rows: int | None, convert: Callable[[str, Row], T]) -> tuple[list[T], DataReport]:
    """Applies `convert(place, row)` to the rows of a source; those for which it raises Drop or Unusable are counted."""
    report = DataReport(source.name)
    rows = []
    for place, row in source.rows(max_rows):
        report.read += 1
        try:
            rows.append(convert(place, row))
        except Drop as reason:
            report.drop(str(reason))
        except Unusable as error:
            report.drop(error.reason)
    report.kept = len(rows)
    return rows, report


@dataclasses.dataclass(frozen=True)
class Readers:
    """The readers of one format; each maps a source to its kept rows and a report."""

    preferences: "Callable[[Source], tuple[list[Preference], DataReport]]"
    demonstrations: "Callable[[Source], tuple[list[Demonstration], DataReport]]"
    prompts: "Callable[[Source], tuple[list[Prompt], DataReport]]"


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """A row layout; `data.kind` names one in `mpo_jax.config.registry.ROW_FORMATS`.

    Attributes:
      readers: function (data section, options of all readers: strict, max_rows, render) -> readers.
      turns: function from a plain prompt to its chat turns.
      has_references: whether the preference rows of a source also hold demonstrations.
      category: function from a source's name to the category it implies; None if names imply none.
      fields: what data.columns may name; empty: anything.
    """

    readers: Callable[[DataConfig, dict[str, Any]], Readers]
    turns: Callable[[str], list[Message]] = user_turn
    has_references: Callable[[Source], bool] = lambda _: False
    category: Callable[[str], str | None] | None = None
    fields: tuple[str, ...] = ()


def read_preferences(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer
) -> tuple[list[Preference], DataReport]:
    """Reads rows {prompt, chosen, rejected} of strings or conversations (lists of {role, content}).

    In conversations, chosen and rejected end with the replies to compare; the turns before are the prompt. Each side
    may hold the whole conversation, with or without a `prompt` field, or only the turns after the prompt.
    Strict drops, counted by reason: equal sides, empty prompts or responses, a rejected side with another prompt.
    Non-strict drops only empty prompts; a rejected side with another prompt contributes its last reply.

    Raises:
      UserError: for a field that is missing or has the wrong type, or a conversation that does not end with the
        assistant.
    """

    def convert(place: str, row: Row) -> Preference:
        if field := _demonstration_alone(row):
            raise UserError(
                f"{place}: the row is a demonstration, {{{field}}}, without a chosen and a rejected response: name "
                "its file in data.sft_path"
            )
        row, tools, category = standard(row, place), tools_of(row, place), row_category(row, place)
        implicit = row.get("prompt") is None and isinstance(row.get("chosen"), list)
        prompt = [] if implicit else said(row, "prompt", place)
        chosen, rejected = said(row, "chosen", place), said(row, "rejected", place)
        if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str) and not tools:
            return preference(prompt, chosen, rejected, place, category=category, strict=strict, render=render)
        context, reply = _last_reply(prompt, chosen, f"{place}: field 'chosen'", render)
        other, other_reply = _last_reply(prompt, rejected, f"{place}: field 'rejected'", render)
        if strict and context != other:
            raise Drop("rejected has another prompt")
        context = offering(context, tools)
        return preference(context, reply, other_reply, place, category=category, strict=strict, render=render)

    return collect(source, max_rows, convert)


def _demonstration_alone(row: Row) -> str | None:
    """The field of a conversation that is no pair; None if it may be one."""
    if any(field in row for field in ("chosen", "rejected", BETTER)):
        return None
    return next((field for field in ("messages", "conversations") if row.get(field) is not None), None)


def read_demonstrations(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer
) -> tuple[list[Demonstration], DataReport]:
    """Reads rows {prompt, response} or {prompt, completion} of strings or conversations, or {messages}, a conversation.

    The last reply of a conversation is the response, and the turns before it are the prompt. Strict drops and counts
    rows with an empty prompt or response; non-strict only those with an empty prompt.

    Raises:
      UserError: for a field that is missing or has the wrong type, or a conversation that does not end with the
        assistant.
    """

    def convert(place: str, row: Row) -> Demonstration:
        row, tools = standard(row, place), tools_of(row, place)
        field = next((name for name in RESPONSES if row.get(name) is not None), None)
        if field is None:
            raise _no_response(row, place)
        prompt = [] if field == "messages" else said(row, "prompt", place)
        response: Reply | list[Message] = said(row, field, place)
        if not isinstance(prompt, str) or not isinstance(response, str) or tools:
            context, response = _last_reply(prompt, response, f"{place}: field {field!r}", render)
            prompt = offering(context, tools)
        return demonstration(prompt, response, place, category=row_category(row, place), strict=strict, render=render)

    return collect(source, max_rows, convert)


def read_prompts(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer
) -> tuple[list[Prompt], DataReport]:
    """Reads the prompts of rows {prompt} (a string, or a conversation for the assistant to continue), or of rows that
    `read_preferences` and `read_demonstrations` take. Drops and counts empty prompts.

    Raises:
      UserError: for a field that is missing or has the wrong type.
    """

    def convert(place: str, row: Row) -> Prompt:
        prompt = asked(row, place, render)
        return prompt_only(prompt, place, category=row_category(row, place), strict=strict, render=render)

    return collect(source, max_rows, convert)


def asked(row: Row, place: str, render: Renderer) -> str | list[Message]:
    """The prompt of a row of any layout, as the reader of that layout would extract it.

    Raises:
      UserError: for a field that is missing or has the wrong type.
    """
    row, tools = standard(row, place), tools_of(row, place)
    sides = ("chosen", "response", "completion")
    field = next((name for name in sides if isinstance(row.get(name), list)), None)
    if field is None and row.get("prompt") is None and row.get("messages") is not None:
        field = "messages"
    if field is None:
        prompt = said(row, "prompt", place)
        return offering(render.turns(prompt) if isinstance(prompt, str) else prompt, tools) if tools else prompt
    prompt = [] if row.get("prompt") is None else said(row, "prompt", place)
    return offering(_last_reply(prompt, said(row, field, place), f"{place}: field {field!r}", render)[0], tools)


def preference(
    prompt: str | list[Message],
    chosen: Reply,
    rejected: Reply,
    place: str,
    *,
    group: str | None = None,
    category: str | None = None,
    strict: bool,
    render: Renderer,
) -> Preference:
    """Checks and renders a row; `group` defaults to the group of the prompt.

    Raises:
      Drop: if the row is filtered out.
    """
    chosen, rejected = render.clean(prompt, chosen, rejected)
    if strict and chosen == rejected:
        raise Drop("chosen equals rejected")
    _drop_empty(prompt, (chosen, rejected), strict)
    text, (first, second) = render.render(prompt, (chosen, rejected), place)
    return Preference(text, first, second, render.group(prompt) if group is None else group, category)


def demonstration(
    prompt: str | list[Message],
    response: Reply,
    place: str,
    *,
    group: str | None = None,
    category: str | None = None,
    strict: bool,
    render: Renderer,
) -> Demonstration:
    """Like `preference`, for a row with one response."""
    (response,) = render.clean(prompt, response)
    _drop_empty(prompt, (response,), strict)
    text, (reply,) = render.render(prompt, (response,), place)
    return Demonstration(text, reply, render.group(prompt) if group is None else group, category)


def prompt_only(
    prompt: str | list[Message],
    place: str,
    *,
    group: str | None = None,
    category: str | None = None,
    strict: bool,
    render: Renderer,
) -> Prompt:
    """Like `preference`, for a row without responses."""
    render.clean(prompt)
    _drop_empty(prompt, (), strict)
    text, _ = render.render(prompt, (), place)
    return Prompt(text, render.group(prompt) if group is None else group, category)


def row_category(row: Row, place: str) -> str | None:
    """The row's `category` field if it is a non-empty string.

    Raises:
      UserError: if it is no valid Unicode.
    """
    category = row.get("category")
    if not isinstance(category, str):
        return None
    return whole(category, f"{place}: field 'category'").strip() or None


def is_validation(group: str, *, seed: int, fraction: float) -> bool:
    """Whether a group belongs to the validation rows: sha256(seed|group) mod 10000 < 10000 fraction.

    Independent of row order and process count; rows of one prompt stay together.
    """
    digest = hashlib.sha256(f"{seed}|{group}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest, "big") % 10000 < round(10000 * fraction)


def _last_reply(
    prompt: str | list[Message], side: str | list[Message], where: str, render: Renderer
) -> tuple[list[Message], Reply]:
    """The conversation of a prompt and one side, split into the turns before the last reply and that reply."""
    context = render.turns(prompt) if isinstance(prompt, str) else prompt
    if isinstance(side, str):
        return context, side
    # with a plain prompt, a side that does not start with the assistant is the whole conversation
    begun = isinstance(prompt, str) and bool(side) and side[0]["role"] != "assistant"
    whole = side if begun or side[: len(context)] == context else [*context, *side]
    last = side[-1]["role"] if side else "nothing"
    if last != "assistant":
        raise UserError(f"{where}: a conversation must end with a message of role assistant, not with {last}")
    return whole[:-1], whole[-1] if whole[-1].get("tool_calls") else whole[-1]["content"]


def _no_response(row: Row, place: str) -> UserError:
    if null := next((name for name in RESPONSES if name in row), None):
        return Unusable(f"{place}: field {null!r} is null", f"{null} is null")
    return UserError(
        f"{place}: a demonstration has the fields prompt and response (or completion), or messages; this row has: "
        f"{columns_of(row)}"
    )


def _drop_empty(prompt: str | list[Message], replies: Sequence[Reply], strict: bool) -> None:
    text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
    # a response must follow something, even without filtering
    if not (text.strip() if strict else prompt):
        raise Drop("empty prompt")
    if strict and not all(reply.strip() for reply in replies if isinstance(reply, str)):
        raise Drop("empty response")


def _readers(_: DataConfig, options: dict[str, Any]) -> Readers:
    bind = lambda reader: partial(reader, **options)  # noqa: E731
    return Readers(bind(read_preferences), bind(read_demonstrations), bind(read_prompts))


FORMAT = RowFormat(_readers, fields=FIELDS)
