"""Sampling: one prefill a prompt shared by its samples, then a decode loop that stops when all rows have ended.

Random numbers are folded from (key, prompt fingerprint, sample index, token index), so a sample depends on its prompt,
seed and index alone: not on batch size, order or devices.
"""

import dataclasses
from functools import lru_cache
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


def decode(
    model: Model,
    params: Params,
    hidden_BD: Float[Array, "B D"],
    caches: tuple[Array, Array],
    prompt_len_B: Int[Array, " B"],
    prompt_width: int,
    row_key_B: Any,
    sampling: Sampling,
    eos_id: int,
    allowed_V: Bool[Array, " V"] | None,
) -> tuple[Int[Array, "B S"], Int[Array, " B"], Bool[Array, " B"], tuple[Array, Array]]:
    """Samples until every row has ended or has max_new_tokens: ids, lengths (EOS included), whether EOS came.

    B counts samples here. Rows with a prompt length of 0 are filler and end at once. The caches come back too, so that
    donated ones can be written in place.
    """
    B, S = hidden_BD.shape[0], sampling.max_new_tokens
    head_DV = functional.head_matrix(model, params)
    slot_T = jnp.arange(prompt_width + S)[None]
    in_prompt_BT = slot_T < prompt_len_B[:, None]

    def sample(hidden_BD, t):
        u_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(row_key_B)
        logits = functional.logits_from_hidden(
            model, hidden_BD[:, None], head_DV, temperature=sampling.temperature, allowed_V=allowed_V
        )
        return choose(logits[:, 0], u_B, sampling)

    def write(ids_BS, done_B, token_B, t):
        token_B = jnp.where(done_B, 0, token_B)
        return jax.lax.dynamic_update_slice_in_dim(ids_BS, token_B[:, None], t, 1), done_B | (token_B == eos_id)

    def unfinished(carry):
        t, _, done_B, _, _, _ = carry
        return (t < S) & ~done_B.all()

    def step(carry):
        t, ids_BS, done_B, token_B, length_B, caches = carry
        slot = prompt_width + t - 1
        visible_BT = in_prompt_BT | ((slot_T >= prompt_width) & (slot_T <= slot))
        hidden_BD, caches = functional.decode_step(
            model, params, token_B, prompt_len_B + t - 1, caches, visible_BT, slot
        )
        token_B = sample(hidden_BD, t)
        length_B = length_B + ~done_B
        ids_BS, done_B = write(ids_BS, done_B, token_B, t)
        return t + 1, ids_BS, done_B, token_B, length_B, caches

    filler_B = prompt_len_B == 0
    first_B = sample(hidden_BD, 0)
    ids_BS, done_B = write(jnp.zeros((B, S), jnp.int32), filler_B, first_B, 0)
    length_B = jnp.where(filler_B, 0, 1)
    carry = (jnp.asarray(1), ids_BS, done_B, first_B, length_B, caches)
    _, ids_BS, done_B, _, length_B, caches = jax.lax.while_loop(unfinished, step, carry)
    return ids_BS, length_B, done_B & ~filler_B, caches


@lru_cache
def make_generate(model: Model, sampling: Sampling, eos_id: int, mesh: Mesh) -> Any:
    """A function (params, prompts, key, index_B, allowed_V) -> (Joined with N samples, has_eos [B N]).

    `index_B` tells apart repeated visits of a prompt: sample n of visit i draws from sample index i N + n. Two compiled
    parts, prefill and decode; the caches pass between them and are donated.
    """
    N, S = sampling.num_samples, sampling.max_new_tokens
    rows = batch_sharding(mesh)

    def start(params, prompts):
        return prefill(model, params, prompts, num_samples=N, max_new_tokens=S)

    def finish(params, hidden, caches, prompts, key, index_B, allowed_V):
        def row_key(fingerprint, index):
            return jax.random.fold_in(jax.random.fold_in(key, fingerprint), index)

        sample_index = (index_B[:, None] * N + jnp.arange(N, dtype=index_B.dtype)[None]).reshape(-1)
        keys = jax.vmap(row_key)(jnp.repeat(prompts.key, N), sample_index)
        lengths = jnp.repeat(prompts.prompt_len, N)
        ids, length, has_eos, caches = decode(
            model, params, hidden, caches, lengths, prompts.prompt.shape[1], keys, sampling, eos_id, allowed_V
        )
        B = prompts.prompt.shape[0]
        joined = dataclasses.replace(
            prompts, response=ids.reshape(B, N, S), response_len=length.reshape(B, N).astype(jnp.int32)
        )
        return joined, has_eos.reshape(B, N), caches

    prefill_jit = jax.jit(start)
    # an input is donated to an output: without the caches among the outputs the loop would work on a copy of them
    decode_jit = jax.jit(finish, donate_argnums=(2,), out_shardings=(rows, rows, None))

    def generate(params, prompts, key, index_B, allowed_V):
        hidden, caches = prefill_jit(params, prompts)
        joined, has_eos, _ = decode_jit(params, hidden, caches, prompts, key, index_B, allowed_V)
        return joined, has_eos

    return generate
