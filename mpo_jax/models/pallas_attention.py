"""Attention for accelerators by Pallas: which pairs of blocks to multiply is found outside the kernels, row by row.

Rows may be packed or prompt-shared, with padding anywhere. Of each row it is enough to know, for every block, its first
and last run, a run being a stretch of one branch of one segment: runs count upwards along a row, so an earlier block of
keys is seen where its last run is the first run of the queries, or where it has tokens of the prompt of their first
segment. These pairs are listed, and `pallas_kernels` loops over the lists; what is not listed is never read.
Letters: B batch, H heads, G kv heads, T token, K head dim, N blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.errors import UserError
from mpo_jax.models import pallas_kernels as kernels
from mpo_jax.models.packed_attention import SAVED
from mpo_jax.models.pallas_kernels import Plan
from mpo_jax.runtime.sharding import Platform, by_device, mesh_axis_size, platform
from mpo_jax.types import Tokens

FAR = 2**30
"""Beyond every run, segment and position of a row."""


class Layout(NamedTuple):
    """The run-time part, for blocks of one width.

    Attributes:
      ids: the rows of `pallas_kernels.Ids`, [B 4 T].
      keys: for every block of queries the number of key blocks it may see, then their indices: [B N N+1].
      queries: for every block of keys the number of query blocks that may see it, then their indices.
    """

    ids: Int[Array, "B 4 T"]
    keys: Int[Array, "B N N+1"]
    queries: Int[Array, "B N N+1"]


class Runs(NamedTuple):
    """What a token belongs to, [B T]; 0 at padding.

    Attributes:
      segment: number of its segment, counted along the row.
      run: number of its run, counted along the row.
      prompt: the run that is its segment's prompt; its own run where the segment has no prompt.
    """

    segment: Int[Array, "B T"]
    run: Int[Array, "B T"]
    prompt: Int[Array, "B T"]


def runs_of(tokens: Tokens) -> Runs:
    """Counts segments and runs along each row.

    But for padding, the tokens of a segment must be neighbours, its prompt must come first, and the tokens of a branch
    must be neighbours. Every layout in `types` is such.
    """
    real = tokens.segment > 0
    index = jnp.broadcast_to(jnp.arange(real.shape[1])[None], real.shape)
    latest = jax.lax.cummax(jnp.where(real, index, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    def changes(x: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        return (before < 0) | (jnp.take_along_axis(x, jnp.maximum(before, 0), 1) != x)

    new_segment = real & changes(tokens.segment)
    new_run = real & (new_segment | changes(tokens.branch))
    run = jnp.cumsum(new_run, 1)
    # the first run of the segment, doubled to tell whether it is a prompt
    first = jax.lax.cummax(jnp.where(new_segment, 2 * run + (tokens.branch == 0), 0), axis=1)
    prompt = jnp.where(first % 2 == 1, first // 2, run)
    return Runs(*(jnp.where(real, x, 0) for x in (jnp.cumsum(new_segment, 1), run, prompt)))


def layout_of(tokens: Tokens, width: int, window: int | None) -> Layout:
    """The mask's ids, padded to whole blocks, and the lists of blocks."""
    T = tokens.ids.shape[1]
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -T % width))).astype(jnp.int32)  # noqa: E731
    runs, position = jax.tree.map(pad, runs_of(tokens)), pad(tokens.position)
    ids = jnp.stack([runs.run, runs.prompt, jnp.where(runs.run > 0, runs.run, -1), position], 1)
    seen = block_pairs(runs, position, width, window)
    return Layout(ids, _lists(seen), _lists(seen.swapaxes(1, 2)))


def block_pairs(runs: Runs, position: Int[Array, "B T"], width: int, window: int | None) -> Bool[Array, "B N N"]:
    """True where a query of the first block may see a key of the second; exactly so without a window."""
    cut = lambda x: rearrange(x, "b (n w) -> b n w", w=width)  # noqa: E731
    segment, run, prompt, position = (cut(x) for x in (*runs, position))
    real = run > 0
    lowest = lambda x, of: jnp.where(of, x, FAR).min(-1)  # noqa: E731
    highest = lambda x, of: jnp.where(of, x, -1).max(-1)  # noqa: E731
    first_segment, last_segment = lowest(segment, real), highest(segment, real)
    # of the keys, only the last segment reaches into a later block, and of the queries only the first one began before
    shared_run = lowest(run, real)[:, :, None] == highest(run, real)[:, None]
    last_prompt = highest(segment, real & (run == prompt))
    seen = shared_run | (first_segment[:, :, None] == last_prompt[:, None])
    if window is not None:
        nearest_query = lowest(position, real & (segment == first_segment[..., None]))
        nearest_key = highest(position, real & (segment == last_segment[..., None]))
        seen &= nearest_query[:, :, None] - nearest_key[:, None] < window
    index = jnp.arange(segment.shape[1])
    same, earlier = index[:, None] == index[None], index[:, None] > index[None]
    return jnp.where(same[None], real.any(-1)[:, :, None], seen & earlier[None])


def _lists(seen: Bool[Array, "B N M"]) -> Int[Array, "B N M+1"]:
    """The count of True along the last axis, then their indices in order, then zeros."""
    M = seen.shape[2]
    order = jnp.sort(jnp.where(seen, jnp.arange(M)[None, None], M), -1)
    count = seen.sum(-1, keepdims=True)
    return jnp.concatenate([count, jnp.where(order < M, order, 0)], -1).astype(jnp.int32)


Statistics: TypeAlias = Float[Array, "B H T"]

BY_HEAD: tuple[str | None, ...] = ("batch", "act_heads", None, None)
"""Logical axes of queries, keys and values: heads are divided where the tensor axis divides the kv heads."""
STATISTIC = BY_HEAD[:3]
LAYOUT: Any = Layout(*[("batch", None, None)] * 3)  # type: ignore[arg-type]


def make_attend(
    tokens: Tokens,
    plan: Callable[[int], tuple[int | None, float, float | None]],
    *,
    width: int | None = None,
) -> Callable[[Array, Array, Array], Array]:
    """Queries [B T H K], keys and values [B T G K] to softmax(soft_cap(scale q k)) v over the keys each query sees.

    A query that sees no key (padding) reads 0.

    Args:
      plan: from the head dimension to window, scale and soft cap of the logits.
      width: tokens a block; None: as many as suit the platform.

    Raises:
      UserError: when called with rows that do not fit a TPU's VMEM.
    """
    T, here = tokens.ids.shape[1], platform()
    made: dict[int, Layout] = {}

    def attend(q: Array, k: Array, v: Array) -> Array:
        check_fits(here, T, q)
        K = q.shape[-1]
        fixed = Plan(*plan(K), kernels.width_of(here, T, K, q.dtype) if width is None else width)
        if fixed.width not in made:
            made[fixed.width] = layout_of(tokens, fixed.width, fixed.window)
        k, v = (_repeated(x, q.shape[2]) for x in (k, v))
        q, k, v = (rearrange(x, "b t h k -> b h t k") for x in (q, k, v))
        out: Any = _attend(fixed, here, q, k, v, made[fixed.width])
        return rearrange(out, "b h t k -> b t h k")

    return attend


def check_fits(here: Platform, T: int, q: Array) -> None:
    """Raises UserError where a TPU's kernels cannot hold rows of T tokens."""
    if not fits(here, T, q):
        raise UserError(
            f"model.attention=pallas holds whole rows of a head in a TPU's VMEM, and rows of {T} tokens with heads of "
            f"{q.shape[-1]} in {q.dtype} do not fit: set model.attention=auto or blocked, or make rows shorter"
        )


def fits(here: Platform, T: int, q: Array) -> bool:
    """Whether the kernels of a platform can hold rows of T tokens with the heads of these queries."""
    return here != "tpu" or kernels.fits(T, q.shape[-1], q.dtype)


def _repeated(x: Float[Array, "B T G K"], H: int) -> Array:
    """Keys or values with as many heads as the tensor axis has devices, where it divides the query heads but not these.

    Else every device would attend for all heads.
    """
    shards, G = mesh_axis_size("tensor"), x.shape[2]
    if G % shards and H % shards == 0 and shards % G == 0:
        return jnp.repeat(x, shards // G, 2)
    return x


def _whole(plan: Plan, here: Platform, x: Array) -> Array:
    """[B H T K] filled up with zeros to whole blocks of tokens and to a head dimension that the kernel has."""
    _, _, T, K = x.shape
    return jnp.pad(x, ((0, 0), (0, 0), (0, -T % plan.width), (0, kernels.head_dim_of(here, K) - K)))


def _on_one(plan: Plan, here: Platform, q: Array, k: Array, v: Array, layout: Layout) -> tuple[Array, Statistics]:
    """What each query reads, and its log-sum, of one device's rows and heads."""
    T, K = q.shape[2:]
    q, k, v = (_whole(plan, here, x) for x in (q, k, v))
    out, log_z = kernels.forward(plan, here, layout.keys.ravel(), layout.ids, q, k, v)
    return out[:, :, :T, :K], log_z[:, :, :T]


def _backward_on_one(
    plan: Plan,
    here: Platform,
    q: Array,
    k: Array,
    v: Array,
    layout: Layout,
    d_out: Array,
    log_z: Statistics,
    inner: Statistics,
) -> tuple[Array, Array, Array]:
    T, K = q.shape[2:]
    q, k, v, d_out = (_whole(plan, here, x) for x in (q, k, v, d_out))
    log_z, inner = (jnp.pad(x, ((0, 0), (0, 0), (0, q.shape[2] - T))) for x in (log_z, inner))
    d_q = kernels.d_query(plan, here, layout.keys.ravel(), layout.ids, q, k, v, d_out, log_z, inner)
    d_k, d_v = kernels.d_key(plan, here, layout.queries.ravel(), layout.ids, q, k, v, d_out, log_z, inner)
    return d_q[:, :, :T, :K], d_k[:, :, :T, :K], d_v[:, :, :T, :K]


def _folded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of batches, under whose vmap the new axis becomes part of the batch; a kernel's own rule would loop.

    Devices then divide the batch as if there were no vmap.
    """
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def rule(size: int, batched: Any, *arguments: Any) -> Any:
        def merged(x: Array, is_batched: bool) -> Array:
            whole = x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
            return whole.reshape(-1, *whole.shape[2:])

        out = folded(*jax.tree.map(merged, arguments, tuple(batched)))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return folded


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan: Plan, here: Platform, q: Array, k: Array, v: Array, layout: Layout) -> Array:
    return _forward(plan, here, q, k, v, layout)[0]


def _forward(plan: Plan, here: Platform, q: Array, k: Array, v: Array, layout: Layout) -> Any:
    divided = by_device(partial(_on_one, plan, here), (*[BY_HEAD] * 3, LAYOUT), (BY_HEAD, STATISTIC))
    out, log_z = _folded(divided)(q, k, v, layout)
    out, log_z = checkpoint_name(out, SAVED), checkpoint_name(log_z, SAVED)
    return out, (q, k, v, layout, out, log_z)


def _backward(plan: Plan, here: Platform, saved: Any, d_out: Array) -> Any:
    """Weights are made again from the saved log-sums, block by block."""
    q, k, v, layout, out, log_z = saved
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    axes = *[BY_HEAD] * 3, LAYOUT, BY_HEAD, STATISTIC, STATISTIC
    divided = by_device(partial(_backward_on_one, plan, here), axes, (BY_HEAD,) * 3)
    return *_folded(divided)(q, k, v, layout, d_out, log_z, inner), None


_attend.defvjp(_forward, _backward)
