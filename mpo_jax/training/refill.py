"""Sampling for many prompts: rows that have ended get the next prompt, so that no batch waits for its longest sample.

After every chunk of tokens the host checks which rows have ended. A sample depends on its prompt, seed and index alone,
so the order in which rows are filled changes only the time.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from mpo_jax.data.batches import Buckets, Widths, collate
from mpo_jax.data.tokens import Example
from mpo_jax.errors import NotFinite, UserError
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Decoder, Decoding, Sampling, make_for_decoding
from mpo_jax.runtime.processes import to_host
from mpo_jax.runtime.sharding import place_batch, replicated
from mpo_jax.types import Params, PromptBatch, Tree

PARTS = 8
"""A prefill inserts an eighth of the prompts being sampled: fewer would make the matrix products narrow, more would
leave rows empty until that many have ended."""


class Samples(NamedTuple):
    """All samples of a list of prompts, on the host.

    Attributes:
      ids: [E N S] tokens, 0 after the end.
      length: [E N] tokens, EOS included.
      has_eos: [E N] False where the sample was cut at S.
    """

    ids: np.ndarray
    length: np.ndarray
    has_eos: np.ndarray


def with_responses(examples: Sequence[Example], samples: Samples) -> list[Example]:
    """The prompts with their samples as responses."""
    return [
        dataclasses.replace(example, responses=[row[:n] for row, n in zip(ids, length, strict=True)])
        for example, ids, length in zip(examples, samples.ids, samples.length, strict=True)
    ]


@lru_cache
def programs(model: Model, sampling: Sampling, eos_id: int, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The jitted parts: a state whose rows have all ended, the insertion of prompts, and a chunk of decoding.

    (params, prompts, key, allowed_V, num_rows) -> state; (params, state, prompts, row_R, key, allowed_V) -> state;
    (weights, state, allowed_V) -> (state, [2 B] which rows are active, and whose logits were finite).
    """
    decoder = Decoder(model, sampling, eos_id)
    shardings = decoder.shardings(mesh)

    def begin(params: Params, prompts: PromptBatch, key: Array, allowed_V: Array) -> Decoding:
        return decoder.begin(params, prompts, key, jnp.zeros_like(prompts.key), allowed_V)

    def start(params: Params, prompts: PromptBatch, key: Array, allowed_V: Array, num_rows: int) -> Decoding:
        like = jax.eval_shape(begin, params, prompts, key, allowed_V)
        blank = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), dataclasses.replace(like, key=()))
        return dataclasses.replace(blank, key=jnp.broadcast_to(key, num_rows), ended=jnp.ones(num_rows, bool))

    def insert(
        params: Params, state: Decoding, prompts: PromptBatch, row_R: Array, key: Array, allowed_V: Array
    ) -> Decoding:
        put = lambda old, new: old.at[row_R].set(new, mode="drop", unique_indices=True)  # noqa: E731
        new = begin(params, prompts, key, allowed_V)
        # the parts of the caches behind the prompt's are read only where a row has written to them since
        old, new = (dataclasses.replace(x, caches=x.caches[:1]) for x in (state, new))
        placed = jax.tree.map(put, old, new)
        return dataclasses.replace(placed, caches=(*placed.caches, *state.caches[1:]))

    def advance(weights: Tree, state: Decoding, allowed_V: Array) -> tuple[Decoding, Bool[Array, "2 B"]]:
        state = decoder.by_group(decoder.advance, mesh)(weights, state, allowed_V)
        # one array, which the host fetches at once
        return state, jnp.stack([state.active, state.finite])

    return (
        jax.jit(start, static_argnums=4, out_shardings=shardings),
        jax.jit(insert, donate_argnums=1, out_shardings=shardings),
        jax.jit(advance, donate_argnums=1, out_shardings=(shardings, replicated(mesh))),
    )


def portion(num_prompts: int, shards: int) -> int:
    """The number of prompts that one prefill inserts, given the number being sampled and of batch shards."""
    return max(num_prompts // PARTS // shards, 1) * shards


def sample_all(
    model: Model,
    params: Params,
    examples: Sequence[Example],
    *,
    sampling: Sampling,
    eos_id: int,
    allowed_V: Bool[Array, " V"],
    key: Array,
    buckets: Buckets,
    batch_size: int,
    mesh: Mesh,
    name: str = "the model",
    progress: Callable[[int, Mapping[str, Any]], Any] | None = None,
) -> Samples:
    """`sampling.num_samples` samples of every prompt, `batch_size` prompts at a time.

    Args:
      examples: prompts; their responses are ignored.
      name: what the user calls the model, for messages.
      progress: called with how many prompts are done, and with tokens and the rate of ends since the call before.

    Raises:
      UserError: if there are no prompts, or as soon as the model's logits are not finite.
    """
    if not examples:
        raise UserError("there are no prompts to sample from: the data set is empty; check its files and filters")
    shape = len(examples), sampling.num_samples
    found = Samples(
        np.zeros((*shape, sampling.max_new_tokens), np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    )
    weights = make_for_decoding(model)(params)
    parts = programs(model, sampling, eos_id, mesh)
    unreported: list[tuple[int, int]] = []
    reported = [0]

    def take(sample: int, ids: np.ndarray, length: int, has_eos: bool) -> None:
        place = divmod(sample, sampling.num_samples)
        found.ids[place], found.length[place], found.has_eos[place] = ids, length, has_eos
        unreported.append(place)
        done = reported[0] + len(unreported)
        if len(unreported) == batch_size * sampling.num_samples or done == found.length.size:
            these = tuple(np.transpose(unreported))
            metrics = {"tokens": found.length[these].sum(), "eos_rate": found.has_eos[these].mean()}
            if progress is not None:
                progress(done // sampling.num_samples, metrics)
            reported[0] = done
            unreported.clear()

    bucket = buckets.place(examples)
    for number, widths in enumerate(buckets.widths):
        queue = np.flatnonzero(bucket == number)
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        size = min(batch_size, -(-len(queue) // shards) * shards)
        if len(queue):
            prompts = _Queue(examples, queue, widths, portion(size, shards), sampling.num_samples)
            _drain(parts, params, weights, prompts, size * sampling.num_samples, key, allowed_V, mesh, take, name)
    return found


@dataclasses.dataclass
class _Queue:
    """The prompts of one width that are not started, in portions of `part`."""

    examples: Sequence[Example]
    waiting: np.ndarray
    widths: Widths
    part: int
    num_samples: int

    def next(self) -> tuple[PromptBatch, np.ndarray]:
        """A batch of prompts, padded with filler rows, and the numbers of their samples."""
        chosen, self.waiting = self.waiting[: self.part], self.waiting[self.part :]
        batch = collate([self.examples[e] for e in chosen], self.widths, num_responses=0, size=self.part)
        return batch, (chosen[:, None] * self.num_samples + np.arange(self.num_samples)).ravel()


def _drain(
    parts: tuple[Any, Any, Any],
    params: Params,
    weights: Tree,
    queue: _Queue,
    num_rows: int,
    key: Array,
    allowed_V: Array,
    mesh: Mesh,
    take: Callable[[int, np.ndarray, int, bool], None],
    name: str,
) -> None:
    """Decodes until the queue is empty and all rows have ended; `take` gets each sample as it ends."""
    start, insert, advance = parts
    samples_in = queue.part * queue.num_samples
    state = None
    # which sample a row holds, -1 for none
    holds = np.full(num_rows, -1)
    while len(queue.waiting) or (holds >= 0).any():
        free = np.flatnonzero(holds < 0)
        while len(queue.waiting) and len(free) >= samples_in:
            batch, samples = queue.next()
            placed = place_batch(batch, mesh)
            if state is None:
                state = start(params, placed, key, allowed_V, num_rows)
            # rows of filler prompts get indices beyond the end, which are dropped
            rows = np.concatenate([free[: len(samples)], np.arange(samples_in - len(samples)) + num_rows])
            holds[rows[: len(samples)]], free = samples, free[len(samples) :]
            state = insert(params, state, placed, rows.astype(np.int32), key, allowed_V)
        state, flags = advance(weights, state, allowed_V)
        active, finite = to_host(flags)
        if not finite[holds >= 0].all():
            raise NotFinite(name, "the logits of its next tokens")
        ended = np.flatnonzero((holds >= 0) & ~active)
        if len(ended):
            ids, length, has_eos = (to_host(x) for x in (state.ids, state.length, state.ended))
            for row in ended:
                take(int(holds[row]), ids[row], int(length[row]), bool(has_eos[row]))
            holds[ended] = -1
