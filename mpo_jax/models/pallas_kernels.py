"""Flash-attention kernels in Pallas that visit only the pairs of blocks listed for them: one body, two compilers.

A program of the grid has one block of queries (forward pass and gradient of queries) or of keys (gradient of keys and
values) and loops over the blocks that its list names. Whole rows of the other side are in reach: in VMEM on TPUs, by
pointer on GPUs. So the same body serves Mosaic and Triton, and no step of a TPU's grid is spent on a pair that is left
out; the price is that a head's row must fit VMEM (`fits`). The algorithm is that of arXiv:2307.08691.
Letters: B batch, H heads, G kv heads, R query heads a kv head, T token, K head dim, N blocks of `width` tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from mpo_jax.runtime.sharding import Platform

HIDDEN, NOTHING = float(jnp.finfo(jnp.float32).min), -1e30
"""The logit of a hidden key, and the highest logit before any is seen.

HIDDEN is so far below NOTHING that exp(HIDDEN - NOTHING) is 0: a query that sees no key reads 0 and has no gradient.
"""

VMEM_BYTES = 12 * 2**20
"""What a kernel's blocks may take on a TPU: three quarters of what the compiler grants on every generation."""


class Plan(NamedTuple):
    """The static part: sliding window, scale and soft cap of the logits, and tokens a block."""

    window: int | None
    scale: float
    soft_cap: float | None
    width: int


class Ids(NamedTuple):
    """Rows of the ids [B 4 T] that the mask is made of.

    A run is a stretch of one branch of one segment; runs of a row count from 1.

    Attributes:
      own: a query's run; 0 at padding.
      prompt: the run of a query's prompt; 0 at padding.
      key: a key's run; -1 at padding.
      position: of every token.
    """

    own: int = 0
    prompt: int = 1
    key: int = 2
    position: int = 3


ROWS = Ids()


class Sizes(NamedTuple):
    """The axes of a call."""

    B: int
    H: int
    G: int
    T: int
    K: int

    @classmethod
    def of(cls, q: Array, k: Array) -> "Sizes":
        B, H, T, K = q.shape
        return cls(B, H, k.shape[1], T, K)


def width_of(platform: Platform, T: int, K: int, dtype: Any) -> int:
    """Tokens a block. Not measured yet.

    TPU: a multiple of the 128 lanes. A pair of 128 mostly waits for two products and two reductions, one after the
    other; 256 should take twice the time for four times the work, and the listed pairs cover half as much again.
    GPU: 64, since the backward pass holds two tiles [width width] and two [width K] of float32 in registers; fewer
    where a block would take over 16 KiB, since several share 100 KiB on the smaller GPUs.
    """
    if platform == "cuda":
        return min(64, 2**14 // (head_dim_of(platform, K) * jnp.dtype(dtype).itemsize))
    return 256 if T >= 1024 and K <= 128 else 128


def head_dim_of(platform: Platform, K: int) -> int:
    """The head dimension that a kernel works on: Triton's tiles are powers of two."""
    return pl.next_power_of_2(K) if platform == "cuda" else K


def fits(T: int, K: int, dtype: Any) -> bool:
    """Whether a TPU's kernels can hold rows of T tokens."""
    return _row_bytes(1, T, K, dtype) <= VMEM_BYTES


def _row_bytes(heads: int, T: int, K: int, dtype: Any) -> int:
    """VMEM of the largest kernel, that of keys and values: queries, their gradients and two statistics, all twice.

    Every block is there twice, so that the next one can arrive; sublanes are padded to 8 and lanes to 128.
    """
    each = 2 * -(-K // 128) * 128 * jnp.dtype(dtype).itemsize
    return 2 * T * (heads * (each + 2 * 4) + 4 * 8)


def heads_together(platform: Platform, sizes: Sizes, dtype: Any) -> int:
    """Query heads of a group whose gradients to keys and values one program adds up; those of the rest XLA adds."""
    R = sizes.H // sizes.G
    if platform != "tpu":
        return R
    divisors = (r for r in range(R, 1, -1) if R % r == 0)
    return next((r for r in divisors if _row_bytes(r, sizes.T, sizes.K, dtype) <= VMEM_BYTES), 1)


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _block(index: Any, width: int) -> Any:
    """The columns of one block."""
    return pl.ds(pl.multiple_of(index * width, width), width)


def _divided(index: Any, by: int) -> Any:
    """index // by of a natural number; `//` would look at signs."""
    return index if by == 1 else jax.lax.div(index, by)


def _capped(plan: Plan, products: Array) -> Array:
    logits = products * plan.scale
    return logits if plan.soft_cap is None else plan.soft_cap * jnp.tanh(logits / plan.soft_cap)


def _uncapped(plan: Plan, logits: Array, d_logits: Array) -> Array:
    """The gradient of `_capped`, but for the scale."""
    return d_logits if plan.soft_cap is None else d_logits * (1.0 - jnp.square(logits / plan.soft_cap))


def _masked(plan: Plan, ids_ref: Any, queries: Any, keys: Any, logits: Array, *, keys_first: bool = False) -> Array:
    """Logits [q s], or [s q] with `keys_first`, and HIDDEN where a query does not see a key: `attention.sees`."""
    q_axis, k_axis = (0, 1) if keys_first else (1, 0)
    query = [jnp.expand_dims(ids_ref[row, queries], q_axis) for row in (ROWS.own, ROWS.prompt, ROWS.position)]
    key, key_position = (jnp.expand_dims(ids_ref[row, keys], k_axis) for row in (ROWS.key, ROWS.position))
    own, prompt, position = query
    distance = position - key_position
    seen = ((key == own) | (key == prompt)) & (distance >= 0)
    if plan.window is not None:
        seen &= distance < plan.window
    return jnp.where(seen, logits, HIDDEN)


def _as_row(x: Float[Array, "q 1"]) -> Float[Array, " q"]:
    """A column as a row, by adding up a diagonal: Mosaic has no reshape for it before TPU v5."""
    places = [jax.lax.broadcasted_iota(jnp.int32, (len(x), len(x)), axis) for axis in (0, 1)]
    return jnp.where(places[0] == places[1], x, 0.0).sum(0)


def _listed(list_ref: Any) -> tuple[Any, Callable[[Any], Any]]:
    """How many blocks this program's list names, and a function from a place in the list to the block."""
    N = pl.num_programs(2)
    begin = (pl.program_id(0) * N + pl.program_id(2)) * (N + 1)
    return list_ref[begin], lambda n: list_ref[begin + 1 + n]


def _forward_body(
    plan: Plan, list_ref: Any, ids_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, log_z_ref: Any
) -> None:
    count, listed = _listed(list_ref)
    queries = _block(pl.program_id(2), plan.width)
    query = q_ref[...]

    def pair(n: Any, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, product = carried
        keys = _block(listed(n), plan.width)
        logits = _capped(plan, _dot(query, k_ref[keys, :], (1, 1)))
        scores = _masked(plan, ids_ref, queries, keys, logits)
        higher = jnp.maximum(highest, scores.max(1, keepdims=True))
        weights, shrink = jnp.exp(scores - higher), jnp.exp(highest - higher)
        value = v_ref[keys, :]
        more = _dot(weights.astype(value.dtype), value)
        return higher, total * shrink + weights.sum(1, keepdims=True), product * shrink + more

    column = (plan.width, 1)
    none = jnp.full(column, NOTHING, jnp.float32), jnp.zeros(column, jnp.float32), jnp.zeros(query.shape, jnp.float32)
    highest, total, product = jax.lax.fori_loop(0, count, pair, none)
    total = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (product / total).astype(out_ref.dtype)
    log_z_ref[...] = _as_row(highest + jnp.log(total))


def _d_query_body(
    plan: Plan,
    list_ref: Any,
    ids_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    log_z_ref: Any,
    inner_ref: Any,
    d_q_ref: Any,
) -> None:
    count, listed = _listed(list_ref)
    queries = _block(pl.program_id(2), plan.width)
    query, d_out = q_ref[...], d_out_ref[...]
    log_z, inner = log_z_ref[...][:, None], inner_ref[...][:, None]

    def pair(n: Any, d_query: Array) -> Array:
        keys = _block(listed(n), plan.width)
        key = k_ref[keys, :]
        logits = _capped(plan, _dot(query, key, (1, 1)))
        weights = jnp.exp(_masked(plan, ids_ref, queries, keys, logits) - log_z)
        d_weights = _dot(d_out, v_ref[keys, :], (1, 1))
        d_logits = _uncapped(plan, logits, weights * (d_weights - inner))
        return d_query + _dot(d_logits.astype(key.dtype), key)

    d_query = jax.lax.fori_loop(0, count, pair, jnp.zeros(query.shape, jnp.float32))
    d_q_ref[...] = (d_query * plan.scale).astype(d_q_ref.dtype)


def _d_key_body(
    plan: Plan,
    heads: int,
    list_ref: Any,
    ids_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    log_z_ref: Any,
    inner_ref: Any,
    d_k_ref: Any,
    d_v_ref: Any,
) -> None:
    """Tiles are [s q], so that no product but that with `d_weights` has a transposed side."""
    count, listed = _listed(list_ref)
    keys = _block(pl.program_id(2), plan.width)
    key, value = k_ref[...], v_ref[...]

    def pair(r: Any, n: Any, carried: tuple[Array, Array]) -> tuple[Array, Array]:
        d_key, d_value = carried
        queries = _block(listed(n), plan.width)
        query, d_out = q_ref[r, queries, :], d_out_ref[r, queries, :]
        logits = _capped(plan, _dot(key, query, (1, 1)))
        scores = _masked(plan, ids_ref, queries, keys, logits, keys_first=True)
        weights = jnp.exp(scores - log_z_ref[r, 0, queries][None])
        d_weights = _dot(value, d_out, (1, 1))
        d_logits = _uncapped(plan, logits, weights * (d_weights - inner_ref[r, 0, queries][None]))
        d_key = d_key + _dot(d_logits.astype(query.dtype), query)
        return d_key, d_value + _dot(weights.astype(d_out.dtype), d_out)

    none = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    d_key, d_value = jax.lax.fori_loop(
        0, heads, lambda r, carried: jax.lax.fori_loop(0, count, partial(pair, r), carried), none
    )
    d_k_ref[...] = (d_key * plan.scale).astype(d_k_ref.dtype)
    d_v_ref[...] = d_value.astype(d_v_ref.dtype)


def _call(
    body: Callable[..., None],
    platform: Platform,
    grid: tuple[int, int, int],
    in_specs: list[Any],
    out_specs: list[Any],
    out_shape: list[Any],
    cost: pl.CostEstimate,
    name: str,
) -> Callable[..., Any]:
    """The kernel on one platform. The first input is the lists, flat: scalars, which a TPU reads from SMEM."""
    lists, params = pl.BlockSpec(memory_space=pltpu.SMEM), None
    if platform == "tpu":
        # blocks of one head come one after the other, and share the other side's row
        params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    elif platform == "cuda":
        lists, params = pl.BlockSpec(memory_space=pl.ANY), plgpu.CompilerParams(num_warps=4, num_stages=2)
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[lists, *in_specs],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=params,
        interpret=platform == "cpu",
        cost_estimate=cost,
        name=name,
    )


def _specs(plan: Plan, sizes: Sizes) -> dict[str, pl.BlockSpec]:
    """What a program of a block of queries reads: its own block, whole rows of the other side, statistics [B H 1 T]."""
    R = sizes.H // sizes.G
    return {
        "ids": pl.BlockSpec((None, len(ROWS), sizes.T), lambda b, h, i: (b, 0, 0)),
        "query": pl.BlockSpec((None, None, plan.width, sizes.K), lambda b, h, i: (b, h, i, 0)),
        "row": pl.BlockSpec((None, None, sizes.T, sizes.K), lambda b, h, i: (b, _divided(h, R), 0, 0)),
        "statistic": pl.BlockSpec((None, None, None, plan.width), lambda b, h, i: (b, h, 0, i)),
    }


def _cost(sizes: Sizes, dtype: Any, products: int, arrays: int) -> pl.CostEstimate:
    """At most: of rows that are one segment, whose every pair of tokens in order is seen."""
    pairs = sizes.B * sizes.H * sizes.T * (sizes.T + 1) // 2
    return pl.CostEstimate(
        flops=2 * products * pairs * sizes.K,
        transcendentals=pairs,
        bytes_accessed=arrays * sizes.B * sizes.H * sizes.T * sizes.K * jnp.dtype(dtype).itemsize,
    )


def forward(
    plan: Plan, platform: Platform, lists: Int[Array, " n"], ids: Int[Array, "B 4 T"], q: Array, k: Array, v: Array
) -> tuple[Float[Array, "B H T K"], Float[Array, "B H T"]]:
    """What every query reads, and the log-sum of its exponentiated logits, nats.

    Args:
      lists: of every block of queries, how many blocks of keys it may see, and which: [B N N+1], flat.
      q, k, v: [B H T K] and [B G T K], where `plan.width` divides T.
    """
    sizes, specs = Sizes.of(q, k), _specs(plan, Sizes.of(q, k))
    B, H, _, T, _ = sizes
    out, log_z = _call(
        partial(_forward_body, plan),
        platform,
        (B, H, T // plan.width),
        [specs[name] for name in ("ids", "query", "row", "row")],
        [specs["query"], specs["statistic"]],
        [jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32)],
        _cost(sizes, q.dtype, 2, 4),
        "attention_forward",
    )(lists, ids, q, k, v)
    return out, log_z[:, :, 0]


def d_query(
    plan: Plan,
    platform: Platform,
    lists: Int[Array, " n"],
    ids: Int[Array, "B 4 T"],
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    log_z: Float[Array, "B H T"],
    inner: Float[Array, "B H T"],
) -> Float[Array, "B H T K"]:
    """The gradient of the queries; `inner` is each query's product of output and its gradient. Arguments: `forward`."""
    sizes, specs = Sizes.of(q, k), _specs(plan, Sizes.of(q, k))
    names = ("ids", "query", "row", "row", "query", "statistic", "statistic")
    (d_q,) = _call(
        partial(_d_query_body, plan),
        platform,
        (sizes.B, sizes.H, sizes.T // plan.width),
        [specs[name] for name in names],
        [specs["query"]],
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        _cost(sizes, q.dtype, 3, 5),
        "attention_d_query",
    )(lists, ids, q, k, v, d_out, log_z[:, :, None], inner[:, :, None])
    return d_q


def d_key(
    plan: Plan,
    platform: Platform,
    lists: Int[Array, " n"],
    ids: Int[Array, "B 4 T"],
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    log_z: Float[Array, "B H T"],
    inner: Float[Array, "B H T"],
) -> tuple[Float[Array, "B G T K"], Float[Array, "B G T K"]]:
    """The gradients of keys and values; `lists` are those of the blocks of keys: which queries may see them."""
    sizes = Sizes.of(q, k)
    B, H, G, T, K = sizes
    together = heads_together(platform, sizes, q.dtype)
    parts = H // together
    each = parts // G
    ids_spec = pl.BlockSpec((None, len(ROWS), T), lambda b, p, j: (b, 0, 0))
    rows = pl.BlockSpec((None, together, T, K), lambda b, p, j: (b, p, 0, 0))
    block = pl.BlockSpec((None, None, plan.width, K), lambda b, p, j: (b, _divided(p, each), j, 0))
    part = pl.BlockSpec((None, None, plan.width, K), lambda b, p, j: (b, p, j, 0))
    statistic = pl.BlockSpec((None, together, 1, T), lambda b, p, j: (b, p, 0, 0))
    # what XLA is to add up is not rounded before
    dtype = k.dtype if each == 1 else jnp.float32
    d_k, d_v = _call(
        partial(_d_key_body, plan, together),
        platform,
        (B, parts, T // plan.width),
        [ids_spec, rows, block, block, rows, statistic, statistic],
        [part, part],
        [jax.ShapeDtypeStruct((B, parts, T, K), dtype)] * 2,
        _cost(sizes, q.dtype, 4, 6),
        "attention_d_key",
    )(lists, ids, q, k, v, d_out, log_z[:, :, None], inner[:, :, None])
    return tuple(x.reshape(B, G, each, T, K).sum(2).astype(k.dtype) for x in (d_k, d_v))  # type: ignore[return-value]
