"""mpo_jax.models.chunks: a map over the first chunks, its gradient, and nothing behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.models.chunks import map_first

SHARED = jax.random.normal(jax.random.key(0), (3, 4))
XS = jax.random.normal(jax.random.key(1), (5, 2, 3))
FIXED = jnp.arange(10).reshape(5, 2)


def function(shared, x, fixed):
    return jnp.tanh(x @ shared) * (0.1 * fixed[:, None])


@pytest.mark.parametrize("count", [0, 2, 5])
def test_values_and_gradients_are_those_of_a_map_over_the_first_chunks(count):
    weights = jax.random.normal(jax.random.key(2), (5, 2, 4))

    def ours(shared, xs, count):
        return (map_first(function, shared, xs, FIXED, count) * weights).sum()

    def wanted(shared, xs):
        out = jax.vmap(function, (None, 0, 0))(shared, xs[:count], FIXED[:count])
        return (out * weights[:count]).sum()

    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(SHARED, XS, jnp.asarray(count))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found, jax.value_and_grad(wanted, (0, 1))(SHARED, XS),
    )  # fmt: skip


def test_chunks_behind_the_count_are_not_computed():
    """They may hold anything: neither values nor gradients come from them."""
    xs = XS.at[3:].set(jnp.nan)
    total = lambda shared: map_first(function, shared, xs, FIXED, jnp.asarray(3)).sum()  # noqa: E731
    value, grad = jax.value_and_grad(total)(SHARED)
    assert np.isfinite(value) and np.isfinite(grad).all()
    assert (map_first(function, SHARED, xs, FIXED, jnp.asarray(3))[3:] == 0).all()
