"""Rows to fixed-shape batches: tokenization, truncation, collation, and Grain's deterministic order.

A batch is a `Joined` of NumPy arrays. Batch k of a run is a function of the seed and k alone, so that resuming needs
only the step count, and each process collates just its own rows of it.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from mpo_jax.errors import UserError
from mpo_jax.text import TextCodec
from mpo_jax.types import Joined


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized prompt with its responses, and extra numbers that travel with the row."""

    prompt: list[int]
    responses: list[list[int]]
    extra: tuple[float, ...] = ()

    @property
    def key(self) -> int:
        """32 bits of sha256 of the prompt's ids: what the row's random numbers are folded from."""
        return int.from_bytes(hashlib.sha256(np.asarray(self.prompt, np.int32).tobytes()).digest()[:4], "big")


@dataclasses.dataclass
class TokenReport:
    """What tokenization did: rows, and how many had their prompt or a response cut."""

    rows: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def tokenize(codec: TextCodec, rows: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[list[Example], TokenReport]:
    """Tokenizes (prompt, responses) rows and counts what was cut."""
    report = TokenReport(rows=len(rows))
    examples = []
    for prompt, responses in rows:
        prompt_ids = codec.prompt(prompt)
        response_ids = [codec.response(response) for response in responses]
        report.truncated_prompts += prompt_ids.truncated
        report.truncated_responses += any(fitted.truncated for fitted in response_ids)
        examples.append(Example(prompt_ids.ids, [fitted.ids for fitted in response_ids]))
    return examples, report


@dataclasses.dataclass(frozen=True)
class Widths:
    """Columns of a batch: prompt, and each response. Static shapes, hence one compilation."""

    prompt: int
    response: int

    @classmethod
    def of(cls, examples: Sequence[Example], *, response: int | None = None, multiple: int = 8) -> "Widths":
        """The narrowest widths, rounded up to `multiple`, that hold all examples; `response` overrides one."""

        def up(n: int) -> int:
            return -(-max(n, 1) // multiple) * multiple

        longest = max((len(r) for example in examples for r in example.responses), default=1)
        return cls(up(max(len(example.prompt) for example in examples)), up(longest) if response is None else response)


def collate(examples: Sequence[Example], widths: Widths, *, num_responses: int, size: int | None = None) -> Joined:
    """Right-pads examples into arrays; rows up to `size` are filler with a prompt length of 0."""
    size = len(examples) if size is None else size
    prompt = np.zeros((size, widths.prompt), np.int32)
    prompt_len = np.zeros((size,), np.int32)
    response = np.zeros((size, num_responses, widths.response), np.int32)
    response_len = np.zeros((size, num_responses), np.int32)
    key = np.zeros((size,), np.uint32)
    for b, example in enumerate(examples):
        prompt[b, : len(example.prompt)] = example.prompt
        prompt_len[b] = len(example.prompt)
        key[b] = example.key
        for n, ids in enumerate(example.responses):
            response[b, n, : len(ids)] = ids
            response_len[b, n] = len(ids)
    return Joined(prompt, prompt_len, response, response_len, key)


class Batch(NamedTuple):
    """A training batch: its rows, their extra numbers [B E] float32, and how often each was seen before [B] uint32."""

    rows: Joined
    extra: np.ndarray
    epoch: np.ndarray


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """An endless, reshuffled-every-epoch sequence of batches of one size; `batches[k]` is the k-th.

    An epoch's last, incomplete batch is filled from the next epoch's start: every example is seen equally often, and no
    example twice before all others.
    """

    examples: Sequence[Example]
    widths: Widths
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not self.examples:
            raise UserError("there is nothing to train on: the data set is empty")

    @cached_property
    def _order(self) -> Any:
        return grain.MapDataset.range(len(self.examples)).seed(self.seed).shuffle().repeat()

    def __getitem__(self, k: int) -> Batch:
        begin = k * self.batch_size
        rows = _own_part(self.batch_size)
        places = [begin + row for row in rows]
        chosen = [self.examples[int(self._order[place])] for place in places]
        joined = collate(chosen, self.widths, num_responses=len(self.examples[0].responses))
        extra = np.asarray([example.extra for example in chosen], np.float32).reshape(len(chosen), -1)
        epoch = np.asarray([place // len(self.examples) for place in places], np.uint32)
        return Batch(joined, extra, epoch)


def _own_part(batch_size: int) -> range:
    """The rows of a global batch that this process puts on its devices."""
    each = batch_size // jax.process_count()
    return range(jax.process_index() * each, (jax.process_index() + 1) * each)


def num_steps(num_examples: int, *, epochs: float, steps: int | None, batch_size: int) -> int:
    """Updates in a run: `steps` where given, else the epochs' examples over the batch size, at least one."""
    return steps if steps is not None else max(1, int(epochs * num_examples // batch_size))


def map_batches(
    examples: Sequence[Example],
    widths: Widths,
    batch_size: int,
    function: Callable[[Joined], Any],
) -> Any:
    """Applies `function` (a batch to a pytree of [B ...] NumPy arrays) to all examples in order; drops the filler.

    Returns one pytree of arrays that lead with len(examples).
    """
    parts = []
    for begin in range(0, len(examples), batch_size):
        part = examples[begin : begin + batch_size]
        batch = collate(part, widths, num_responses=len(examples[0].responses), size=batch_size)
        parts.append(jax.tree.map(partial(_first, len(part)), function(batch)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _first(count: int, x: Any) -> np.ndarray:
    return np.asarray(x)[:count]
