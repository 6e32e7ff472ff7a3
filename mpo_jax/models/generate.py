"""Sampling from one model: a prefill shared by a prompt's samples, then decoding a chunk of tokens at a time.

Random numbers are folded from (key, prompt fingerprint, sample index, token index), so a sample depends on its prompt,
seed and index alone: not on batch size, order or devices.
"""

import dataclasses
import functools
import operator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.models import forward
from mpo_jax.models.forward import Caches, Model
from mpo_jax.runtime.sharding import batch_sharding, by_group, constrain, simulated, spec_for
from mpo_jax.types import Params, PromptBatch, Tree, merge

BLOCK = 128
BISECTIONS = 30

CACHE_AXES = ("batch", "kv_heads", None, None)

MIN_PART, MAX_PARTS = 128, 2
"""Slots that a part of the room has at least, and the number of parts at most. Attention reads only the parts in use.
Every part is another copy of the decode loop's body in the program: with four, a model of 32 layers compiles five times
as long as with one, and decoding on CPU is slower than with one."""

CHUNK = 16
"""Tokens drawn between two mergers of the caches. New keys and values go to a small cache at a slot that all rows
share, which is one write in place; in the large one each row has its own place, which is a scatter."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample. `greedy` ignores temperature and top_p."""

    max_new_tokens: int
    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False


def pick(probability_BV: Float[Array, "B V"], u_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """Inverse-CDF sampling: the first id at which the cumulative sum exceeds u x total, u in [0, 1).

    Blocks of the vocabulary are summed first, and only the block that u falls into is scanned: no sort, and one random
    number a row. An id of probability 0 is never picked.
    """
    B, V = probability_BV.shape
    padded = jnp.pad(probability_BV, ((0, 0), (0, -V % BLOCK)))
    blocks = padded.reshape(B, -1, BLOCK)
    sums = blocks.sum(-1)
    ends = jnp.cumsum(sums, -1)
    target_B = u_B * ends[:, -1]
    last_B = jnp.where(sums > 0, jnp.arange(sums.shape[1])[None], 0).max(-1)
    block_B = jnp.minimum((ends <= target_B[:, None]).sum(-1), last_B)
    before_B = jnp.where(block_B > 0, jnp.take_along_axis(ends, jnp.maximum(block_B - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block_B[:, None, None], 1)[:, 0]
    offset_B = (jnp.cumsum(inside, -1) <= (target_B - before_B)[:, None]).sum(-1)
    # the sums round differently, so that u near a border can land beside it, where the id may be impossible
    place = jnp.arange(BLOCK)[None]
    lower_B = jnp.where((inside > 0) & (place <= offset_B[:, None]), place, -1).max(-1)
    offset_B = jnp.where(lower_B >= 0, lower_B, jnp.argmax(inside > 0, -1))
    return (block_B * BLOCK + offset_B).astype(jnp.int32)


def keep_top_p(probability_BV: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """Nucleus sampling without a sort: zeroes the ids below the highest cut-off whose survivors sum to top_p."""

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        enough = jnp.where(probability_BV >= middle[:, None], probability_BV, 0.0).sum(-1) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    highest = probability_BV.max(-1)
    low, _ = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(highest), highest))
    return jnp.where(probability_BV >= low[:, None], probability_BV, 0.0)


def choose(logits_BV: Float[Array, "B V"], u_B: Float[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """The next id of each row from its logits (already over temperature and masked) and one uniform number."""
    if sampling.greedy:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    probability_BV = jax.nn.softmax(logits_BV, -1)
    if sampling.top_p < 1.0:
        probability_BV = keep_top_p(probability_BV, sampling.top_p)
    return pick(probability_BV, u_B)


def prefill(
    model: Model, params: Tree, prompts: PromptBatch, *, num_samples: int, room: int
) -> tuple[Float[Array, "B D"], Caches]:
    """The hidden state that predicts each first token, and caches [B*N G P+room K]."""
    B = prompts.prompt.shape[0]
    empty = jnp.zeros((B, 1, 0), jnp.int32)
    tokens = forward.join(dataclasses.replace(prompts, response=empty, response_len=jnp.zeros((B, 1), jnp.int32)))
    hidden, caches = forward.prefill(model, params, tokens)
    last_BD = jnp.take_along_axis(hidden, jnp.maximum(prompts.prompt_len - 1, 0)[:, None, None], 1)[:, 0]

    def expand(cache: Array) -> Array:
        padded = jnp.pad(cache, ((0, 0), (0, 0), (0, room), (0, 0)))
        return constrain(repeat(padded, "b g s k -> (b n) g s k", n=num_samples), *CACHE_AXES)

    return repeat(last_BD, "b d -> (b n) d", n=num_samples), jax.tree.map(expand, caches)


def empty_like(caches: Caches, slots: int) -> Caches:
    """Empty caches with another number of slots."""
    return jax.tree.map(lambda x: constrain(jnp.zeros((*x.shape[:2], slots, x.shape[3]), x.dtype), *CACHE_AXES), caches)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Responses under way; B counts samples, which need not have begun together.

    Attributes:
      ids: [B S] tokens, 0 after the end.
      length: [B] tokens drawn, the end token included.
      ended: [B] True where an end token came, and at filler rows.
      finite: [B] False where the logits of a token were not: what was drawn since means nothing.
      prompt_len: [B] tokens of the prompt.
      key: [B] what the row's random numbers are folded from.
      caches: keys and values of the prompt and of all tokens drawn but the last, in `Decoder.parts`: [B G P+room K], or
        [B G P K] and then [B G R K] for each of several parts of the room.
    """

    ids: Int[Array, "B S"]
    length: Int[Array, " B"]
    ended: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    prompt_len: Int[Array, " B"]
    key: Any
    caches: tuple[Caches, ...]

    @property
    def active(self) -> Bool[Array, " B"]:
        """True where a further token is to be drawn."""
        return ~self.ended & (self.length < self.ids.shape[1])


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decoding with one model: what is fixed, and the functions to be jitted.

    Rows with a prompt length of 0 are filler and end at once.

    Attributes:
      eos_id: the id that ends a response, or several.
      longest_chunk: tokens that `advance` draws, or fewer where no more fit.
    """

    model: Model
    sampling: Sampling
    eos_id: int | tuple[int, ...]
    longest_chunk: int = CHUNK

    @property
    def chunk(self) -> int:
        return max(1, min(self.longest_chunk, self.sampling.max_new_tokens - 1))

    @property
    def room(self) -> int:
        """Slots of a row's cache for its response: whole chunks, for all tokens but the last."""
        return -(-(self.sampling.max_new_tokens - 1) // self.chunk) * self.chunk

    @property
    def parts(self) -> tuple[int, ...]:
        """Slots of each part of the room, whole chunks; a short room has one part, which lies behind the prompt."""
        number = max(1, min(MAX_PARTS, self.room // MIN_PART))
        size = max(-(-self.room // (number * self.chunk)) * self.chunk, self.chunk)
        return tuple(min(size, self.room - begin) for begin in range(0, self.room, size)) or (0,)

    @property
    def _begins(self) -> list[int]:
        """The first slot of the room in each part."""
        return np.cumsum([0, *self.parts[:-1]]).tolist()

    def shardings(self, mesh: Mesh) -> Decoding:
        """Rows over the batch axes of the mesh, heads of the caches over its tensor axis."""
        rows: Any = batch_sharding(mesh)
        decoder = self.model.decoder
        spec = spec_for(CACHE_AXES, (mesh.size, decoder.num_kv_heads, 1, 1), dict(mesh.shape))
        caches: Any = ((NamedSharding(mesh, spec),) * 2,) * decoder.num_layers
        number = len(self.parts) + (len(self.parts) > 1)
        return Decoding(rows, rows, rows, rows, rows, rows, (caches,) * number)

    def begin(
        self, params: Params, prompts: PromptBatch, key: Array, index_B: Array, allowed_V: Bool[Array, " V"] | None
    ) -> Decoding:
        """Reads the prompts and draws the first token of each of their samples.

        Args:
          index_B: distinguishes repeated visits of a prompt: sample n of visit i draws from sample index i N + n.
        """
        N = self.sampling.num_samples
        tree = merge(params)
        divided = self.parts if len(self.parts) > 1 else ()
        hidden_BD, first = prefill(self.model, tree, prompts, num_samples=N, room=0 if divided else self.room)
        caches = first, *(empty_like(first, size) for size in divided)
        lengths = jnp.repeat(prompts.prompt_len, N)
        empty = jnp.zeros((len(lengths), self.sampling.max_new_tokens), jnp.int32)
        keys = row_keys(prompts, key, index_B, N)
        finite = jnp.ones_like(lengths, bool)
        state = Decoding(empty, jnp.zeros_like(lengths), lengths == 0, finite, lengths, keys, caches)
        return self._draw(state, forward.head_matrix(self.model, tree), hidden_BD, allowed_V)

    def by_group(self, function: Any, mesh: Mesh) -> Any:
        """`sharding.by_group` of a function (weights, state, allowed_V) -> state, or the function itself.

        Key/value heads that `tensor` does not divide are moved by collective-permutes, for which all groups would have
        to be at the same token. On simulated devices a group that waits can take the threads that another needs.
        """
        tensor = mesh.shape["tensor"]
        blocks = tensor > 1 and simulated(mesh.devices.ravel().tolist())
        return function if blocks or self.model.decoder.num_kv_heads % tensor else by_group(function, mesh)

    def advance(self, weights: Tree, state: Decoding, allowed_V: Bool[Array, " V"] | None) -> Decoding:
        """Draws a chunk of tokens, or fewer where all rows end before.

        Args:
          weights: what `forward.for_decoding` gives.
        """
        stored_B, caches = jnp.maximum(state.length - 1, 0), state.caches
        widths = sum(part[0][0].shape[2] for part in caches) - self.room, self.room, self.chunk

        def loop(carry: Any, read: tuple[Caches, ...], enough: Any) -> Any:
            """Draws the chunk's tokens, reading these parts of the caches, if they are enough."""

            def unfinished(carry: Any) -> Array:
                slot, state, _ = carry
                return (slot < self.chunk) & state.active.any() & enough

            def step(carry: Any) -> Any:
                slot, state, recent = carry
                visible = forward.visible_slots(self.model, state.prompt_len, widths, stored_B, slot)
                last_B = jnp.take_along_axis(state.ids, jnp.maximum(state.length - 1, 0)[:, None], 1)[:, 0]
                position_B = state.prompt_len + stored_B + slot
                hidden_BD, recent = forward.decode_step(
                    self.model, weights, last_B, position_B, read, recent, visible, slot
                )
                return slot + 1, self._draw(state, weights["head"], hidden_BD, allowed_V), recent

            return jax.lax.while_loop(unfinished, step, carry)

        # the large caches stay outside the loops, which only read them
        carry = jnp.asarray(0), dataclasses.replace(state, caches=()), empty_like(caches[0], self.chunk)
        if len(caches) == 1:
            carry = loop(carry, caches, True)
        else:
            longest, begins = jnp.where(state.active, stored_B, 0).max(), jnp.asarray(self._begins)
            in_use = jnp.maximum((begins < longest).sum(), 1)
            for number in range(1, len(caches)):
                carry = loop(carry, caches[: number + 1], in_use == number)
        _, drawn, recent = carry
        return dataclasses.replace(drawn, caches=self._merged(caches, recent, stored_B))

    def _merged(self, caches: tuple[Caches, ...], recent: Caches, stored_B: Int[Array, " B"]) -> tuple[Caches, ...]:
        """The caches with each row's recent tokens behind its stored ones."""

        def write(cache_GSK: Array, new_GCK: Array, place: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(cache_GSK, new_GCK, place, 1)

        def write_inside(cache_GSK: Array, new_GCK: Array, place: Array) -> Array:
            """Nothing where the place is in another part; a chunk never lies in two."""
            inside, place = (place >= 0) & (place < cache_GSK.shape[1]), jnp.maximum(place, 0)
            old_GCK = jax.lax.dynamic_slice_in_dim(cache_GSK, place, self.chunk, 1)
            return write(cache_GSK, jnp.where(inside, new_GCK, old_GCK), place)

        def merged(part: Caches, write: Any, place_B: Array) -> Caches:
            return jax.tree.map(lambda old, new: jax.vmap(write)(old, new, place_B), part, recent)

        if len(caches) == 1:
            return (merged(caches[0], write, caches[0][0][0].shape[2] - self.room + stored_B),)
        parts = zip(caches[1:], self._begins, strict=True)
        return caches[0], *(merged(part, write_inside, stored_B - begin) for part, begin in parts)

    def _ends(self, token_B: Int[Array, " B"]) -> Bool[Array, " B"]:
        """Where a token ends its response; of a single id this is one comparison."""
        ids = self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)
        return functools.reduce(operator.or_, [token_B == i for i in ids])

    def _draw(self, state: Decoding, head_DV: Array, hidden_BD: Array, allowed_V: Any) -> Decoding:
        """The next token of the active rows."""
        u_B = jax.vmap(lambda key, index: jax.random.uniform(jax.random.fold_in(key, index)))(state.key, state.length)
        logits = forward.logits_from_hidden(
            self.model,
            hidden_BD[:, None],
            head_DV,
            temperature=self.sampling.temperature,
            allowed_V=allowed_V,
        )
        # gathered over `tensor` once: the draw would otherwise exchange a dozen small parts of them
        logits_BV = constrain(logits[:, 0], "batch", None)
        finite_B = jnp.isfinite(hidden_BD).all(-1) & jnp.isfinite(logits_BV.max(-1))
        token_B = jnp.where(state.active, choose(logits_BV, u_B, self.sampling), 0)
        here_BS = jnp.arange(state.ids.shape[1])[None] == jnp.where(state.active, state.length, -1)[:, None]
        return dataclasses.replace(
            state,
            ids=jnp.where(here_BS, token_B[:, None], state.ids),
            length=state.length + state.active,
            ended=state.ended | (state.active & self._ends(token_B)),
            finite=state.finite & (finite_B | ~state.active),
        )


def row_keys(prompts: PromptBatch, key: Array, index_B: Array, num_samples: int) -> Any:
    """[B*N] keys: `key` folded with the prompt's fingerprint and the sample index i N + n of visit i."""

    def fold(fingerprint, index):
        return jax.random.fold_in(jax.random.fold_in(key, fingerprint), index)

    sample_index = index_B[:, None] * num_samples + jnp.arange(num_samples, dtype=index_B.dtype)[None]
    return jax.vmap(fold)(jnp.repeat(prompts.key, num_samples), sample_index.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Generate:
    """What `make_generate` makes: three jitted parts, called one after the other.

    Attributes:
      begin: (params, prompts, key, index_B, allowed_V) -> Decoding.
      for_decoding: params -> weights.
      finish: (weights, Decoding without caches, caches, prompts, allowed_V) -> (PromptBatch, has_eos [B N], caches).
    """

    begin: Any
    for_decoding: Any
    finish: Any

    def __call__(
        self, params: Params, prompts: PromptBatch, key: Any, index_B: Any, allowed_V: Any
    ) -> tuple[PromptBatch, Bool[Array, "B N"]]:
        state = self.begin(params, prompts, key, index_B, allowed_V)
        begun, weights = dataclasses.replace(state, caches=()), self.for_decoding(params)
        joined, has_eos, _ = self.finish(weights, begun, state.caches, prompts, allowed_V)
        return joined, has_eos


@lru_cache
def make_for_decoding(model: Model) -> Any:
    """The jitted `forward.for_decoding`."""

    def for_decoding(params: Params) -> Tree:
        return forward.for_decoding(model, merge(params))

    return jax.jit(for_decoding)


@lru_cache
def make_generate(model: Model, sampling: Sampling, eos_id: int | tuple[int, ...], mesh: Mesh) -> Generate:
    """A function (params, prompts, key, index_B, allowed_V) -> (PromptBatch with N samples, has_eos [B N]).

    All prompts are decoded side by side until the last sample is done, without a word from the host.
    `index_B` distinguishes repeated visits of a prompt: sample n of visit i draws from sample index i N + n.
    """
    rows = batch_sharding(mesh)
    decoder = Decoder(model, sampling, eos_id)

    def decode(weights, state, allowed_V):
        return jax.lax.while_loop(
            lambda state: state.active.any(), lambda state: decoder.advance(weights, state, allowed_V), state
        )

    def finish(weights, begun, caches, prompts, allowed_V):
        state = decoder.by_group(decode, mesh)(weights, dataclasses.replace(begun, caches=caches), allowed_V)
        return *gathered(prompts, state), state.caches

    return Generate(
        jax.jit(decoder.begin),
        make_for_decoding(model),
        # an input is donated to an output: without the caches among the outputs the loop would work on a copy of them
        jax.jit(finish, donate_argnums=2, out_shardings=(rows, rows, None)),
    )


@lru_cache
def make_stream(model: Model, sampling: Sampling, eos_id: int | tuple[int, ...], chunk: int) -> Any:
    """Like `make_generate`, but an iterator over what is there after every `chunk` tokens, for reading along.

    It yields (PromptBatch, has_eos [B N], finite [B N]).
    """
    decoder = Decoder(model, sampling, eos_id, chunk)
    begin, advance = jax.jit(decoder.begin), jax.jit(decoder.advance, donate_argnums=1)

    def stream(params, prompts, key, index_B, allowed_V):
        def so_far(state):
            return *gathered(prompts, state), state.finite.reshape(len(prompts.prompt), -1)

        state = begin(params, prompts, key, index_B, allowed_V)
        weights = make_for_decoding(model)(params)
        yield so_far(state)
        while bool(state.active.any()):
            state = advance(weights, state, allowed_V)
            yield so_far(state)

    return stream


def gathered(prompts: PromptBatch, state: Decoding) -> tuple[PromptBatch, Bool[Array, "B N"]]:
    """The prompts with their samples, and where EOS came."""
    B = prompts.prompt.shape[0]
    joined = dataclasses.replace(
        prompts, response=state.ids.reshape(B, -1, state.ids.shape[1]), response_len=state.length.reshape(B, -1)
    )
    return joined, state.ended.reshape(B, -1) & (prompts.prompt_len > 0)[:, None]
