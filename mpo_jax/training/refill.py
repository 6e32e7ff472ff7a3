"""Sampling for many prompts: rows that have ended get the next prompt, so that no batch waits for its longest sample.

After every chunk of tokens the host checks which rows have ended. A sample depends on its prompt, seed and index alone,
so the order in which rows are filled changes only the time. The number of rows, and of prompts inserted at once, are
those for all prompts, however few are left, so a run that goes on after a kill runs the same programs.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from mpo_jax.data.batches import Buckets, Progress, Widths, collate
from mpo_jax.data.tokens import Example
from mpo_jax.errors import NotFinite, UserError
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Decoder, Decoding, Sampling, make_for_decoding
from mpo_jax.runtime.parts import Entry
from mpo_jax.runtime.passes import Pass
from mpo_jax.runtime.prefetch import prefetched
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
def programs(model: Model, sampling: Sampling, eos_id: int | tuple[int, ...], mesh: Mesh) -> tuple[Any, Any, Any]:
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
    eos_id: int | tuple[int, ...],
    allowed_V: Bool[Array, " V"],
    key: Array,
    buckets: Buckets,
    batch_size: int,
    mesh: Mesh,
    name: str = "the model",
    keep: Pass | None = None,
    progress: Progress | None = None,
) -> Samples:
    """`sampling.num_samples` samples of every prompt, `batch_size` prompts at a time.

    Args:
      examples: prompts; their responses are ignored.
      name: what the user calls the model, for messages.
      keep: keeps prompts whose samples have all ended, and has those of an earlier run, which are not sampled again.
      progress: called after every `batch_size` finished prompts and after the last, with their tokens and rate of ends.

    Raises:
      UserError: if there are no prompts, or as soon as the model's logits are not finite.
      PassPreempted: by `keep`.
    """
    if not examples:
        raise UserError("there are no prompts to sample from: the data set is empty; check its files and filters")
    found = _Collected(len(examples), sampling, batch_size, keep, progress)
    if found.all_done:
        return found.samples
    refill = _Refill(
        programs(model, sampling, eos_id, mesh), params, make_for_decoding(model)(params), key, allowed_V, mesh, name
    )
    bucket = buckets.place(examples)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for number, widths in enumerate(buckets.widths):
        members = np.flatnonzero(bucket == number)
        waiting = members[found.missing[members] > 0]
        size = min(batch_size, -(-len(members) // shards) * shards)
        if len(waiting):
            part = portion(size, shards)
            portions = prefetched(_portions(examples, waiting, widths, part, sampling.num_samples))
            with contextlib.closing(portions):
                refill.drain(portions, size * sampling.num_samples, part * sampling.num_samples, found)
    return found.samples


class _Collected:
    """Samples as they end. A prompt is finished, reported and kept when its last sample has ended.

    Attributes:
      missing: [E] samples of each prompt that have not ended.
    """

    def __init__(
        self, num_prompts: int, sampling: Sampling, batch_size: int, keep: Pass | None, progress: Progress | None
    ):
        shape = num_prompts, sampling.num_samples
        self.samples = Samples(
            np.zeros((*shape, sampling.max_new_tokens), np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        )
        self.missing = np.full(num_prompts, sampling.num_samples)
        self._batch_size, self._keep, self._progress = batch_size, keep, progress
        self._done = 0
        self._unreported: list[int] = []
        self._unkept: list[int] = []
        if keep is not None:
            for entry in keep.earlier():
                self._restore(entry)
            # in the order in which they were finished, as they were reported
            self._unreported = self._unreported[keep.reported :]

    @property
    def all_done(self) -> bool:
        return self._done == len(self.missing)

    def take(self, sample: int, ids: np.ndarray, length: int, has_eos: bool) -> None:
        """Takes the sample of that number, counted over all prompts."""
        prompt, n = divmod(sample, self.samples.length.shape[1])
        self.samples.ids[prompt, n], self.samples.length[prompt, n] = ids, length
        self.samples.has_eos[prompt, n] = has_eos
        self.missing[prompt] -= 1
        if self.missing[prompt] == 0:
            self._done += 1
            self._unreported.append(prompt)
            self._unkept.append(prompt)
            if len(self._unreported) == self._batch_size or self.all_done:
                self._report()

    def end_chunk(self) -> None:
        """Keeps the prompts that a chunk has finished, and stops if a signal asks for it."""
        if self._keep is None:
            return
        if self._unkept:
            # after the report, so that a kept prompt's line is in the metrics
            self._keep.add(self._entry(np.asarray(self._unkept)), len(self._unkept))
            self._unkept = []
        self._keep.check()

    def _report(self) -> None:
        length, has_eos = self.samples.length[self._unreported], self.samples.has_eos[self._unreported]
        if self._progress is not None:
            self._progress(self._done, {"tokens": length.sum(), "eos_rate": has_eos.mean()})
        self._unreported = []

    def _entry(self, prompts: np.ndarray) -> Entry:
        """The prompts' samples, as ids without padding."""
        ids, length, has_eos = (x[prompts] for x in self.samples)
        return {"prompt": prompts, "length": length, "has_eos": has_eos, "ids": ids[self._drawn(length)]}

    def _restore(self, entry: Entry) -> None:
        prompts = entry["prompt"]
        self.samples.length[prompts], self.samples.has_eos[prompts] = entry["length"], entry["has_eos"]
        ids = np.zeros((len(prompts), *self.samples.ids.shape[1:]), np.int32)
        ids[self._drawn(entry["length"])] = entry["ids"]
        self.samples.ids[prompts] = ids
        self.missing[prompts] = 0
        self._done += len(prompts)
        self._unreported.extend(prompts.tolist())

    def _drawn(self, length: np.ndarray) -> np.ndarray:
        """True at the tokens of samples of these lengths."""
        return np.arange(self.samples.ids.shape[-1]) < length[..., None]


def _portions(
    examples: Sequence[Example], waiting: np.ndarray, widths: Widths, part: int, num_samples: int
) -> Iterator[tuple[PromptBatch, np.ndarray]]:
    """`part` prompts at a time, padded with filler rows, and the numbers of their samples."""
    for begin in range(0, len(waiting), part):
        chosen = waiting[begin : begin + part]
        batch = collate([examples[e] for e in chosen], widths, num_responses=0, size=part)
        yield batch, (chosen[:, None] * num_samples + np.arange(num_samples)).ravel()


@dataclasses.dataclass(frozen=True)
class _Refill:
    """What decodes: the jitted programs with the arguments that stay."""

    programs: tuple[Any, Any, Any]
    params: Params
    weights: Tree
    key: Array
    allowed_V: Array
    mesh: Mesh
    name: str

    def drain(
        self, portions: Iterator[tuple[PromptBatch, np.ndarray]], num_rows: int, samples_in: int, found: _Collected
    ) -> None:
        """Decodes in `num_rows` rows until no portion, of `samples_in` samples, is left and all rows have ended."""
        start, insert, advance = self.programs
        state = None
        # which sample a row holds, -1 for none
        holds = np.full(num_rows, -1)
        waiting = next(portions, None)
        while waiting is not None or (holds >= 0).any():
            free = np.flatnonzero(holds < 0)
            while waiting is not None and len(free) >= samples_in:
                batch, samples = waiting
                placed = place_batch(batch, self.mesh)
                if state is None:
                    state = start(self.params, placed, self.key, self.allowed_V, num_rows)
                # rows of filler prompts get indices beyond the end, which are dropped
                rows = np.concatenate([free[: len(samples)], np.arange(samples_in - len(samples)) + num_rows])
                holds[rows[: len(samples)]], free = samples, free[len(samples) :]
                state = insert(self.params, state, placed, rows.astype(np.int32), self.key, self.allowed_V)
                waiting = next(portions, None)
            state, flags = advance(self.weights, state, self.allowed_V)
            active, finite = to_host(flags)
            if not finite[holds >= 0].all():
                raise NotFinite(self.name, "the logits of its next tokens")
            ended = np.flatnonzero((holds >= 0) & ~active)
            if len(ended):
                ids, length, has_eos = (to_host(x) for x in (state.ids, state.length, state.ended))
                for row in ended:
                    found.take(int(holds[row]), ids[row], int(length[row]), bool(has_eos[row]))
                holds[ended] = -1
            found.end_chunk()
