"""A function over chunks of columns, of which only the first ones, a number known at run time, hold anything."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def map_first(function: Callable[[Any, Any, Any], Any], shared: Any, xs: Any, fixed: Any, count: Int[Array, ""]) -> Any:
    """function(shared, x, f) for the first `count` of the C elements of `xs` and `fixed`; zeros behind them.

    Differentiable in `shared` and `xs`; the backward pass runs the function again, chunk by chunk, so that what it
    holds exists for one chunk at a time. `jax.lax.map` would run it for all C, and cannot be left early.

    Args:
      function: must close over no traced array.
      xs, fixed: pytrees of arrays [C ...].
    """
    return _forward(function, shared, xs, fixed, count)[0]


def at(tree: Any, i: Array) -> Any:
    """Element i of each array [C ...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def put(tree: Any, i: Array, values: Any) -> Any:
    """The arrays [C ...] with other values as their element i."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, values)


def _forward(function: Any, shared: Any, xs: Any, fixed: Any, count: Array) -> Any:
    each = jax.eval_shape(function, shared, *jax.tree.map(lambda x: x[0], (xs, fixed)))
    C = len(jax.tree.leaves(xs)[0])
    out = jax.tree.map(lambda x: jnp.zeros((C, *x.shape), x.dtype), each)

    def body(i: Array, out: Any) -> Any:
        return put(out, i, function(shared, at(xs, i), at(fixed, i)))

    return jax.lax.fori_loop(0, count, body, out), (shared, xs, fixed, count)


def _backward(function: Any, saved: Any, d_out: Any) -> Any:
    shared, xs, fixed, count = saved

    def body(i: Array, carried: tuple[Any, Any]) -> tuple[Any, Any]:
        d_shared, d_xs = carried
        pull = jax.vjp(lambda s, x: function(s, x, at(fixed, i)), shared, at(xs, i))[1]
        d_s, d_x = pull(at(d_out, i))
        return jax.tree.map(jnp.add, d_shared, d_s), put(d_xs, i, d_x)

    d_shared, d_xs = jax.lax.fori_loop(0, count, body, jax.tree.map(jnp.zeros_like, (shared, xs)))
    return d_shared, d_xs, None, None


map_first.defvjp(_forward, _backward)
