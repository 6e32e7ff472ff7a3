"""What a model says of each prompt's responses, whichever way rows are laid out: padded (`PromptBatch`) or packed."""

import math
from functools import lru_cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.models import forward
from mpo_jax.models.chunks import map_first
from mpo_jax.models.forward import Model
from mpo_jax.models.packed import sum_over
from mpo_jax.runtime.sharding import constrain, replicated
from mpo_jax.types import Head, Mean, Metrics, Packed, PackedRows, Params, PromptBatch, Tree, merge

Rows: TypeAlias = PromptBatch | PackedRows

CHUNK = 128
"""Columns whose logits are made together in packed rows, at most: chunks behind the last response token are left out,
and half a chunk is made in vain on average."""


def valid(rows: Rows) -> Bool[Array, " B"]:
    """True at the prompts that count; the others fill the batch, or are in another micro-batch."""
    return rows.valid if isinstance(rows, PackedRows) else jnp.asarray(rows.prompt_len) > 0


def lengths(rows: Rows) -> Int[Array, "B N"]:
    """Number of real tokens of each response, EOS included."""
    return jnp.asarray(rows.response_len)


def usage(rows: Rows | Packed) -> Metrics:
    """`tokens`: number of real tokens; `perf/padding`: share of columns that hold none.

    Of a whole packed batch, the columns of the micro-batches that it takes.
    """
    if isinstance(rows, Packed):
        tokens = (jnp.asarray(rows.segment) > 0).sum()
        columns = jnp.asarray(rows.count * math.prod(rows.ids.shape[1:]), jnp.float32)
        return {"tokens": tokens, "perf/padding": Mean(columns - tokens, columns)}
    tokens = rows.tokens if isinstance(rows, PackedRows) else forward.join(rows)
    return {"tokens": (tokens.segment > 0).sum(), "perf/padding": Mean.of(tokens.segment == 0)}


def token_logps(model: Model, tree: Tree, rows: Rows) -> tuple[Array, Array]:
    """log p of response tokens, in nats, and the mask of these tokens: [B N S] folded to [B N*S], or [R T]."""
    if isinstance(rows, PackedRows):
        return _packed_logps(model, tree, rows)[0], rows.tokens.loss_mask
    tokens = forward.join(rows)
    return forward.token_logp(model, tree, tokens)[0], tokens.loss_mask[:, tokens.scored_from :]


def logps(model: Model, tree: Tree, rows: Rows) -> Float[Array, "B N"]:
    """Each response's summed log-probability in nats, EOS included."""
    if isinstance(rows, PackedRows):
        return _sums(_packed_logps(model, tree, rows)[0], rows)
    return forward.response_logps(model, tree, rows)


def scores(model: Model, tree: Tree, rows: Rows) -> Float[Array, "B N"]:
    """Each response's score: the value head at its last real token; 0 where there is none."""
    if not isinstance(rows, PackedRows):
        return forward.response_scores(forward.scores(model, tree, forward.join(rows)), rows)
    return _at_ends(forward.scores(model, tree, rows.tokens), rows)


def sample_logps(
    model: Model,
    tree: Tree,
    rows: Rows,
    width: int,
    *,
    temperature: float,
    allowed_V: Bool[Array, " V"],
    with_entropy: bool = False,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """log p of each token of one sample a prompt, and the entropy there, in nats; 0 in columns that hold none.

    Args:
      width: S, columns of the samples.
      temperature, allowed_V: of the distribution that they were drawn from.
      with_entropy: whether entropies are computed; otherwise they are 0.
    """
    options: Any = {"temperature": temperature, "allowed_V": allowed_V, "with_entropy": with_entropy}
    if not isinstance(rows, PackedRows):
        return forward.token_logp(model, tree, forward.join(rows), **options)
    logp_RT, entropy_RT = _packed_logps(model, tree, rows, **options)
    return _in_columns(logp_RT, rows, width), _in_columns(entropy_RT, rows, width)


def sample_values(model: Model, tree: Tree, rows: Rows, width: int) -> tuple[Float[Array, "B S"], Float[Array, "B 1"]]:
    """A critic's value of the state before each token of one sample a prompt, and of the state after its last one.

    0 in columns that hold no token.

    Args:
      width: S, columns of the samples.
    """
    if isinstance(rows, PackedRows):
        score_RT = forward.scores(model, tree, rows.tokens)
        return _in_columns(forward.values_before(score_RT, rows.tokens), rows, width), _at_ends(score_RT, rows)
    tokens = forward.join(rows)
    score_BT = forward.scores(model, tree, tokens)
    value_BS = jnp.where(tokens.loss_mask[:, tokens.scored_from :], forward.values_before(score_BT, tokens), 0.0)
    return value_BS, forward.response_scores(score_BT, rows)


def _in_columns(x_RT: Float[Array, "R T"], rows: PackedRows, width: int) -> Float[Array, "B S"]:
    """What stands at the tokens of each prompt's only response, in columns; 0 for those not in the micro-batch.

    The gradient adds zeros alone to what other rows stand at, so that it is the same in whichever order it is summed.
    """
    B, column_S = len(rows.valid), jnp.arange(width)
    owner = constrain(_owner(rows), None, None).reshape(-1)
    begin_B = jnp.argmax(owner[None] == jnp.arange(1, B + 1)[:, None], axis=1)
    is_token_BS = rows.valid[:, None] & (column_S[None] < rows.response_len)
    found_BS = jnp.take(constrain(x_RT, None, None).reshape(-1), begin_B[:, None] + column_S[None], mode="clip")
    return jnp.where(is_token_BS, found_BS, 0.0)


def _at_ends(score_RT: Float[Array, "R T"], rows: PackedRows) -> Float[Array, "B N"]:
    """The value head's output at each response's last token."""
    owner = _owner(rows)
    behind = jnp.pad(owner[:, 1:], ((0, 0), (0, 1)))
    return _sums(jnp.where(owner != behind, score_RT, 0.0), rows)


def _owner(rows: PackedRows) -> Int[Array, "R T"]:
    """Which response each token belongs to: prompt * N + n + 1; 0 for tokens of prompts and for padding."""
    tokens, N = rows.tokens, rows.response_len.shape[1]
    return jnp.where(tokens.branch > 0, (tokens.segment - 1) * N + tokens.branch, 0)


def _sums(x_RT: Float[Array, "R T"], rows: PackedRows) -> Float[Array, "B N"]:
    """Sums over each response's tokens, 0 for those that are not in the micro-batch.

    By comparison rather than scatter: a device adds up its own rows, and always in the same order.
    """
    B, N = rows.response_len.shape
    is_own = _owner(rows)[..., None] == jnp.arange(1, B * N + 1)[None, None]
    return jnp.where(is_own, x_RT[..., None], 0.0).sum((0, 1)).reshape(B, N)


def _packed_logps(
    model: Model,
    tree: Tree,
    rows: PackedRows,
    *,
    temperature: float = 1.0,
    allowed_V: Bool[Array, " V"] | None = None,
    with_entropy: bool = False,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """log p of response tokens and the entropy there (0 unless asked for), in nats; 0 elsewhere.

    Response tokens are moved to the front of their rows, so that logits are made for about as many columns as there
    are response tokens.
    """
    tokens = rows.tokens
    R, T = tokens.ids.shape
    hidden = forward.hidden_states(model, tree, tokens)
    order_RT = jnp.argsort(~tokens.loss_mask, axis=1, stable=True)
    before_RT = jnp.take_along_axis(forward.predecessor(tokens), order_RT, 1)
    hidden_RTD = jnp.take_along_axis(hidden, before_RT[..., None], 1)
    ids_RT = jnp.take_along_axis(tokens.ids, order_RT, 1)
    width = max(1, min(T, CHUNK, model.logit_chunk // R))

    def chunk(shared: tuple[Array, Array | None], hidden: Array, ids: Array) -> tuple[Array, Array]:
        head_DV, is_allowed_V = shared
        return forward.ids_logp(
            model, hidden, ids, head_DV, temperature=temperature, with_entropy=with_entropy,
            allowed_V=None if is_allowed_V is None else is_allowed_V > 0,
        )  # fmt: skip

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, -T % width)] + [(0, 0)] * (x.ndim - 2))
        return rearrange(padded, "r (c w) ... -> c r w ...", w=width)

    # as floats, since what chunks share is differentiated
    shared = (forward.whole_head(model, tree), None if allowed_V is None else allowed_V.astype(jnp.float32))
    count = -(-tokens.loss_mask.sum(1).max() // width)
    made: Any = map_first(chunk, shared, cut(hidden_RTD), cut(ids_RT), count)
    place_RT = jnp.maximum(jnp.cumsum(tokens.loss_mask, 1) - 1, 0)

    def in_place(x_CRW: Array) -> Array:
        found_RT = jnp.take_along_axis(rearrange(x_CRW, "c r w -> r (c w)"), place_RT, 1)
        return jnp.where(tokens.loss_mask, found_RT, 0.0)

    return in_place(made[0]), in_place(made[1]) if with_entropy else jnp.zeros(tokens.ids.shape)


@lru_cache
def make_packed_score(model: Model, head: Head, mesh: Mesh) -> Any:
    """A jitted (params, `Packed`) -> [B N]: each response's log-probability in nats, or a reward model's raw score."""
    of = scores if head == "value" else logps

    def packed_score(params: Params, batch: Packed) -> Float[Array, "B N"]:
        tree = merge(params)
        return sum_over(lambda rows: of(model, tree, rows), batch)

    return jax.jit(packed_score, out_shardings=replicated(mesh))
