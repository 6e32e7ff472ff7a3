"""Reads and tokenizes the user's rows: pairs, demonstrations and prompts, and their batches."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from mpo_jax.config.registry import ROW_FORMATS
from mpo_jax.config.schema import DataConfig, TextConfig
from mpo_jax.config.suggestion import suggest
from mpo_jax.data.batches import Batch, Buckets, TrainBatches, num_steps
from mpo_jax.data.chat import Chat, Message
from mpo_jax.data.columns import check_columns, renamed
from mpo_jax.data.corpus import FIRST_ROWS
from mpo_jax.data.fields import MissingField
from mpo_jax.data.records import DataReport, Readers
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.sources import Row, Source, open_source
from mpo_jax.data.special_tokens import SpelledTokens
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, number_visits, tokenize
from mpo_jax.data.turns import Turns
from mpo_jax.errors import UserError
from mpo_jax.runtime.files import write_lines
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.tools.api.arguments import checked
from mpo_jax.tools.api.models import MAX_TOKENS

Self = TypeVar("Self", bound="Rows")
T = TypeVar("T")

Given = str | Path | Iterable[Mapping[str, Any]]
"""Path of a file or folder, a hub data set, or the rows themselves."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of fixed size in a seeded order; batch k is the same in every run, and an epoch has each row once.

    Indexing and iteration give `Batch`es: the step number, `rows` (a `PromptBatch`) and the indices of the examples.
    """

    source: TrainBatches
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> Batch:
        if not 0 <= k < self.count:
            raise IndexError(f"batch {k} of {self.count}")
        return self.source[k]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.source.__getitem__, range(self.count))


@dataclasses.dataclass(frozen=True, repr=False)
class Rows:
    """Tokenized rows with their texts.

    Attributes:
      prompts: prompts before the template; `examples` holds what the model reads.
      responses: responses of each row, the same number in all: (chosen, rejected), (response,) or ().
      report: counts of rows read and dropped.
      tokenizer: what the ids belong to.
    """

    prompts: Sequence[str]
    responses: Sequence[tuple[str, ...]]
    examples: Sequence[Example]
    report: DataReport
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        return f"<{len(self)} {type(self).__name__.lower()} from {self.report.source}>"

    def take(self: Self, index: Sequence[int] | np.ndarray) -> Self:
        """The rows with these indices, or where a mask of booleans is True."""
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if isinstance(values, np.ndarray):
                changed[field.name] = values[index.astype(np.int64)]
            elif isinstance(values, Sequence):
                changed[field.name] = [values[int(i)] for i in index]
        return dataclasses.replace(self, **changed)

    def batches(
        self, batch_size: int, *, seed: int = 0, epochs: float = 1.0, shuffle: bool = True, length_buckets: int = 4
    ) -> Batches:
        """Batches of `batch_size` rows over all devices.

        Args:
          epochs: number of passes over the rows. A batch that a pass does not fill continues with the next pass;
            what is left of the last pass is not used. There is one batch at least.
          length_buckets: maximum number of widths that batches are padded to; each compiles once.
        """
        if batch_size < 1 or epochs <= 0 or length_buckets < 1:
            raise UserError(
                f"batch_size={batch_size}, epochs={epochs} and length_buckets={length_buckets} must be positive"
            )
        buckets = Buckets.of(self.examples, length_buckets)
        source = TrainBatches(self.examples, buckets, batch_size, seed, shuffle)
        return Batches(source, num_steps(len(self), epochs=epochs, steps=None, batch_size=batch_size))


@dataclasses.dataclass(frozen=True, repr=False)
class Pairs(Rows):
    """Preference rows; the first response is the chosen one.

    Attributes:
      gap: [E] score of the chosen side minus the other's, once `select` has scored them.
      turns: of the prompts that are conversations; None: all are plain text.
    """

    gap: np.ndarray | None = None
    turns: Turns | None = None

    def to_jsonl(self, path: str | Path) -> None:
        """Writes rows {prompt, chosen, rejected} and, if known, gap, in the format that TRL and `read_pairs` read.

        Conversations are lists of messages, with `tools` where they have them, for any chat template.
        """
        write_lines(Path(path), map(self._line, range(len(self))))

    def _line(self, row: int) -> dict[str, Any]:
        sides: dict[str, str] = dict(zip(("chosen", "rejected"), self.responses[row], strict=True))
        prompt = self.prompts[row]
        line = {"prompt": prompt, **sides} if self.turns is None else self.turns.row(prompt, sides)
        return line if self.gap is None else {**line, "gap": float(self.gap[row])}


@dataclasses.dataclass(frozen=True)
class _Given:
    """In-memory rows as a source."""

    given: Sequence[Mapping[str, Any]]
    name: str = "rows"

    def files(self) -> list[Path]:
        return []

    def rows(self, max_rows: int | None = None) -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(self.given[:max_rows], 1):
            yield f"row {number}", dict(row)


def read_pairs(source: Given, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Pairs:
    """Reads preference rows: {prompt, chosen, rejected}, or another format.

    Args:
      source: .jsonl or .parquet file, folder, hub:ORG/NAME, or the rows themselves.
      tokenizer: tokenizer of the model that reads the rows.
      options: kind (a row format in configs/README.md, default "pairs"), max_prompt_tokens and max_response_tokens
        (512), chat (False: plain prompts stay plain), template_options and fold_system (as the keys of that name in
        `text`), prompt_template ("{prompt}"), strict (True: drops unusable rows and counts them in `report`), max_rows,
        columns (columns by the field that they hold, such as {"prompt": "question"}), end_markers ("strip": special
        tokens that a response ends with as text, such as "</s>", are taken off, with a warning; or "keep").

    Raises:
      UserError: for a missing file, a malformed row (with its place), or if there are no rows.
    """
    opened = _open(source, tokenizer, options)
    rows, report = opened.read(opened.readers.preferences)
    texts = [(row.prompt, (row.chosen, row.rejected)) for row in _some(rows, report)]
    return Pairs(*_tokenized(opened.codec, texts), report, tokenizer, turns=opened.turns)


def read_demonstrations(source: Given, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Rows:
    """Reads rows {prompt, response} to imitate; options as for `read_pairs`."""
    opened = _open(source, tokenizer, options)
    rows, report = opened.read(opened.readers.demonstrations)
    texts = [(row.prompt, (row.response,)) for row in _some(rows, report)]
    return Rows(*_tokenized(opened.codec, texts), report, tokenizer)


def read_prompts(source: Given, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Rows:
    """Reads the prompts of rows of any layout, to sample from; options as for `read_pairs`."""
    opened = _open(source, tokenizer, options)
    rows, report = opened.read(opened.readers.prompts)
    prompts, responses, examples = _tokenized(opened.codec, [(row.prompt, ()) for row in _some(rows, report)])
    return Rows(prompts, responses, number_visits(examples), report, tokenizer)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source with what reads it."""

    readers: Readers
    codec: TextCodec
    source: Source
    spelled: SpelledTokens
    turns: Turns

    def read(self, reader: Callable[[Source], tuple[list[T], DataReport]]) -> tuple[list[T], DataReport]:
        """The rows and their report; warns of special tokens in them."""
        try:
            rows, report = reader(self.source)
        except MissingField as error:
            raise UserError(f'{error}. columns={{"{error.field}": NAME}} takes it from another column') from error
        for message in self.spelled.warnings():
            warn(message)
        return rows, report


def _open(source: Given, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> _Opened:
    of_text = {"chat": False, "template_options": {}, "fold_system": False, "prompt_template": "{prompt}",
               "max_prompt_tokens": MAX_TOKENS, "max_response_tokens": MAX_TOKENS, "end_markers": "strip"}  # fmt: skip
    known = {"kind": "pairs", "strict": True, "max_rows": None, "columns": {}, **of_text}
    if unknown := options.keys() - known.keys():
        name = sorted(unknown)[0]
        raise UserError(f"rows have no option {name}{suggest(name, [*known])}")
    given = {**known, **options}
    if given["kind"] not in ROW_FORMATS:
        raise UserError(f"kind={given['kind']!r} is not a row format{suggest(str(given['kind']), [*ROW_FORMATS])}")
    text = checked(TextConfig, {name: given[name] for name in of_text})
    form = importlib.import_module(ROW_FORMATS[given["kind"]]).FORMAT
    spelled = SpelledTokens(lambda: tokenizer, text.end_markers)
    conversations: dict[str, tuple[Message, ...]] = {}
    chat = cache(lambda: Chat.of(tokenizer, text))
    render = Renderer(chat, wrap=text.chat, turns=form.turns, conversations=conversations, spelled=spelled)
    opened = open_source(str(source)) if isinstance(source, str | Path) else _Given(list(source))
    data = checked(DataConfig, {"kind": given["kind"], "path": (opened.name,), "columns": given["columns"]})
    opened = renamed(opened, data.columns)
    check_columns([opened], data.columns, form.fields, FIRST_ROWS)
    readers = form.readers(data, {"strict": given["strict"], "max_rows": given["max_rows"], "render": render})
    return _Opened(readers, TextCodec(tokenizer, text), opened, spelled, Turns(conversations, chat))


def _some(rows: Sequence[Any], report: DataReport) -> Sequence[Any]:
    if not rows:
        raise UserError(f"{report.source} has no rows to use: {report.read} read, dropped {dict(report.dropped)}")
    return rows


def _tokenized(
    codec: TextCodec, rows: Sequence[tuple[str, tuple[str, ...]]]
) -> tuple[list[str], list[tuple[str, ...]], list[Example]]:
    examples, _ = tokenize(codec, rows)
    return [prompt for prompt, _ in rows], [responses for _, responses in rows], examples
