"""Examples to fixed-shape batches: length buckets, collation, and a deterministic order.

A batch is a `PromptBatch` of NumPy arrays, or a `Packed`. Batch k of a run depends on the seed and k alone, so resuming
needs only the step count. Every process collates whole batches, and sharding.place_batch picks the rows of its own
devices: token ids are small, and no code assumes which rows a process's devices hold.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from mpo_jax.data.packing import Packing, pack
from mpo_jax.data.tokens import Example
from mpo_jax.errors import NotFinite, UserError
from mpo_jax.runtime.passes import Pass
from mpo_jax.runtime.prefetch import prefetched
from mpo_jax.runtime.processes import to_host
from mpo_jax.runtime.sharding import simulated
from mpo_jax.types import Packed, PromptBatch

WINDOW = 64  # batches within which rows of similar length are grouped
MIN_SAVING = 0.03  # fraction of the padded tokens that a bucket must save to be worth another compilation
QUANTILES = 16  # candidate widths for prompts, and as many for responses


@dataclasses.dataclass(frozen=True)
class Widths:
    """Padded lengths of a batch's prompts and of its responses. Shapes are static: one compilation per `Widths`."""

    prompt: int
    response: int

    @classmethod
    def of(cls, examples: Sequence[Example], *, response: int | None = None, multiple: int = 8) -> "Widths":
        """The narrowest widths, in multiples of `multiple`, that hold all examples; `response` fixes its width."""

        def up(n: int) -> int:
            return -(-max(n, 1) // multiple) * multiple

        longest = max((len(r) for example in examples for r in example.responses), default=1)
        return cls(up(max(len(example.prompt) for example in examples)), up(longest) if response is None else response)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that batches are padded to, cheapest first; the last one holds every example."""

    widths: tuple[Widths, ...]

    @classmethod
    def of(
        cls, examples: Sequence[Example], count: int, *, response: int | None = None, multiple: int = 8
    ) -> "Buckets":
        """At most `count` widths, chosen greedily to minimise padded tokens: P + N*S summed over the rows.

        Args:
          examples: rows with the same number N of responses each.
          count: maximum number of widths; 1 gives `Widths.of` alone.
          response: fixed response width of all buckets; None: what the examples need.
          multiple: divisor of every other width.

        Raises:
          UserError: if there are no examples.
        """
        if not examples:
            raise UserError("there are no rows to batch: the data set is empty; check its files and filters")
        widest = Widths.of(examples, response=response, multiple=multiple)
        prompt, longest = _lengths(examples)
        prompts = _candidates(prompt, widest.prompt, multiple)
        responses = np.asarray([response]) if response is not None else _candidates(longest, widest.response, multiple)
        # which bucket an example fits depends only on the candidate widths, so count examples per cell of their grid
        shape = len(prompts), len(responses)
        cell = np.searchsorted(prompts, prompt) * shape[1] + np.searchsorted(
            responses, np.minimum(longest, responses[-1])
        )
        rows = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
        cost = prompts[:, None] + len(examples[0].responses) * responses
        chosen = _greedy(rows, cost, count)
        chosen.sort(key=lambda place: (cost[place], place))
        return cls(tuple(Widths(int(prompts[i]), int(responses[j])) for i, j in chosen))

    def place(self, examples: Sequence[Example]) -> np.ndarray:
        """[E] index of the cheapest widths that hold each example."""
        return self._first(*_lengths(examples))

    def holding(self, examples: Sequence[Example]) -> Widths:
        """The cheapest widths that hold all the examples."""
        prompt, response = _lengths(examples)
        return self.widths[int(self._first(prompt.max(keepdims=True), response.max(keepdims=True))[0])]

    def widened(self, examples: Sequence[Example]) -> "Buckets":
        """These widths, plus one that holds all the examples if any of them fits none."""
        widest, needed = self.widths[-1], Widths.of(examples)
        if needed.prompt <= widest.prompt and needed.response <= widest.response:
            return self
        return Buckets((*self.widths, needed))

    def _first(self, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        holds = [(prompt <= widths.prompt) & (response <= widths.response) for widths in self.widths]
        if not np.any(holds, 0).all():
            raise ValueError(f"an example is longer than the widest bucket, {self.widths[-1]}")
        return np.argmax(holds, 0)


def _lengths(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """[E] prompt lengths and [E] longest response lengths, 0 without responses."""
    prompt = [len(example.prompt) for example in examples]
    response = [max((len(ids) for ids in example.responses), default=0) for example in examples]
    return np.asarray(prompt, np.int64), np.asarray(response, np.int64)


def _candidates(lengths: np.ndarray, widest: int, multiple: int) -> np.ndarray:
    """Ascending widths at the quantiles of the lengths, rounded up; the last is `widest`."""
    quantiles = np.quantile(lengths, np.linspace(0, 1, QUANTILES + 1)[1:], method="inverted_cdf")
    rounded = -(-np.maximum(quantiles, 1) // multiple) * multiple
    return np.unique(np.append(rounded, widest)).astype(np.int64)


def _greedy(rows: np.ndarray, cost: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Grid cells to pad to: the last one, then repeatedly the cell that saves most, until the saving is too small.

    Args:
      rows: [I J] number of examples in each cell; padding to a cell covers every cell with neither index higher.
      cost: [I J] tokens of a row padded to the cell's widths.
      count: maximum number of cells.
    """
    chosen = [(rows.shape[0] - 1, rows.shape[1] - 1)]
    paid = np.full(rows.shape, cost[-1, -1])
    while len(chosen) < count:
        savings = {
            (i, j): (rows[: i + 1, : j + 1] * np.maximum(paid[: i + 1, : j + 1] - cost[i, j], 0)).sum()
            for i, j in np.ndindex(*rows.shape)
        }
        i, j = best = max(savings, key=lambda place: savings[place])
        if savings[best] <= MIN_SAVING * (rows * paid).sum():
            break
        chosen.append(best)
        paid[: i + 1, : j + 1] = np.minimum(paid[: i + 1, : j + 1], cost[best])
    return chosen


def collate(examples: Sequence[Example], widths: Widths, *, num_responses: int, size: int | None = None) -> PromptBatch:
    """Right-pads examples into arrays and adds padding rows (prompt length 0) up to `size`."""
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
    return PromptBatch(prompt, prompt_len, response, response_len, key)


class Batch(NamedTuple):
    """A batch of examples on the host.

    Attributes:
      number: index of the batch in the run, from 0.
      rows: prompts and responses, padded or packed; a prompt length of 0 marks a padding row.
      example: [B] index of the row's example; -1 for padding rows.
      epoch: [B] uint32, number of earlier epochs in which the row was seen.
    """

    number: int
    rows: Any
    example: np.ndarray
    epoch: np.ndarray


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """An endless sequence of batches of one size, reshuffled every epoch; `batches[k]` is the k-th.

    Without `shuffle`, batch k starts at example k * batch_size, in the given order, wrapping around at the end.

    An epoch's last, incomplete batch is filled from the start of the next epoch, so every example is seen equally often
    and none twice before all others. With several buckets, rows of the same bucket are grouped within a window of
    batches, and the window's batches are shuffled; each batch uses the cheapest widths that hold all its rows. With a
    packing the batches are the same, and each is packed into micro-batches of its shape.
    """

    examples: Sequence[Example]
    buckets: Buckets
    batch_size: int
    seed: int
    shuffle: bool = True
    packing: Packing | None = None

    def __post_init__(self) -> None:
        if not self.examples:
            raise UserError("there is nothing to train on: the data set is empty")

    @cached_property
    def _shuffled(self) -> Any:
        import grain  # takes half a second, which commands that only count rows need not wait for

        return grain.MapDataset.range(len(self.examples)).seed(self.seed).shuffle().repeat()

    @cached_property
    def _bucket(self) -> np.ndarray:
        return self.buckets.place(self.examples)

    @cached_property
    def _window(self) -> Callable[[int, int], tuple[int, np.ndarray]]:
        # a batch spans two windows if an epoch ends inside it
        return lru_cache(maxsize=2)(self._make_window)

    def _make_window(self, epoch: int, number: int) -> tuple[int, np.ndarray]:
        """Start of an epoch's window in the run's sequence of rows, and the indices of the examples in that window."""
        count, size = len(self.examples), self.batch_size
        first = epoch * count // size + number * WINDOW
        begin, end = max(first * size, epoch * count), min((first + WINDOW) * size, (epoch + 1) * count)
        rows = np.asarray([int(self._shuffled[place]) for place in range(begin, end)])
        if len(self.buckets.widths) == 1:
            return begin, rows
        rows = rows[np.argsort(self._bucket[rows], kind="stable")]
        # Batches are permuted as wholes. The epoch's first and last batch may be partial, so the rows are split into
        # parts in their shuffled order.
        edges = np.unique(np.clip(np.arange(first, first + WINDOW + 1) * size, begin, end))
        order = np.random.default_rng([self.seed, epoch, number]).permutation(len(edges) - 1)
        parts = np.split(rows, np.cumsum(np.diff(edges)[order])[:-1])
        return begin, np.concatenate([parts[i] for i in np.argsort(order)])

    def places(self, k: int) -> np.ndarray:
        """Indices of the examples in global batch k."""
        count, begin, end = len(self.examples), k * self.batch_size, (k + 1) * self.batch_size
        if not self.shuffle:
            return np.arange(begin, end) % count
        parts = []
        for epoch in range(begin // count, (end - 1) // count + 1):
            first, rows = self._window(epoch, (k - epoch * count // self.batch_size) // WINDOW)
            parts.append(rows[max(begin, epoch * count) - first : min(end, (epoch + 1) * count) - first])
        return np.concatenate(parts)

    def __getitem__(self, k: int) -> Batch:
        index = self.places(k)
        chosen = [self.examples[row] for row in index]
        layout = self.buckets.holding(chosen) if self.packing is None else self.packing
        rows = _laid_out(chosen, layout, len(chosen[0].responses), self.batch_size)
        places = k * self.batch_size + np.arange(self.batch_size)
        return Batch(k, rows, index, (places // len(self.examples)).astype(np.uint32))


def _laid_out(
    examples: Sequence[Example], layout: Widths | Packing, num_responses: int, size: int
) -> PromptBatch | Packed:
    """The examples as a batch of `size`, filled up with padding rows."""
    if isinstance(layout, Packing):
        return pack(examples, layout, num_responses=num_responses, size=size)
    return collate(examples, layout, num_responses=num_responses, size=size)


def num_steps(num_examples: int, *, epochs: float, steps: int | None, batch_size: int) -> int:
    """Number of updates in a run: `steps` if given, else epochs * num_examples // batch_size, at least one."""
    return steps if steps is not None else max(1, int(epochs * num_examples // batch_size))


Progress = Callable[[int, Mapping[str, Any]], Any]
"""Called with the number of finished rows, and with metrics of the rows since the call before."""


def map_batches(
    examples: Sequence[Example],
    buckets: Buckets | Packing,
    batch_size: int,
    function: Callable[[Any], Any],
    *,
    models: Any = None,
    keep: Pass | None = None,
    progress: Progress | None = None,
) -> Any:
    """Applies `function` (batch -> pytree of [B ...] arrays) to all examples and drops the padding rows.

    Every example is padded to the widths of its own bucket, whatever else is in its batch; or batches of neighbours are
    packed. A batch is collated and dispatched while the devices work on the one before; two at most are under way, and
    one on simulated devices.

    Args:
      models: pytree shaped like the function's result, with the name of the model behind each array, for messages;
        None: outputs are not checked.
      keep: keeps the results of each batch, and has those of an earlier run, whose batches are not made again; it
        needs `models`, which say what was kept.

    Returns:
      One pytree of arrays with leading axis len(examples), in the order of the examples. Where trailing axes differ
      between buckets, the smaller arrays are zero-padded at the end.

    Raises:
      UserError: if there are no examples, or at the first NaN or infinity in a model's outputs.
      PassPreempted: by `keep`.
    """
    if not examples:
        raise UserError("there are no rows to run a model on: the data set is empty; check its files and filters")
    results: dict[int, Any] = {} if keep is None else dict(_kept_results(keep, models))
    composition = list(_composition(examples, buckets, batch_size))
    done = sum(len(rows) for number, (_, rows) in enumerate(composition) if number in results)

    def finish(batch: Batch, outputs: Any) -> None:
        nonlocal done
        rows = batch.example[batch.example >= 0]
        results[batch.number] = jax.tree.map(partial(_first, len(rows)), outputs)
        if models is not None:
            jax.tree.map(_check_finite, models, results[batch.number])
        done += len(rows)
        if progress is not None:
            progress(done, {"tokens": int(batch.rows.prompt_len.sum() + batch.rows.response_len.sum())})
        if keep is not None:
            leaves = enumerate(jax.tree.leaves(results[batch.number]))
            keep.add({"batch": np.asarray(batch.number), **{str(i): leaf for i, leaf in leaves}}, len(rows))
            keep.check()

    under_way: deque[tuple[Batch, Any]] = deque()
    at_once = 1 if simulated() else 2
    missing = [number for number in range(len(composition)) if number not in results]
    for batch in prefetched(_filled(examples, batch_size, number, *composition[number]) for number in missing):
        under_way.append((batch, function(batch.rows)))
        if len(under_way) == at_once:
            finish(*under_way.popleft())
    while under_way:
        finish(*under_way.popleft())
    places = [rows for _, rows in composition]
    return jax.tree.map(lambda *xs: _scatter(places, xs), *(results[number] for number in range(len(composition))))


def _kept_results(keep: Pass, models: Any) -> Iterator[tuple[int, Any]]:
    """Numbers and results of the batches that an earlier run has finished."""
    structure = jax.tree.structure(models)
    for entry in keep.earlier():
        leaves = [entry[str(i)] for i in range(structure.num_leaves)]
        yield int(entry["batch"]), jax.tree.unflatten(structure, leaves)


def padded_batches(examples: Sequence[Example], buckets: Buckets | Packing, batch_size: int) -> Iterator[Batch]:
    """Every example once, in batches of one size; the last batch, of each bucket, has padding rows."""
    for number, (layout, rows) in enumerate(_composition(examples, buckets, batch_size)):
        yield _filled(examples, batch_size, number, layout, rows)


def _composition(
    examples: Sequence[Example], buckets: Buckets | Packing, batch_size: int
) -> Iterator[tuple[Widths | Packing, np.ndarray]]:
    """The layout of each batch, and the indices of its examples."""
    if isinstance(buckets, Packing):
        for begin in range(0, len(examples), batch_size):
            yield buckets, np.arange(begin, min(begin + batch_size, len(examples)))
        return
    bucket = buckets.place(examples)
    for number, widths in enumerate(buckets.widths):
        members = np.flatnonzero(bucket == number)
        for begin in range(0, len(members), batch_size):
            yield widths, members[begin : begin + batch_size]


def _filled(
    examples: Sequence[Example], batch_size: int, number: int, layout: Widths | Packing, rows: np.ndarray
) -> Batch:
    """The batch of these rows, filled up with padding rows."""
    chosen = [examples[row] for row in rows]
    filled = _laid_out(chosen, layout, len(examples[0].responses), batch_size)
    index = np.full(batch_size, -1)
    index[: len(rows)] = rows
    return Batch(number, filled, index, np.zeros(batch_size, np.uint32))


def _first(count: int, x: Any) -> np.ndarray:
    return to_host(x)[:count]


def _check_finite(model: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise NotFinite(model, "its outputs")


def _scatter(places: Sequence[np.ndarray], parts: Sequence[np.ndarray]) -> np.ndarray:
    """The parts' rows scattered to their places, each zero-padded to the widest trailing axes."""
    shape = np.max([part.shape[1:] for part in parts], axis=0).astype(int)
    whole = np.zeros((sum(map(len, places)), *shape), np.result_type(*parts))
    for rows, part in zip(places, parts, strict=True):
        whole[(rows, *map(slice, part.shape[1:]))] = part
    return whole
