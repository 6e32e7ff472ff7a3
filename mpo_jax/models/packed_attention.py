"""Blocked attention over packed rows: which keys a block of queries may see is known at run time only.

Both passes are loops over pairs of a query block and a key block, from the block in which the first segment of the
queries begins up to the queries' own: what other prompts left of it are never multiplied, and the program does not grow
with the rows. The softmax is taken block by block, as in section 3.1 of arXiv:2205.14135.
Letters: C blocks, B batch, G kv heads, R query heads a kv head, q query token, s key token, K head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mpo_jax.models.chunks import at, put
from mpo_jax.types import Tokens

BLOCK, MAX_BLOCKS = 128, 16
"""Columns of a block at least, and blocks of a row at most: smaller blocks leave out more, and are more to start."""

SAVED = "attention"
"""What a checkpoint policy saves so that the backward pass need not attend again."""

LOWEST = float(jnp.finfo(jnp.float32).min)


class Plan(NamedTuple):
    """The static part: sliding window, and the scale and soft cap of the logits."""

    window: int | None
    scale: float
    soft_cap: float | None


class Layout(NamedTuple):
    """The run-time part: columns cut into blocks [C ...], and the first key block of each query block [C]."""

    tokens: Tokens
    first: Int[Array, " C"]


def layout_of(tokens: Tokens) -> Layout:
    """Columns in blocks, filled up with padding, and where the keys of each block begin in any of the rows."""
    T = tokens.ids.shape[1]
    width = max(BLOCK, -(-T // MAX_BLOCKS))
    cut = jax.tree.map(partial(_cut, width=width, axis=1), tokens)
    segment = jnp.pad(tokens.segment, ((0, 0), (0, -T % width)))
    index = jnp.arange(segment.shape[1])[None]
    begins = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    # padding sees nothing; a block of padding alone begins behind itself
    start = jnp.where(segment > 0, start, segment.shape[1])
    first = jnp.minimum(rearrange(start, "b (c w) -> c (b w)", w=width).min(1) // width, jnp.arange(len(cut.ids)) + 1)
    return Layout(cut, first)


def make_attend(
    tokens: Tokens,
    sees: Callable[[Tokens, Tokens, int | None], Array],
    plan: Callable[[int], Plan],
) -> Callable[[Array, Array, Array], Array]:
    """Queries [B T H K], keys and values [B T G K] to softmax(soft_cap(scale q k)) v over the keys each query sees.

    Args:
      sees: mask [B q s] of two sets of columns.
      plan: from the head dimension.
    """
    layout = layout_of(tokens)
    T, width = tokens.ids.shape[1], layout.tokens.ids.shape[2]

    def attend(q: Array, k: Array, v: Array) -> Array:
        q_CBGRqK = _cut(rearrange(q, "b t (g r) k -> b g r t k", g=k.shape[2]), width, axis=3)
        k_CBGsK, v_CBGsK = (_cut(rearrange(x, "b t g k -> b g t k"), width, axis=2) for x in (k, v))
        out: Any = _attend(plan(q.shape[-1]), sees, q_CBGRqK, k_CBGsK, v_CBGsK, layout)
        return rearrange(out, "c b g r q k -> b (c q) (g r) k")[:, :T]

    return attend


def _cut(x: Array, width: int, axis: int) -> Array:
    """`axis` in blocks, of which there is a leading axis; the last one is filled up with zeros."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % width)
    x = jnp.pad(x, widths)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, width, *x.shape[axis + 1 :]), axis, 0)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _fold(x: Float[Array, "B G R q K"]) -> Float[Array, "B G Rq K"]:
    return rearrange(x, "b g r q k -> b g (r q) k")


def _logits(plan: Plan, q: Array, k: Array) -> Float[Array, "B G R q s"]:
    products = _dot("bgqk,bgsk->bgqs", _fold(q), k)
    logits = products.reshape(*q.shape[:-1], -1) * plan.scale
    return logits if plan.soft_cap is None else plan.soft_cap * jnp.tanh(logits / plan.soft_cap)


def _masked(plan: Plan, sees: Any, layout: Layout, i: Array, j: Array, logits: Array) -> Array:
    mask = sees(at(layout.tokens, i), at(layout.tokens, j), plan.window)
    # made once for all heads: fused into what follows, it would be made for each
    return jnp.where(jax.lax.optimization_barrier(mask)[:, None, None], logits, LOWEST)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan: Plan, sees: Any, q: Array, k: Array, v: Array, layout: Layout) -> Array:
    return _forward(plan, sees, q, k, v, layout)[0]


def _forward(plan: Plan, sees: Any, q: Array, k: Array, v: Array, layout: Layout) -> Any:
    C, *rows, _ = q.shape

    def block(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        query = at(q, i)

        def pair(j: Array, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, total, product = carried
            scores = _masked(plan, sees, layout, i, j, _logits(plan, query, at(k, j)))
            higher = jnp.maximum(highest, scores.max(-1))
            weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(highest - higher)
            value = at(v, j)
            more = _dot("bgqs,bgsk->bgqk", _fold(weights).astype(value.dtype), value).reshape(product.shape)
            return higher, total * shrink + weights.sum(-1), product * shrink[..., None] + more

        none = jnp.full(rows, LOWEST), jnp.zeros(rows), jnp.zeros(query.shape)
        highest, total, product = jax.lax.fori_loop(layout.first[i], i + 1, pair, none)
        # a block of padding alone has seen nothing
        total = jnp.where(total > 0, total, 1.0)
        out, log_z = done
        return put(out, i, (product / total[..., None]).astype(out.dtype)), put(log_z, i, highest + jnp.log(total))

    empty = jnp.zeros(q.shape, v.dtype), jnp.zeros((C, *rows))
    out, log_z = jax.lax.fori_loop(0, C, block, empty)
    out, log_z = checkpoint_name(out, SAVED), checkpoint_name(log_z, SAVED)
    return out, (q, k, v, layout, out, log_z)


def _backward(plan: Plan, sees: Any, saved: Any, d_out: Array) -> Any:
    """Weights are made again from the saved log-sums, pair by pair."""
    q, k, v, layout, out, log_z = saved
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def block(i: Array, done: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        query, d_block, inner_i, log_z_i = at((q, d_out, inner, log_z), i)

        def pair(j: Array, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_query, d_k, d_v = carried
            key, value = at((k, v), j)
            logits = _logits(plan, query, key)
            weights = jnp.exp(_masked(plan, sees, layout, i, j, logits) - log_z_i[..., None])
            d_weights = _dot("bgqk,bgsk->bgqs", _fold(d_block), value).reshape(weights.shape)
            d_scores = weights * (d_weights - inner_i[..., None]) * plan.scale
            if plan.soft_cap is not None:
                d_scores = d_scores * (1.0 - jnp.square(logits / plan.soft_cap))
            folded = _fold(d_scores).astype(key.dtype)
            d_query = d_query + _dot("bgqs,bgsk->bgqk", folded, key).reshape(d_query.shape)
            d_key = _dot("bgqs,bgqk->bgsk", folded, _fold(query))
            d_value = _dot("bgqs,bgqk->bgsk", _fold(weights).astype(d_block.dtype), _fold(d_block))
            return d_query, put(d_k, j, at(d_k, j) + d_key), put(d_v, j, at(d_v, j) + d_value)

        d_q, d_k, d_v = done
        none = jnp.zeros(query.shape)
        d_query, d_k, d_v = jax.lax.fori_loop(layout.first[i], i + 1, pair, (none, d_k, d_v))
        return put(d_q, i, d_query.astype(d_q.dtype)), d_k, d_v

    empty = jnp.zeros_like(q), jnp.zeros(k.shape), jnp.zeros(v.shape)
    d_q, d_k, d_v = jax.lax.fori_loop(0, len(q), block, empty)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
