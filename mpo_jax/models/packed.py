"""Sums over the micro-batches of a packed batch, in a loop whose length is known at run time: one program for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mpo_jax.types import Packed

Sums = TypeVar("Sums")


def packed_in(batch: Any) -> Packed | None:
    """The packed batch in an objective's input; None if rows are padded."""
    leaves = jax.tree.leaves(batch, is_leaf=_is_packed)
    return next(filter(_is_packed, leaves), None)


def sum_over(function: Callable[[Any], Sums], batch: Any, *, keep: Callable[[Sums], Sums] = lambda x: x) -> Sums:
    """function(rows) for every micro-batch, added up: rows are the batch with `PackedRows` in place of its `Packed`.

    A padded batch is its only micro-batch.

    Args:
      keep: lays the running sums out over the mesh; nothing else would tell the compiler how zeros are divided.
    """
    packed = packed_in(batch)
    if packed is None:
        return function(batch)
    # traced once: the loop finds what the shapes were read off
    once: Callable[[Any], Sums] = jax.jit(function, inline=True)
    each = jax.eval_shape(lambda: once(_rows(batch, jnp.asarray(0))))
    none = keep(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), each))

    def add(m: Int[Array, ""], sums: Sums) -> Sums:
        return jax.tree.map(jnp.add, sums, once(_rows(batch, m)))

    return jax.lax.fori_loop(0, packed.count, add, none)


def sum_at_once(function: Callable[[Any], Sums], batch: Any) -> Sums:
    """`sum_over` for what hardly costs anything, of all micro-batches at the same time; empty ones must add nothing.

    Sums over the mesh's devices are then made once, and not for each micro-batch.
    """
    packed = packed_in(batch)
    if packed is None:
        return function(batch)
    parts = jax.vmap(lambda m: function(_rows(batch, m)))(jnp.arange(len(packed.ids)))
    return jax.tree.map(lambda x: x.sum(0), parts)


def _rows(batch: Any, m: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda x: x.rows(m) if _is_packed(x) else x, batch, is_leaf=_is_packed)


def _is_packed(node: Any) -> bool:
    return isinstance(node, Packed)
