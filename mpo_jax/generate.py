"""Sampling: one prefill a prompt shared by its samples, then a decode loop that stops when all rows have ended.

Random numbers are folded from (key, prompt fingerprint, sample index, token index), so a sample depends on its prompt,
seed and index alone: not on batch size, order or devices.
"""

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import repeat
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.model import functional
from mpo_jax.model.functional import Model
from mpo_jax.sharding import batch_sharding
from mpo_jax.types import Joined, Params

BLOCK = 128
BISECTIONS = 30


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
    ends = jnp.cumsum(blocks.sum(-1), -1)
    target_B = u_B * ends[:, -1]
    block_B = jnp.minimum((ends <= target_B[:, None]).sum(-1), ends.shape[1] - 1)
    before_B = jnp.where(block_B > 0, jnp.take_along_axis(ends, jnp.maximum(block_B - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block_B[:, None, None], 1)[:, 0]
    offset_B = jnp.minimum((jnp.cumsum(inside, -1) <= (target_B - before_B)[:, None]).sum(-1), BLOCK - 1)
    picked_B = jnp.minimum(block_B * BLOCK + offset_B, V - 1)
    # the sums round differently, so that u near a border can land beside it, on an id that must not be sampled
    possible = jnp.take_along_axis(probability_BV, picked_B[:, None], 1)[:, 0] > 0
    return jnp.where(possible, picked_B, jnp.argmax(probability_BV, -1)).astype(jnp.int32)


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
    model: Model, params: Params, prompts: Joined, *, num_samples: int, max_new_tokens: int
) -> tuple[Float[Array, "B D"], tuple[Array, Array]]:
    """The hidden state that predicts each first token, and caches [L B*N G P+S K] with room for the response."""
    B = prompts.prompt.shape[0]
    empty = jnp.zeros((B, 1, 0), jnp.int32)
    tokens = functional.join(dataclasses.replace(prompts, response=empty, response_len=jnp.zeros((B, 1), jnp.int32)))
    hidden, caches = functional.prefill(model, params, tokens)
    last_BD = jnp.take_along_axis(hidden, jnp.maximum(prompts.prompt_len - 1, 0)[:, None, None], 1)[:, 0]

    def expand(cache: Array) -> Array:
        room = jnp.pad(cache, ((0, 0), (0, 0), (0, 0), (0, max_new_tokens), (0, 0)))
        return repeat(room, "l b g s k -> l (b n) g s k", n=num_samples)

    return repeat(last_BD, "b d -> (b n) d", n=num_samples), (expand(caches[0]), expand(caches[1]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Responses under way; B counts samples.

    Attributes:
      drawn: tokens drawn so far, the same for all rows.
      ids: [B S] tokens, 0 after the end.
      length: [B] tokens of each response, EOS included.
      done: [B] True where EOS came, and at filler rows.
      caches: keys and values, each [L B G P+S K].
    """

    drawn: Int[Array, ""]
    ids: Int[Array, "B S"]
    length: Int[Array, " B"]
    done: Bool[Array, " B"]
    caches: tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The decode loop of one model: what is fixed, and the two functions that `make_generate` and `make_stream` jit.

    Rows with a prompt length of 0 are filler and end at once.
    """

    model: Model
    sampling: Sampling
    eos_id: int

    def begin(
        self,
        params: Params,
        hidden_BD: Float[Array, "B D"],
        caches: tuple[Array, Array],
        prompt_len_B: Int[Array, " B"],
        row_key_B: Any,
        allowed_V: Bool[Array, " V"] | None,
    ) -> Decoding:
        """The first token of every row, from the hidden state of its prompt's last token."""
        B = hidden_BD.shape[0]
        filler_B = prompt_len_B == 0
        empty = jnp.zeros((B, self.sampling.max_new_tokens), jnp.int32)
        state = Decoding(jnp.asarray(0), empty, jnp.zeros((B,), jnp.int32), filler_B, caches)
        return self._write(functional.head_matrix(self.model, params), state, hidden_BD, caches, row_key_B, allowed_V)

    def advance(
        self,
        params: Params,
        state: Decoding,
        prompt_len_B: Int[Array, " B"],
        row_key_B: Any,
        allowed_V: Bool[Array, " V"] | None,
        until: int | Int[Array, ""],
    ) -> Decoding:
        """Draws until all rows are done or have `until` tokens."""
        num_slots = state.caches[0].shape[3]
        prompt_width = num_slots - self.sampling.max_new_tokens
        # outside the loop: a tied head is a transposed copy of the embedding
        head_DV = functional.head_matrix(self.model, params)

        def unfinished(state: Decoding):
            return (state.drawn < until) & ~state.done.all()

        def step(state: Decoding) -> Decoding:
            slot = prompt_width + state.drawn - 1
            visible_BT = functional.visible_slots(self.model, prompt_len_B, prompt_width, slot, num_slots)
            token_B = jax.lax.dynamic_index_in_dim(state.ids, state.drawn - 1, 1, keepdims=False)
            hidden_BD, caches = functional.decode_step(
                self.model, params, token_B, prompt_len_B + state.drawn - 1, state.caches, visible_BT, slot
            )
            return self._write(head_DV, state, hidden_BD, caches, row_key_B, allowed_V)

        return jax.lax.while_loop(unfinished, step, state)

    def _write(
        self, head_DV: Array, state: Decoding, hidden_BD: Array, caches: Any, row_key_B: Any, allowed_V: Any
    ) -> Decoding:
        """Draws the next token of the rows that are not done."""
        u_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.drawn)))(row_key_B)
        logits = functional.logits_from_hidden(
            self.model,
            hidden_BD[:, None],
            head_DV,
            temperature=self.sampling.temperature,
            allowed_V=allowed_V,
        )
        token_B = jnp.where(state.done, 0, choose(logits[:, 0], u_B, self.sampling))
        return Decoding(
            drawn=state.drawn + 1,
            ids=jax.lax.dynamic_update_slice_in_dim(state.ids, token_B[:, None], state.drawn, 1),
            length=state.length + ~state.done,
            done=state.done | (token_B == self.eos_id),
            caches=caches,
        )


def row_keys(prompts: Joined, key: Array, index_B: Array, num_samples: int) -> Any:
    """[B*N] keys: `key` folded with the prompt's fingerprint and the sample index i N + n of visit i."""

    def fold(fingerprint, index):
        return jax.random.fold_in(jax.random.fold_in(key, fingerprint), index)

    sample_index = index_B[:, None] * num_samples + jnp.arange(num_samples, dtype=index_B.dtype)[None]
    return jax.vmap(fold)(jnp.repeat(prompts.key, num_samples), sample_index.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Generate:
    """What `make_generate` makes.

    Attributes:
      prefill: jitted (params, prompts) -> (hidden [B*N D], caches).
      decode: jitted (params, hidden, caches, prompts, key, index_B, allowed_V) -> (Joined, has_eos [B N], caches).
    """

    prefill: Any
    decode: Any

    def __call__(
        self, params: Params, prompts: Joined, key: Any, index_B: Any, allowed_V: Any
    ) -> tuple[Joined, Bool[Array, "B N"]]:
        hidden, caches = self.prefill(params, prompts)
        joined, has_eos, _ = self.decode(params, hidden, caches, prompts, key, index_B, allowed_V)
        return joined, has_eos


@lru_cache
def make_generate(model: Model, sampling: Sampling, eos_id: int, mesh: Mesh) -> Generate:
    """A function (params, prompts, key, index_B, allowed_V) -> (Joined with N samples, has_eos [B N]).

    `index_B` tells apart repeated visits of a prompt: sample n of visit i draws from sample index i N + n. Two compiled
    parts, prefill and decode; the caches pass between them and are donated.
    """
    N, S = sampling.num_samples, sampling.max_new_tokens
    rows = batch_sharding(mesh)
    decoder = Decoder(model, sampling, eos_id)

    def start(params, prompts):
        return prefill(model, params, prompts, num_samples=N, max_new_tokens=S)

    def finish(params, hidden, caches, prompts, key, index_B, allowed_V):
        params = functional.for_decoding(model, params)
        keys = row_keys(prompts, key, index_B, N)
        lengths = jnp.repeat(prompts.prompt_len, N)
        state = decoder.begin(params, hidden, caches, lengths, keys, allowed_V)
        state = decoder.advance(params, state, lengths, keys, allowed_V, S)
        return *_joined(prompts, state, N), state.caches

    prefill_jit = jax.jit(start)
    # an input is donated to an output: without the caches among the outputs the loop would work on a copy of them
    decode_jit = jax.jit(finish, donate_argnums=(2,), out_shardings=(rows, rows, None))

    return Generate(prefill_jit, decode_jit)


@lru_cache
def make_stream(model: Model, sampling: Sampling, eos_id: int, chunk: int) -> Any:
    """Like `make_generate`, but an iterator over what is there after every `chunk` tokens, for reading along."""
    N, S = sampling.num_samples, sampling.max_new_tokens
    decoder = Decoder(model, sampling, eos_id)

    @jax.jit
    def start(params, prompts, key, index_B, allowed_V):
        hidden, caches = prefill(model, params, prompts, num_samples=N, max_new_tokens=S)
        keys = row_keys(prompts, key, index_B, N)
        return decoder.begin(params, hidden, caches, jnp.repeat(prompts.prompt_len, N), keys, allowed_V), keys

    @partial(jax.jit, donate_argnums=1)
    def advance(params, state, prompts, keys, allowed_V, until):
        params = functional.for_decoding(model, params)
        return decoder.advance(params, state, jnp.repeat(prompts.prompt_len, N), keys, allowed_V, until)

    def stream(params, prompts, key, index_B, allowed_V):
        state, keys = start(params, prompts, key, index_B, allowed_V)
        yield _joined(prompts, state, N)
        for until in range(1 + chunk, S + chunk, chunk):
            if bool(state.done.all()):
                return
            state = advance(params, state, prompts, keys, allowed_V, jnp.asarray(min(until, S)))
            yield _joined(prompts, state, N)

    return stream


def _joined(prompts: Joined, state: Decoding, num_samples: int) -> tuple[Joined, Bool[Array, "B N"]]:
    """The prompts with their samples, and where EOS came."""
    B, N = prompts.prompt.shape[0], num_samples
    joined = dataclasses.replace(
        prompts, response=state.ids.reshape(B, N, -1), response_len=state.length.reshape(B, N).astype(jnp.int32)
    )
    return joined, state.done.reshape(B, N) & (prompts.prompt_len > 0)[:, None]
