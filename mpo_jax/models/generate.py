"""Sampling from one model: a prefill shared by a prompt's samples, then decoding a chunk of tokens at a time.

Random numbers are folded from (key, prompt fingerprint, sample index, token index), so a sample depends on its prompt,
seed and index alone: not on batch size, order or devices.
"""

import dataclasses
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from einops import repeat
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.models import forward
from mpo_jax.models.forward import Caches, Model
from mpo_jax.runtime.sharding import batch_sharding, constrain, spec_for
from mpo_jax.types import Params, PromptBatch, Tree, merge

BLOCK = 128
BISECTIONS = 30

CACHE_AXES = ("batch", "kv_heads", None, None)

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Responses under way; B counts samples, which need not have begun together.

    Attributes:
      ids: [B S] tokens, 0 after the end.
      length: [B] tokens drawn, EOS included.
      ended: [B] True where EOS came, and at filler rows.
      finite: [B] False where the logits of a token were not: what was drawn since means nothing.
      prompt_len: [B] tokens of the prompt.
      key: [B] what the row's random numbers are folded from.
      caches: keys and values [B G P+room K] of the prompt and of all tokens drawn but the last.
    """

    ids: Int[Array, "B S"]
    length: Int[Array, " B"]
    ended: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    prompt_len: Int[Array, " B"]
    key: Any
    caches: Caches

    @property
    def active(self) -> Bool[Array, " B"]:
        """True where a further token is to be drawn."""
        return ~self.ended & (self.length < self.ids.shape[1])


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decoding with one model: what is fixed, and the functions to be jitted.

    Rows with a prompt length of 0 are filler and end at once.

    Attributes:
      longest_chunk: tokens that `advance` draws, or fewer where no more fit.
    """

    model: Model
    sampling: Sampling
    eos_id: int
    longest_chunk: int = CHUNK

    @property
    def chunk(self) -> int:
        return max(1, min(self.longest_chunk, self.sampling.max_new_tokens - 1))

    @property
    def room(self) -> int:
        """Slots of a row's cache for its response: whole chunks, for all tokens but the last."""
        return -(-(self.sampling.max_new_tokens - 1) // self.chunk) * self.chunk

    def shardings(self, mesh: Mesh) -> Decoding:
        """Rows over the batch axes of the mesh, heads of the caches over its tensor axis."""
        rows: Any = batch_sharding(mesh)
        decoder = self.model.decoder
        spec = spec_for(CACHE_AXES, (mesh.size, decoder.num_kv_heads, 1, 1), dict(mesh.shape))
        caches: Any = ((NamedSharding(mesh, spec),) * 2,) * decoder.num_layers
        return Decoding(rows, rows, rows, rows, rows, rows, caches)

    def begin(
        self, params: Params, prompts: PromptBatch, key: Array, index_B: Array, allowed_V: Bool[Array, " V"] | None
    ) -> Decoding:
        """Reads the prompts and draws the first token of each of their samples.

        Args:
          index_B: distinguishes repeated visits of a prompt: sample n of visit i draws from sample index i N + n.
        """
        N = self.sampling.num_samples
        tree = merge(params)
        hidden_BD, caches = prefill(self.model, tree, prompts, num_samples=N, room=self.room)
        lengths = jnp.repeat(prompts.prompt_len, N)
        empty = jnp.zeros((len(lengths), self.sampling.max_new_tokens), jnp.int32)
        keys = row_keys(prompts, key, index_B, N)
        finite = jnp.ones_like(lengths, bool)
        state = Decoding(empty, jnp.zeros_like(lengths), lengths == 0, finite, lengths, keys, caches)
        return self._draw(state, forward.head_matrix(self.model, tree), hidden_BD, allowed_V)

    def advance(self, weights: Tree, state: Decoding, allowed_V: Bool[Array, " V"] | None) -> Decoding:
        """Draws a chunk of tokens, or fewer where all rows end before.

        Args:
          weights: what `forward.for_decoding` gives.
        """
        stored_B, caches = jnp.maximum(state.length - 1, 0), state.caches
        cache = caches[0][0]
        prompt_width = cache.shape[2] - self.room
        recent = jax.tree.map(
            lambda x: constrain(jnp.zeros((*x.shape[:2], self.chunk, x.shape[3]), x.dtype), *CACHE_AXES), caches
        )

        def unfinished(carry: Any) -> Array:
            slot, state, _ = carry
            return (slot < self.chunk) & state.active.any()

        def step(carry: Any) -> Any:
            slot, state, recent = carry
            widths = prompt_width, self.room, self.chunk
            visible = forward.visible_slots(self.model, state.prompt_len, widths, stored_B, slot)
            last_B = jnp.take_along_axis(state.ids, jnp.maximum(state.length - 1, 0)[:, None], 1)[:, 0]
            position_B = state.prompt_len + stored_B + slot
            hidden_BD, recent = forward.decode_step(
                self.model, weights, last_B, position_B, caches, recent, visible, slot
            )
            return slot + 1, self._draw(state, weights["head"], hidden_BD, allowed_V), recent

        # the large caches stay outside the loop, which only reads them
        carried = dataclasses.replace(state, caches=())
        _, drawn, recent = jax.lax.while_loop(unfinished, step, (jnp.asarray(0), carried, recent))

        def merge(cache_GSK: Array, new_GCK: Array, stored: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(cache_GSK, new_GCK, prompt_width + stored, 1)

        merged = jax.tree.map(lambda old, new: jax.vmap(merge)(old, new, stored_B), caches, recent)
        return dataclasses.replace(drawn, caches=merged)

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
        # of a division over the vocabulary's parts only the hidden state is sure to carry a NaN
        finite_B = jnp.isfinite(hidden_BD).all(-1) & jnp.isfinite(logits[:, 0].max(-1))
        token_B = jnp.where(state.active, choose(logits[:, 0], u_B, self.sampling), 0)
        here_BS = jnp.arange(state.ids.shape[1])[None] == jnp.where(state.active, state.length, -1)[:, None]
        return dataclasses.replace(
            state,
            ids=jnp.where(here_BS, token_B[:, None], state.ids),
            length=state.length + state.active,
            ended=state.ended | (state.active & (token_B == self.eos_id)),
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
    return jax.jit(lambda params: forward.for_decoding(model, merge(params)))


@lru_cache
def make_generate(model: Model, sampling: Sampling, eos_id: int, mesh: Mesh) -> Generate:
    """A function (params, prompts, key, index_B, allowed_V) -> (PromptBatch with N samples, has_eos [B N]).

    All prompts are decoded side by side until the last sample is done, without a word from the host.
    `index_B` distinguishes repeated visits of a prompt: sample n of visit i draws from sample index i N + n.
    """
    rows = batch_sharding(mesh)
    decoder = Decoder(model, sampling, eos_id)

    def finish(weights, begun, caches, prompts, allowed_V):
        state = jax.lax.while_loop(
            lambda state: state.active.any(),
            lambda state: decoder.advance(weights, state, allowed_V),
            dataclasses.replace(begun, caches=caches),
        )
        return *gathered(prompts, state), state.caches

    return Generate(
        jax.jit(decoder.begin),
        make_for_decoding(model),
        # an input is donated to an output: without the caches among the outputs the loop would work on a copy of them
        jax.jit(finish, donate_argnums=2, out_shardings=(rows, rows, None)),
    )


@lru_cache
def make_stream(model: Model, sampling: Sampling, eos_id: int, chunk: int) -> Any:
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
