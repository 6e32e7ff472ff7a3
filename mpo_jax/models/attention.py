"""Attention over whole rows, a block of queries at a time: the scores of all queries are never held at once.

A row's layout is known when the program is compiled (`Tokens.num_responses`), so keys that no query of a block may see
are never multiplied: later tokens, and other responses to the same prompt. Within a block the mask decides.
`for_layer` chooses between this and whole-row attention; `visible_slots` is the mask of cached decoding.
Letters: B batch, q query token, s key token, G kv heads, R query heads a kv head, K head dim.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.errors import UserError
from mpo_jax.models import packed_attention
from mpo_jax.models.packed_attention import SAVED
from mpo_jax.models.spec import LayerSpec
from mpo_jax.runtime.sharding import platform
from mpo_jax.types import Tokens

MIN_BLOCK, MAX_BLOCKS = 128, 8
"""Queries a block at least, and blocks a stretch at most: the program grows with their number."""

LOWEST = float(jnp.finfo(jnp.float32).min)


Attend: TypeAlias = Callable[[Array, Array, Array], Array]
"""Queries [B T H K], keys and values [B T G K] to what each query reads, [B T H K]."""


class Block(NamedTuple):
    """Columns [begin, end) as queries, and the column ranges that hold all keys they may see."""

    begin: int
    end: int
    keys: tuple[tuple[int, int], ...]


class Plan(NamedTuple):
    """The static part of blocked attention: its blocks, and the scale and soft cap of its logits."""

    blocks: tuple[Block, ...]
    scale: float
    soft_cap: float | None


def blocks(width: int, prompt_width: int, num_responses: int) -> tuple[Block, ...]:
    """The queries of a row in blocks: a prompt of `prompt_width` columns, then responses of equal width."""
    size = (width - prompt_width) // num_responses
    edges = [0, *(prompt_width + n * size for n in range(num_responses)), width]
    found = []
    for begin, end in itertools.pairwise(sorted(set(edges))):
        step = max(MIN_BLOCK, -(-(end - begin) // MAX_BLOCKS))
        for first in range(begin, end, step):
            last = min(first + step, end)
            keys = ((0, last),) if begin <= prompt_width else ((0, prompt_width), (begin, last))
            found.append(Block(first, last, tuple(k for k in keys if k[0] < k[1])))
    return tuple(found)


def sees(query: Tokens, key: Tokens, window: int | None) -> Bool[Array, "B q s"]:
    """True where a query sees a key: same segment, not later, prompt or own branch, less than `window` positions back.

    Both are columns of one layout, in which positions rise along every branch and continue the prompt's.
    """
    q, k = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    seen = (q(query.segment) == k(key.segment)) & (k(key.segment) > 0)
    seen &= (k(key.branch) == 0) | (k(key.branch) == q(query.branch))
    distance = q(query.position) - k(key.position)
    seen &= distance >= 0
    return seen if window is None else seen & (distance < window)


def visible_slots(
    prompt_len_B: Int[Array, " B"],
    widths: tuple[int, int, int],
    stored_B: Int[Array, " B"],
    slot: int | Int[Array, ""],
    window: int | None,
) -> Bool[Array, "B T"]:
    """The cache slots that a row's newest token sees: its prompt, its response up to itself, within the window.

    Args:
      widths: of the three parts of T: prompts, stored responses, recent tokens.
      stored_B: how many tokens of each row's response are stored.
      slot: of the newest token among the recent ones.
    """
    prompt, response, recent = (jnp.arange(width)[None] for width in widths)
    B = len(prompt_len_B)
    part = lambda x: jnp.broadcast_to(x, (B, x.shape[1]))  # noqa: E731
    visible_BT = jnp.concatenate(
        [prompt < prompt_len_B[:, None], response < stored_B[:, None], part(recent <= slot)], 1
    )
    if window is None:
        return visible_BT
    ends_B1 = (prompt_len_B + stored_B)[:, None]
    position_BT = jnp.concatenate([part(prompt), prompt_len_B[:, None] + response, ends_B1 + recent], 1)
    return visible_BT & (ends_B1 + slot - position_BT < window)


def logit_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the attention logits: 1 / sqrt(head_dim) unless a layer has its own."""
    return head_dim**-0.5 if scale is None else scale


def soft_capped(logits: Array, cap: float | None) -> Array:
    """cap * tanh(logits / cap), which stays within +-cap; without a cap the logits themselves."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def for_layer(tokens: Tokens, spec: LayerSpec, implementation: str) -> Attend:
    """The attention of layers with this spec over these rows. Masks are computed here, once for all such layers.

    Args:
      implementation: blocked, pallas, pallas_or_blocked (pallas where its kernels can hold the rows), or an
        implementation of jax.nn.dot_product_attention (xla, cudnn).

    Raises:
      UserError: cudnn with a soft cap, which it does not have.
    """
    if implementation in ("pallas", "pallas_or_blocked"):
        return _by_kernels(tokens, spec, or_blocked=implementation == "pallas_or_blocked")
    if implementation == "blocked":
        if tokens.packed and tokens.ids.shape[1] > 2 * packed_attention.BLOCK:

            def plan(head_dim: int) -> packed_attention.Plan:
                return packed_attention.Plan(spec.window, logit_scale(spec.scale, head_dim), spec.soft_cap)

            return packed_attention.make_attend(tokens, sees, plan)
        return make_attend(tokens, spec.window, scale=spec.scale, soft_cap=spec.soft_cap)
    mask = sees(tokens, tokens, spec.window)[:, None]
    if spec.soft_cap is None:
        known: Any = implementation
        return partial(jax.nn.dot_product_attention, mask=mask, scale=spec.scale, implementation=known)
    if implementation == "xla":
        return partial(_capped, mask=mask, scale=spec.scale, soft_cap=spec.soft_cap)
    raise UserError(
        f"model.attention={implementation} cannot cap attention logits, and this model caps them at "
        f"{spec.soft_cap}: set model.attention=blocked"
    )


def _by_kernels(tokens: Tokens, spec: LayerSpec, *, or_blocked: bool) -> Attend:
    """Pallas's kernels; with `or_blocked`, blocked attention where they cannot hold the rows."""
    # here, since the import takes a third of a second, which runs without the kernels save
    from mpo_jax.models import pallas_attention

    kernels = pallas_attention.make_attend(
        tokens, lambda head_dim: (spec.window, logit_scale(spec.scale, head_dim), spec.soft_cap)
    )
    if not or_blocked:
        return kernels
    blocked, here, T = for_layer(tokens, spec, "blocked"), platform(), tokens.ids.shape[1]
    return lambda q, k, v: (kernels if pallas_attention.fits(here, T, q) else blocked)(q, k, v)


def _capped(q: Array, k: Array, v: Array, *, mask: Array, scale: float | None, soft_cap: float) -> Array:
    """Whole-row attention with a soft cap, which jax.nn.dot_product_attention does not have."""
    q_BTGRK = rearrange(q, "b t (g r) k -> b t g r k", g=k.shape[2])
    logits = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k, preferred_element_type=jnp.float32)
    logits = soft_capped(logits * logit_scale(scale, q.shape[-1]), soft_cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, LOWEST), -1)
    out = jnp.einsum("bgrts,bsgk->btgrk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return rearrange(out, "b t g r k -> b t (g r) k").astype(v.dtype)


def make_attend(
    tokens: Tokens, window: int | None = None, *, scale: float | None = None, soft_cap: float | None = None
) -> Attend:
    """Blocked attention: softmax(soft_cap(scale q k)) v over the keys that each query sees.

    Scores and softmax are in float32. A query that sees no key (padding) gets a finite value without meaning.
    """
    plan = blocks(tokens.ids.shape[1], tokens.scored_from, tokens.num_responses)
    seen = tuple(sees(_columns(tokens, ((b.begin, b.end),)), _columns(tokens, b.keys), window) for b in plan)
    # without this, XLA's GPU compiler makes them anew in every block's softmax, and takes its time over it
    seen = jax.lax.optimization_barrier(seen)

    def attend(q: Array, k: Array, v: Array) -> Array:
        fixed = Plan(plan, logit_scale(scale, q.shape[-1]), soft_cap)
        heads_first = partial(rearrange, pattern="b t g k -> b g t k")
        q = rearrange(q, "b t (g r) k -> b g r t k", g=k.shape[2])
        out: Any = _attend(fixed, q, heads_first(k), heads_first(v), seen)
        return rearrange(out, "b g r t k -> b t (g r) k")

    return attend


def _columns(tokens: Tokens, ranges: tuple[tuple[int, int], ...]) -> Tokens:
    return jax.tree.map(lambda x: _take(x, ranges, 1), tokens)


def _take(x: Array, ranges: tuple[tuple[int, int], ...], axis: int) -> Array:
    parts = [jax.lax.slice_in_dim(x, a, b, axis=axis) for a, b in ranges]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _logits(plan: Plan, q: Array, k: Array) -> Float[Array, "B G R q s"]:
    B, G, R, Q, K = q.shape
    products = jnp.einsum("bgqk,bgsk->bgqs", q.reshape(B, G, R * Q, K), k, preferred_element_type=jnp.float32)
    return soft_capped(products.reshape(B, G, R, Q, -1) * plan.scale, plan.soft_cap)


def _masked(logits: Float[Array, "B G R q s"], seen: Bool[Array, "B q s"]) -> Float[Array, "B G R q s"]:
    return jnp.where(seen[:, None, None], logits, LOWEST)


def _weighted(weights: Array, x: Array) -> Float[Array, "B G R q K"]:
    """[B G R q s] times [B G s K], accumulated in float32."""
    B, G, R, Q, S = weights.shape
    folded = weights.astype(x.dtype).reshape(B, G, R * Q, S)
    return jnp.einsum("bgqs,bgsk->bgqk", folded, x, preferred_element_type=jnp.float32).reshape(B, G, R, Q, -1)


def _gathered(weights: Array, x: Array) -> Float[Array, "B G s K"]:
    """The transpose of `_weighted`: [B G R q s] and [B G R q K] to what each key gets."""
    B, G, R, Q, S = weights.shape
    folded = weights.astype(x.dtype).reshape(B, G, R * Q, S)
    return jnp.einsum("bgqs,bgqk->bgsk", folded, x.reshape(B, G, R * Q, -1), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, seen: tuple[Array, ...]) -> Array:
    return _forward(plan, q, k, v, seen)[0]


def _forward(plan: Plan, q: Array, k: Array, v: Array, seen: tuple[Array, ...]) -> Any:
    outs, log_zs = [], []
    for block, mask in zip(plan.blocks, seen, strict=True):
        scores = _masked(_logits(plan, _take(q, ((block.begin, block.end),), 3), _take(k, block.keys, 2)), mask)
        highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        # divided after the product: K numbers a query in place of s; blocks are finished one by one, since XLA's GPU
        # compiler takes minutes for what it would fuse across all of them
        product, total = jax.lax.optimization_barrier((_weighted(weights, _take(v, block.keys, 2)), total))
        outs.append((product / total).astype(v.dtype))
        log_zs.append((highest + jnp.log(total))[..., 0])
    out = checkpoint_name(jnp.concatenate(outs, 3), SAVED)
    log_z = checkpoint_name(jnp.concatenate(log_zs, 3), SAVED)
    return out, (q, k, v, seen, out, log_z)


def _backward(plan: Plan, saved: Any, d_out: Array) -> Any:
    """Weights are made again from the saved log-sums, block by block. Section 3.1 of arXiv:2205.14135."""
    q, k, v, seen, out, log_z = saved
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    edges = sorted({edge for block in plan.blocks for pair in block.keys for edge in pair})
    d_q, d_k, d_v = [], {a: [] for a in edges[:-1]}, {a: [] for a in edges[:-1]}
    for block, mask in zip(plan.blocks, seen, strict=True):
        rows = partial(_take, ranges=((block.begin, block.end),), axis=3)
        keys, values = _take(k, block.keys, 2), _take(v, block.keys, 2)
        logits = _logits(plan, rows(q), keys)
        weights = jnp.exp(_masked(logits, mask) - rows(log_z)[..., None])
        B, G, R, Q, _ = weights.shape
        d_weights = jnp.einsum(
            "bgqk,bgsk->bgqs", rows(d_out).reshape(B, G, R * Q, -1), values, preferred_element_type=jnp.float32
        ).reshape(weights.shape)
        d_scores = weights * (d_weights - rows(inner)) * plan.scale
        if plan.soft_cap is not None:
            d_scores = d_scores * (1.0 - jnp.square(logits / plan.soft_cap))
        d_q.append(_weighted(d_scores, keys))
        _hand_out(d_k, block.keys, edges, _gathered(d_scores, rows(q)))
        _hand_out(d_v, block.keys, edges, _gathered(weights, rows(d_out)))
    join = lambda parts: jnp.concatenate([sum(parts[a][1:], parts[a][0]) for a in edges[:-1]], 2)  # noqa: E731
    return (
        jnp.concatenate(d_q, 3).astype(q.dtype),
        join(d_k).astype(k.dtype),
        join(d_v).astype(v.dtype),
        None,
    )


def _hand_out(parts: dict[int, list[Array]], ranges: tuple[tuple[int, int], ...], edges: list[int], x: Array) -> None:
    """Cuts what a block gives to its keys at `edges`, so that nested ranges can be added up."""
    place = 0
    for begin, end in ranges:
        inside = [edge for edge in edges if begin <= edge <= end]
        for a, b in itertools.pairwise(inside):
            parts[a].append(jax.lax.slice_in_dim(x, place + a - begin, place + b - begin, axis=2))
        place += end - begin


_attend.defvjp(_forward, _backward)
