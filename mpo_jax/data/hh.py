"""HH-RLHF: dialogues of `\\n\\nHuman:` and `\\n\\nAssistant:` turns, one chosen and one rejected per row."""

import re
from functools import partial
from typing import Any

from mpo_jax.config.schema import DataConfig
from mpo_jax.data.chat import Message, Reply
from mpo_jax.data.fields import NO_ASSISTANT, Drop, text_field
from mpo_jax.data.layouts import FIELDS
from mpo_jax.data.records import (
    DataReport,
    Preference,
    Prompt,
    Readers,
    RowFormat,
    asked,
    collect,
    prompt_only,
    read_demonstrations,
    row_category,
)
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.sources import Row, Source

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
CATEGORIES = ("helpful", "harmless")
_ROLES = {HUMAN: "user", ASSISTANT: "assistant"}


def read_hh(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer
) -> tuple[list[Preference], DataReport]:
    """Reads rows {chosen, rejected}; the prompt is everything through the last `\\n\\nAssistant:` of chosen.

    Strict drops, counted by reason: equal sides, a rejected side with another prompt, empty responses, turns that do
    not alternate. Non-strict keeps every row; a rejected side with another prompt contributes the text after its own
    last `\\n\\nAssistant:`. Chat rendering also drops rows without a turn before the response. A row without a category
    field takes the category of its source (`source_category`).
    """

    def convert(place: str, row: Row) -> Preference:
        chosen, rejected = text_field(row, "chosen", place), text_field(row, "rejected", place)
        prompt = _prompt(chosen)
        if strict and (reason := _fault(chosen, rejected, prompt)):
            raise Drop(reason)
        own = rejected.startswith(prompt)
        replies = chosen[len(prompt) :], rejected[len(prompt) :] if own else rejected.rpartition(ASSISTANT)[2]
        if render.wrap:
            replies = replies[0].strip(), replies[1].strip()
        context = _context(prompt, render)
        first, second = render.clean(context, *replies)
        if strict and (reason := _unlike(first, second)):
            raise Drop(reason)
        text, (first, second) = render.render(context, (first, second), place)
        category = row_category(row, place) or source_category(place)
        return Preference(text, first, second, render.group(prompt), category)

    return collect(source, max_rows, convert)


def read_hh_prompts(
    source: Source, *, strict: bool = True, max_rows: int | None = None, render: Renderer
) -> tuple[list[Prompt], DataReport]:
    """Reads the prompts of HH-RLHF rows {chosen, rejected} or of rows that `read_prompts` takes; drops empty ones."""

    def convert(place: str, row: Row) -> Prompt:
        own = "prompt" not in row and isinstance(row.get("chosen"), str)
        prompt = _prompt(text_field(row, "chosen", place)) if own else asked(row, place, render)
        context = _context(prompt, render) if isinstance(prompt, str) else prompt
        category = row_category(row, place) or source_category(place)
        return prompt_only(context, place, group=render.group(prompt), category=category, strict=strict, render=render)

    return collect(source, max_rows, convert)


def source_category(place: str) -> str | None:
    """`helpful` or `harmless`: whichever the last matching part of a file, folder or hub data set name contains."""
    parts = re.split(r"[/:]", place.lower())
    named = (set(CATEGORIES) & set(re.split(r"[^a-z]+", part)) for part in reversed(parts))
    return next((words.pop() for words in named if len(words) == 1), None)


def dialogue_turns(prompt: str) -> list[Message]:
    """A prompt's turns as stripped messages, without the open assistant turn at its end.

    Text before the first marker counts as a user turn; so does a whole prompt without markers.
    """
    first, *rest = re.split(f"({HUMAN}|{ASSISTANT})", prompt)
    turns: list[Message] = [{"role": "user", "content": first.strip()}] if first.strip() else []
    for marker, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": _ROLES[marker], "content": content.strip()})
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def _prompt(chosen: str) -> str:
    before, marker, _ = chosen.rpartition(ASSISTANT)
    return before + marker


def _context(prompt: str, render: Renderer) -> str | list[Message]:
    return dialogue_turns(prompt) if render.wrap else prompt


def _fault(chosen: str, rejected: str, prompt: str) -> str | None:
    if chosen == rejected:
        return "chosen equals rejected"
    if not prompt:
        return NO_ASSISTANT
    if not rejected.startswith(prompt):
        return "rejected has another prompt"
    if reason := _unlike(chosen[len(prompt) :], rejected[len(prompt) :]):
        return reason
    responses = chosen[len(prompt) :] + rejected[len(prompt) :]
    if not _alternates(prompt) or HUMAN in responses or ASSISTANT in responses:
        return "turns do not alternate"
    return None


def _unlike(first: Reply, second: Reply) -> str | None:
    """Why two responses cannot be compared; None if they can."""
    if first == second:
        return "chosen equals rejected"
    return None if all(str(reply).strip() for reply in (first, second)) else "empty response"


def _alternates(prompt: str) -> bool:
    markers = re.findall(f"{HUMAN}|{ASSISTANT}", prompt)
    return prompt.startswith(HUMAN) and markers == [HUMAN, ASSISTANT] * (len(markers) // 2)


def _readers(_: DataConfig, options: dict[str, Any]) -> Readers:
    return Readers(
        partial(read_hh, **options), partial(read_demonstrations, **options), partial(read_hh_prompts, **options)
    )


FORMAT = RowFormat(_readers, turns=dialogue_turns, category=source_category, fields=FIELDS)
