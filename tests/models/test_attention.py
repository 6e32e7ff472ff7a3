"""mpo_jax.models.attention: blocks cover what is seen, and give what one masked softmax over the whole row gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_jax.errors import UserError
from mpo_jax.models import attention
from mpo_jax.models.spec import LayerSpec
from mpo_jax.types import Tokens
from tests.covering import the_rest_thorough
from tests.models.tiny import batch, close, join

# how fast these programs run does not matter, and what they hold in memory is tested elsewhere
K = 6

rows = st.tuples(st.integers(0, 300), st.integers(1, 4), st.integers(1, 600))


# one program, where each operation would be one
sees = jax.jit(attention.sees, static_argnums=2)


def attend(q, k, v, tokens, window=None, **options):
    return jax.jit(attention.make_attend(tokens, window, **options))(q, k, v)


@given(rows)
def test_blocks_are_a_partition_of_the_queries(row):
    prompt, responses, size = row
    plan = attention.blocks(prompt + responses * size, prompt, responses)
    assert [b.begin for b in plan] == [0, *(b.end for b in plan[:-1])] and plan[-1].end == prompt + responses * size
    assert len(plan) <= attention.MAX_BLOCKS * (responses + 1)
    for block in plan:
        assert block.end - block.begin <= max(attention.MIN_BLOCK, -(-max(prompt, size) // attention.MAX_BLOCKS))


@settings(max_examples=8)
@given(st.tuples(st.integers(1, 300), st.integers(1, 3), st.integers(1, 300)), st.sampled_from([None, 40]))
def test_no_seen_key_is_left_out_and_few_hidden_ones_are_multiplied(row, window):
    prompt, responses, size = row
    joined = batch([prompt], [[size] * responses], width=(prompt, size))
    tokens = join(joined)
    seen = np.asarray(sees(tokens, tokens, window))[0]
    covered = np.zeros_like(seen)
    for block in attention.blocks(seen.shape[1], tokens.scored_from, tokens.num_responses):
        for begin, end in block.keys:
            covered[block.begin : block.end, begin:end] = True
    assert not (seen & ~covered).any()
    if window is None:
        assert (covered & ~seen).sum() <= len(seen) * 1.5 * max(attention.MIN_BLOCK, max(prompt, size) // 8)


def case(prompt_len, response_len, width, heads, groups, dtype=np.float32):
    tokens = join(batch(prompt_len, response_len, width=width))
    rng = np.random.default_rng(0)
    B, T = tokens.ids.shape
    q, k, v, weight = (jnp.asarray(rng.normal(size=(B, T, n, K)), dtype) for n in (heads, groups, groups, heads))
    return tokens, (q, k, v), weight * (tokens.segment > 0)[..., None, None]


def whole(q, k, v, tokens, window, scale=None, soft_cap=None):
    """One softmax over the row, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    repeat = q.shape[2] // k.shape[2]
    scores = np.einsum("bthk,bshk->bhts", q, k.repeat(repeat, 2)) * (K**-0.5 if scale is None else scale)
    scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
    seen = np.asarray(sees(tokens, tokens, window))[:, None]
    scores = np.where(seen, scores, -1e300)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", p / p.sum(-1, keepdims=True), v.repeat(repeat, 2))


CASES: dict[str, Any] = {
    "shared prompt": ([130, 7], [[150, 3], [149, 150]], (130, 150), 4, 4, LayerSpec()),
    "plain": ([300, 1], [[140], [2]], (300, 140), 4, 2, LayerSpec()),
    "three responses, one kv head": ([3, 16], [[200, 1, 64], [5, 200, 0]], (16, 200), 4, 1, LayerSpec()),
    "window": ([130, 7], [[150, 3], [149, 150]], (130, 150), 4, 2, LayerSpec(window=37, scale=0.7)),
    "soft cap": ([13, 7], [[150, 3], [149, 150]], (13, 150), 4, 2, LayerSpec(window=37, scale=1.1, soft_cap=1.5)),
}


@pytest.mark.parametrize("name", the_rest_thorough(CASES, 2))
def test_equals_one_softmax_over_the_row(name):
    """Also in XLA's implementation, whose gradients are not written by hand."""
    *sizes, spec = CASES[name]
    tokens, qkv, weight = case(*sizes)
    real = np.asarray(tokens.segment)[..., None, None] > 0
    blocked, plain = (attention.for_layer(tokens, spec, implementation) for implementation in ("blocked", "xla"))
    wanted = whole(*qkv, tokens, spec.window, spec.scale, spec.soft_cap)
    for attended in (blocked, plain):
        close(np.where(real, jax.jit(attended)(*qkv), 0), np.where(real, wanted, 0), atol=1e-5)

    def gradients(attend):
        return jax.jit(jax.grad(lambda q, k, v: (attend(q, k, v) * weight).sum(), (0, 1, 2)))(*qkv)

    for found, expected in zip(gradients(blocked), gradients(plain), strict=True):
        close(found, expected, atol=2e-5)


def test_gradients_under_a_soft_cap_equal_differences():
    """Central differences in float64, where logits are far into the cap's bend."""
    tokens, qkv, weight = case([3], [[2, 4]], (3, 4), 2, 1)
    options, weight64 = {"window": 3, "scale": 1.3, "soft_cap": 0.8}, np.asarray(weight, np.float64)
    grads = jax.jit(jax.grad(lambda *x: (attend(*x, tokens, **options) * weight).sum(), (0, 1, 2)))(*qkv)
    for which, grad in enumerate(grads):
        for place in np.ndindex(grad.shape):
            inputs = [np.asarray(x, np.float64).copy() for x in qkv]
            totals = []
            for sign in (1, -1):
                inputs[which][place] = float(qkv[which][place]) + sign * 1e-5
                totals.append((whole(*inputs, tokens, **options) * weight64).sum())
            assert abs(float(grad[place]) - (totals[0] - totals[1]) / 2e-5) < 1e-5


def test_cudnn_cannot_cap():
    tokens, *_ = case([3], [[2]], (3, 2), 2, 1)
    with pytest.raises(UserError, match=r"model\.attention=cudnn cannot cap .* at 50\.0: set model\.attention=blocked"):
        attention.for_layer(tokens, LayerSpec(soft_cap=50.0), "cudnn")


def test_packed_rows_are_parted_by_segment():
    """Two sequences in one row without a prompt's stretch: each sees itself alone."""
    ones = np.ones((1, 9), np.int32)
    segment = np.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 0]])
    position = np.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 0]])
    tokens = Tokens(ones, position, segment, 0 * ones, ones > 0)
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 9, 2, K)), jnp.float32) for _ in range(3))
    out = attend(q, k, v, tokens)
    for begin in (0, 4):
        part = jax.tree.map(lambda x, b=begin: x[:, b : b + 4], tokens)
        cut = (x[:, begin : begin + 4] for x in (q, k, v))
        close(out[:, begin : begin + 4], attend(*cut, part), atol=1e-6)


def test_rows_that_see_nothing_are_finite():
    tokens, qkv, weight = case([0, 5], [[0], [3]], (5, 4), 2, 2)
    grads = jax.jit(jax.grad(lambda *x: (attend(*x, tokens) * weight).sum(), (0, 1, 2)))(*qkv)
    assert all(np.isfinite(x).all() for x in grads) and np.isfinite(attend(*qkv, tokens)).all()


def test_bfloat16_keeps_its_type_and_sums_in_float32():
    tokens, qkv, weight = case([30], [[100]], (30, 100), 4, 2, jnp.bfloat16)
    out = attend(*qkv, tokens)
    assert out.dtype == jnp.bfloat16
    close(out.astype(jnp.float32), whole(*qkv, tokens, None), atol=2e-2)
    grads = jax.jit(jax.grad(lambda *x: (attend(*x, tokens) * weight).sum().astype(jnp.float32), (0, 1, 2)))
    assert {x.dtype for x in grads(*qkv)} == {jnp.dtype(jnp.bfloat16)}


def test_a_checkpointed_layer_does_not_attend_again():
    """What the backward pass needs is saved by name: one exponential a block forward, one backward, none between."""
    tokens, qkv, weight = case([0], [[100]], (0, 100), 2, 2)

    def count(policy):
        saving = jax.checkpoint(attention.make_attend(tokens), policy=policy)
        text = jax.jit(jax.grad(lambda *x: (saving(*x) ** 2 * weight).sum(), (0, 1, 2))).lower(*qkv).as_text()
        return text.count("stablehlo.exponential")

    policies = jax.checkpoint_policies
    assert count(policies.save_only_these_names(attention.SAVED)) == 2
    assert count(policies.nothing_saveable) == 3
