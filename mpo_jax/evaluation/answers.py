"""Two sides' answers to the same prompts, for judges and people to compare; read from files and finished runs."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mpo_jax.config.base import Names
from mpo_jax.data.chat import Message
from mpo_jax.data.columns import advice, check_columns, renamed
from mpo_jax.data.fields import MissingField, said, text_field, whole
from mpo_jax.data.sources import FILE_SUFFIXES, HUB, Row, open_source
from mpo_jax.data.text_files import columns_of
from mpo_jax.errors import UserError

T = TypeVar("T")
Key = tuple[str, int]
"""A prompt, and how often it occurred before."""

RESPONSES = ("response", "completion")
"""The fields that hold an answer, the first that a row has."""
FIRST_ROWS = 4
"""Rows of each file that are read to see which columns there are."""
CATEGORY = "category"
"""The default field for a row's category."""

SHOWN = "shown"
"""The field of a row that holds its prompt as the model saw it; `prompt` is then the prompt as the data has it."""

SAMPLES = "samples.jsonl"
"""The samples in an evaluation's folder."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to compare answers to.

    Attributes:
      text: as people and judges read it.
      turns: the row's own form: the same text, or a conversation, for a model's chat template.
      category: of the row, where it has one.
    """

    text: str
    turns: str | list[Message]
    category: str | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt and a response to it, which may be empty.

    Attributes:
      prompt: its text, by which the two sides' answers are paired.
      category: of the row, where it has one.
      shown: the prompt as the model saw it (chat, template, cut to length), where that is known to differ.
    """

    prompt: str
    response: str
    category: str | None = None
    shown: str | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both sides' responses to one prompt.

    Attributes:
      shown: the prompt as both models saw it, where that differs.
      alike: whether both saw the same; where they did not, `shown` is None.
    """

    prompt: str
    a: str
    b: str
    category: str | None = None
    shown: str | None = None
    alike: bool = True

    @property
    def seen(self) -> str:
        """The prompt as judges and people see it."""
        return self.prompt if self.shown is None else self.shown


def find_answers(path: str) -> str | None:
    """The rows that `path` names: a file of rows, or the samples of a run's or an evaluation's folder.

    Of a workdir it is its only evaluated run. None for anything else, such as a model.

    Raises:
      UserError: for a run without an evaluation, and for a workdir with several.
    """
    if path.startswith(HUB) or path.endswith(FILE_SUFFIXES):
        return path
    folder = Path(path).expanduser()
    if (folder / SAMPLES).is_file():
        return str(folder / SAMPLES)
    if not (folder / "env.json").is_file():
        evaluated = sorted((folder / "runs").glob(f"*/evaluate/{SAMPLES}"))
        if len(evaluated) > 1:
            runs = ", ".join(str(samples.parent.parent) for samples in evaluated)
            raise UserError(f"{path} holds several runs: name one of {runs}")
        return str(evaluated[0]) if evaluated else None
    samples = folder / "evaluate" / SAMPLES
    if not samples.is_file():
        raise UserError(
            f"the run {path} has no finished evaluation, so there are no samples to compare: finish it with `mpo run`, "
            "or name the model in it, such as its folder 1-dpo, and give prompts with --data"
        )
    return str(samples)


def check_answer_columns(paths: Sequence[str], by: str, columns: Names) -> None:
    """Raises UserError for a field in data.columns that neither prompts nor answers have, or a column in no file."""
    sources = [renamed(open_source(path), columns) for path in paths]
    check_columns(sources, columns, ("prompt", *RESPONSES, SHOWN, by), FIRST_ROWS)


def read_answers(path: str, by: str = CATEGORY, columns: Names = (), field: str | None = None) -> list[Answer]:
    """Rows {prompt, response} or {prompt, completion}, strings or conversations, of which the last message responds.

    A field `shown`, where it is there, is the prompt as the model saw it.

    Args:
      by: the field that holds a row's category, where it has one.
      columns: as data.columns, pairs of a field and the column that holds it.
      field: that which responds, in place of the usual ones.

    Raises:
      UserError: for a row of another form, with its place, or if there are no rows.
    """
    answers = []
    # a row may have both, of which one has been named
    fields = sorted(RESPONSES, key=lambda name: name not in dict(columns)) if field is None else [field]
    for place, row in renamed(open_source(path), columns).rows():
        said_in = next((name for name in fields if row.get(name) is not None), None)
        if said_in is None:
            if field is not None:
                raise UserError(
                    f"{place}: no field {field!r}, the answer in {path}:{field}; this row has: {columns_of(row)}"
                )
            raise UserError(
                f"{place}: an answer has the fields prompt and response (or completion); this row has: "
                f"{columns_of(row)}. data.columns.response=NAME takes it from another column"
            )
        response = said(row, said_in, place)
        if not isinstance(response, str):
            if not response:
                raise UserError(f"{place}: field {said_in!r} is an empty conversation; it must end with the answer")
            if (role := response[-1]["role"]) != "assistant":
                raise UserError(
                    f"{place}: field {said_in!r} must end with a message of role assistant, the answer, not with {role}"
                )
            response = response[-1]["content"]
        shown = None if row.get(SHOWN) is None else text_field(row, SHOWN, place)
        try:
            prompt = as_text(said(row, "prompt", place))
        except MissingField as error:
            raise UserError(advice(error)) from error
        answers.append(Answer(prompt, response, _category(row, by, place), shown))
    if not answers:
        raise UserError(f"{path} holds no rows: it needs a line {{prompt, response}} for each answer")
    return answers


def read_prompts(path: str, by: str = CATEGORY, columns: Names = ()) -> list[Prompt]:
    """Rows {prompt}, a string or a conversation, with a category where the field `by` is there; others are ignored.

    Args:
      columns: as data.columns, pairs of a field and the column that holds it.

    Raises:
      UserError: for a row without a prompt, with its place, or if there are no rows.
    """
    source, prompts = renamed(open_source(path), columns), []
    for place, row in source.rows():
        try:
            turns = said(row, "prompt", place)
        except MissingField as error:
            raise UserError(advice(error)) from error
        if not turns:
            raise UserError(f"{place}: the prompt is empty: drop the row")
        prompts.append(Prompt(as_text(turns), turns, _category(row, by, place)))
    if not prompts:
        raise UserError(f"{path} holds no rows: it needs a line {{prompt}} for each prompt")
    return prompts


def as_text(turns: str | list[Message]) -> str:
    """A prompt for people: one user's turn is its text; in longer conversations each turn begins with its role."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def match(
    a: Sequence[Answer], b: Sequence[Answer], names: tuple[str, str], prompts: Sequence[Prompt] | None = None
) -> list[Pair]:
    """Pairs answers to equal prompts; a prompt's n-th occurrence on one side is paired with the n-th on the other.

    Args:
      names: of A and B, for messages.
      prompts: those to compare on, in this order; both sides may have answers to more. None: all of A's, which must be
        all of B's.

    Raises:
      UserError: if prompts differ, or if the sources give one prompt two categories.
    """
    sides = [dict(_numbered((answer.prompt, answer) for answer in side)) for side in (a, b)]
    if prompts is None:
        wanted = {key: answer.category for key, answer in sides[0].items()}
        missing = [_missing(names[1], sides[1], names[0], sides[0]), _missing(names[0], sides[0], names[1], sides[1])]
    else:
        wanted = {key: prompt.category for key, prompt in _numbered((prompt.text, prompt) for prompt in prompts)}
        missing = [_missing(name, side, "--data", wanted) for name, side in zip(names, sides, strict=True)]
    if any(missing):
        raise UserError(
            f"A and B must answer the same prompts: {'; '.join(filter(None, missing))}. "
            "Leave the others out, or name with --data a file of the prompts to compare on"
        )
    pairs = []
    for key, category in wanted.items():
        first, second = sides[0][key], sides[1][key]
        known = {c for c in (category, first.category, second.category) if c is not None}
        if len(known) > 1:
            raise UserError(f"the prompt {key[0][:60]!r} has the categories {', '.join(sorted(known))}: give it one")
        alike = (first.shown or key[0]) == (second.shown or key[0])
        shown = (first.shown or second.shown) if alike else None
        pairs.append(Pair(key[0], first.response, second.response, next(iter(known), None), shown, alike))
    return pairs


def _numbered(rows: Iterable[tuple[str, T]]) -> Iterator[tuple[tuple[str, int], T]]:
    """Each row under its prompt and how often that prompt occurred before."""
    seen: Counter[str] = Counter()
    for prompt, row in rows:
        yield (prompt, seen[prompt]), row
        seen[prompt] += 1


def _missing(name: str, side: Mapping[Key, Any], source: str, wanted: Mapping[Key, Any]) -> str | None:
    lacking = [prompt for prompt, number in wanted if (prompt, number) not in side]
    if not lacking:
        return None
    return f"{name} has no answer to {len(lacking)} of the {len(wanted)} prompts of {source}, first {lacking[0][:60]!r}"


def _category(row: Row, by: str, place: str) -> str | None:
    value = row.get(by)
    if value is None:
        return None
    if not isinstance(value, str | int):
        raise UserError(f"{place}: field {by!r} must be a string, the name of a category, not {type(value).__name__}")
    return whole(str(value), f"{place}: field {by!r}")
