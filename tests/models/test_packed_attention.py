"""mpo_jax.models.packed_attention: XLA's attention under the same mask, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.data.packing import Packing, pack
from mpo_jax.data.tokens import Example
from mpo_jax.models import attention, packed_attention
from mpo_jax.models.spec import LayerSpec
from mpo_jax.types import Tokens
from tests.covering import the_rest_thorough
from tests.models.tiny import close


def tokens_of(packing: Packing, lengths: list[tuple[int, int, int]]) -> Tokens:
    """One micro-batch that holds examples of these lengths."""
    packed = pack([Example([1] * p, [[2] * a, [3] * b]) for p, a, b in lengths], packing, num_responses=2)
    assert packed.count == 1
    return packed.rows(jnp.asarray(0)).tokens


LAYOUTS = {
    "several examples a block": tokens_of(Packing(2, 300), [(20, 9, 30)] * 9),
    "an example over all blocks, rows of padding": tokens_of(Packing(3, 520), [(300, 150, 70), (8, 130, 1)]),
    "longer than a block each": tokens_of(Packing(1, 640), [(200, 20, 40), (90, 60, 70), (1, 100, 2)]),
}


@pytest.mark.parametrize(
    "spec", the_rest_thorough([LayerSpec(), LayerSpec(window=7), LayerSpec(soft_cap=2.0, scale=0.4)])
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_attention_under_the_whole_mask(name, spec):
    """Grouped heads; in the gradient only real tokens count, as what padding reads has no meaning."""
    tokens = LAYOUTS[name]
    B, T = tokens.ids.shape
    draw = lambda seed, heads: jax.random.normal(jax.random.key(seed), (B, T, heads, 6))  # noqa: E731
    inputs, weights = (draw(0, 4), draw(1, 2), draw(2, 2)), draw(3, 4)
    real = (tokens.segment > 0)[..., None, None]

    def total(implementation, inputs):
        out = jnp.where(real, attention.for_layer(tokens, spec, implementation)(*inputs), 0.0)
        return (out * weights).sum(), out

    (_, ours), grads = jax.jit(jax.value_and_grad(partial(total, "blocked"), has_aux=True))(inputs)
    (_, wanted), wanted_grads = jax.jit(jax.value_and_grad(partial(total, "xla"), has_aux=True))(inputs)
    close(ours, wanted, rtol=2e-5, atol=2e-6)
    jax.tree.map(partial(close, rtol=2e-5, atol=5e-6), grads, wanted_grads)


def test_keys_before_a_blocks_first_segment_are_left_out():
    """By hand, blocks of 128 columns: the second example begins at 260, in block 2; padding begins at 520."""
    tokens = tokens_of(Packing(1, 640), [(200, 20, 40), (90, 60, 70)])
    assert np.flatnonzero(np.diff(np.asarray(tokens.segment[0]))).tolist() == [259, 479]
    first = packed_attention.layout_of(tokens).first
    assert first.tolist() == [0, 0, 0, 2, 5]


def test_a_block_begins_where_the_first_of_its_rows_does():
    one = tokens_of(Packing(2, 384), [(200, 20, 40), (90, 60, 70), (20, 30, 20), (10, 20, 30)])
    each = [packed_attention.layout_of(jax.tree.map(lambda x, r=r: x[r : r + 1], one)).first for r in range(2)]
    assert packed_attention.layout_of(one).first.tolist() == np.minimum(*each).tolist()
