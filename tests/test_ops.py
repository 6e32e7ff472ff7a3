"""mpo_jax.ops: hand tables, the NumPy reference, an independent library, and relations between functions."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpo_jax import ops
from tests.reference import rl
from tests.reference.cases import MASK, normal, poison

RLAX = json.loads((Path(__file__).parent / "fixtures" / "gae.json").read_text())
SHAPE = (3, 6)  # one shape for all properties, so that each operation compiles once


def floats(bound: float, shape=SHAPE):
    return hnp.arrays(np.float32, shape, elements=st.floats(-bound, bound, width=32))


masks = hnp.arrays(np.bool_, SHAPE)


def close(actual, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol)


# mask and raw score of a response, then what comes of them; `carry` is where rewards are
LOGP, REF_LOGP, VALUE = [-1.0, -2.0, -0.5, -4.0], [-1.1, -1.5, -0.7, -3.0], [0.1, 0.2, 0.3, 0.4]
GOLDEN = {
    "eos": {
        "mask": [1, 1, 1, 0], "score": 1.5, "ds_chat": False, "carry": [1, 1, 1, 0],
        "reward": [-0.01, 0.05, 1.48, 0.0], "advantage": [1.29745, 1.271, 1.18, 0.0],
        "returns": [1.39745, 1.471, 1.48, 0.0],
    },
    "eos, ds_chat": {
        "mask": [1, 1, 1, 0], "score": 1.5, "ds_chat": True, "carry": [1, 1, 1, 1],
        "reward": [-0.01, 0.05, -0.02, 1.6], "advantage": [1.33355, 1.309, 1.22, 1.2],
        "returns": [1.43355, 1.509, 1.52, 1.6],
    },
    "full": {
        "mask": [1, 1, 1, 1], "score": -7.0, "ds_chat": False, "carry": [1, 1, 1, 1],
        "reward": [-0.01, 0.05, -0.02, -4.9], "advantage": [-4.2393875, -4.55725, -4.955, -5.3],
        "returns": [-4.1393875, -4.35725, -4.655, -4.9],
    },
}  # fmt: skip
GOLDEN["full, ds_chat"] = GOLDEN["full"] | {"ds_chat": True}


@pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN.keys())
def test_golden_ppo(case):
    logp_BT, ref_BT, value_BT = (jnp.array([x]) for x in (LOGP, REF_LOGP, VALUE))
    mask_BT, score_B = jnp.array([case["mask"]], bool), jnp.array([case["score"]])
    if case["ds_chat"]:
        reward_BT, carry_BT = ops.shape_rewards_ds_chat(logp_BT, ref_BT, score_B, mask_BT, kl_coef=0.1, clip=5.0)
    else:
        reward_BT, carry_BT = ops.shape_rewards(logp_BT, ref_BT, score_B, mask_BT, kl_coef=0.1, clip=5.0), mask_BT
    advantage_BT, returns_BT = ops.gae(reward_BT, value_BT, carry_BT, gamma=1.0, gae_lambda=0.95)
    np.testing.assert_array_equal(carry_BT, np.array([case["carry"]], bool))
    close(reward_BT, [case["reward"]])
    close(advantage_BT, [case["advantage"]])
    close(returns_BT, [case["returns"]])


def test_golden_whitening():
    x_BT, mask_BT = jnp.array([[1.0, 2, 3], [4, 5, 99]]), jnp.array([[True] * 3, [True, True, False]])
    expected = np.array([[-1.2649, -0.6325, 0.0], [0.6325, 1.2649, 0.0]])
    close(ops.whiten(x_BT, mask_BT), expected, atol=5e-5)
    close(ops.whiten(x_BT, mask_BT, shift_mean=False), (expected + 3.0) * np.asarray(mask_BT), atol=5e-5)


A, B, C = (normal(seed, *MASK.shape) * 2 for seed in (1, 2, 3))
SCORE = normal(4, len(MASK)) * 8  # wide enough that some scores are clipped
SHAPING = {"kl_coef": 0.3, "clip": 5.0}
# name: (function of (a, b, c, mask), its reference); all that an output holds must ignore dropped tokens
MASKED = {
    "masked_sum": (lambda a, b, c, m: ops.masked_sum(a, m), lambda a, b, c, m: rl.masked_sum(a, m)),
    "masked_mean": (lambda a, b, c, m: ops.masked_mean(a, m), lambda a, b, c, m: rl.masked_mean(a, m)),
    "whiten": (lambda a, b, c, m: ops.whiten(a, m), lambda a, b, c, m: rl.whiten(a, m)),
    "whiten, mean kept": (
        lambda a, b, c, m: ops.whiten(a, m, shift_mean=False),
        lambda a, b, c, m: rl.whiten(a, m, shift_mean=False),
    ),
    "shape_rewards": (
        lambda a, b, c, m: ops.shape_rewards(a, b, jnp.asarray(SCORE), m, **SHAPING),
        lambda a, b, c, m: rl.shape_rewards(a, b, SCORE, m, **SHAPING),
    ),
    "gae": (lambda a, b, c, m: ops.gae(a, b, m), lambda a, b, c, m: rl.gae(a, b, m)),
    "gae, discounted": (
        lambda a, b, c, m: ops.gae(a, b, m, gamma=0.9, gae_lambda=0.5),
        lambda a, b, c, m: rl.gae(a, b, m, gamma=0.9, gae_lambda=0.5),
    ),
    "explained_variance": (
        lambda a, b, c, m: ops.explained_variance(a, b, m),
        lambda a, b, c, m: rl.explained_variance(a, b, m),
    ),
}
masked_functions = pytest.mark.parametrize("name", MASKED)


@masked_functions
def test_agrees_with_the_reference_and_ignores_garbage_at_dropped_tokens(name):
    ours, reference = MASKED[name]
    dirty = [jnp.asarray(poison(x, MASK)) for x in (A, B, C)]
    for actual, expected in zip(
        jax.tree.leaves(ours(*dirty, jnp.asarray(MASK))), jax.tree.leaves(reference(A, B, C, MASK)), strict=True
    ):
        close(actual, expected, atol=1e-5)


@masked_functions
def test_garbage_at_dropped_tokens_leaks_into_no_gradient(name):
    def total(*x):
        # squared, so that the gradient depends on the values
        return sum((jnp.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(MASKED[name][0](*x, jnp.asarray(MASK))))

    clean = jax.grad(total, argnums=(0, 1))(*(jnp.asarray(np.where(MASK, x, 0)) for x in (A, B, C)))
    dirty = jax.grad(total, argnums=(0, 1))(*(jnp.asarray(poison(x, MASK)) for x in (A, B, C)))
    for clean_BT, dirty_BT in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(dirty_BT, clean_BT)
        assert not np.asarray(dirty_BT)[~MASK].any()
    assert any(np.asarray(g)[MASK].any() for g in dirty)


@masked_functions
def test_rows_without_a_token_are_zero(name):
    nothing = jnp.zeros(MASK.shape, bool)
    for leaf in jax.tree.leaves(MASKED[name][0](*(jnp.asarray(poison(x, nothing)) for x in (A, B, C)), nothing)):
        assert not np.asarray(leaf).any()


@pytest.mark.parametrize("side", ["left", "right"])
@masked_functions
def test_extra_padding_changes_nothing(name, side):
    width = ((0, 0), (3, 0) if side == "left" else (0, 3))
    cut = slice(3, None) if side == "left" else slice(None, -3)
    args = (A, B, C, MASK)
    plain = jax.tree.leaves(MASKED[name][0](*map(jnp.asarray, args)))
    padded = jax.tree.leaves(MASKED[name][0](*(jnp.pad(jnp.asarray(x), width) for x in args)))
    for x, y in zip(plain, padded, strict=True):
        close(y[:, cut] if y.ndim == 2 else y, x)


def test_shape_rewards_ds_chat_agrees_with_the_reference():
    reward, carry = rl.shape_rewards_ds_chat(A, B, SCORE, MASK, **SHAPING)
    dirty = [jnp.asarray(poison(x, carry)) for x in (A, B)]
    actual_BT, carry_BT = ops.shape_rewards_ds_chat(*dirty, jnp.asarray(SCORE), jnp.asarray(MASK), **SHAPING)
    np.testing.assert_array_equal(carry_BT, carry)
    close(actual_BT, reward)
    assert (carry != MASK).sum() == 3  # three rows have room for one more token


def test_last_index():
    np.testing.assert_array_equal(ops.last_index(jnp.asarray(MASK)), [6, 3, 6, 5, 3, 0])
    np.testing.assert_array_equal(ops.last_index(jnp.asarray(MASK)), rl.last_index(MASK))


@pytest.mark.parametrize("case", RLAX["cases"], ids=lambda case: f"{len(case['reward'])} tokens")
def test_gae_agrees_with_rlax(case):
    """rlax's truncated_generalized_advantage_estimation, recorded; ours sees each row behind two dropped tokens."""
    reward_BT, value_BT = (jnp.asarray([[jnp.nan, jnp.inf, *case[name]]]) for name in ("reward", "value"))
    mask_BT = jnp.asarray([[False, False] + [True] * len(case["reward"])])
    advantage_BT, _ = ops.gae(reward_BT, value_BT, mask_BT, gamma=case["discount"], gae_lambda=case["trace"])
    close(advantage_BT[0, 2:], case["advantage"])


@pytest.mark.thorough
@given(floats(4), floats(4), masks)
def test_gae_with_trace_one_is_future_reward_minus_value(reward, value, mask):
    advantage_BT, returns_BT = ops.gae(*map(jnp.asarray, (reward, value, mask)), gamma=1.0, gae_lambda=1.0)
    future = np.cumsum(np.where(mask, reward, 0.0)[:, ::-1].astype(np.float64), -1)[:, ::-1]
    close(advantage_BT, np.where(mask, future - value, 0.0), atol=1e-5)
    close(returns_BT, np.where(mask, future, 0.0), atol=1e-5)


@pytest.mark.thorough
@given(floats(4), floats(4), masks, st.sampled_from([0.0, 0.5, 1.0]))
def test_gae_with_trace_zero_is_the_temporal_difference(reward, value, mask, gamma):
    advantage_BT, _ = ops.gae(*map(jnp.asarray, (reward, value, mask)), gamma=gamma, gae_lambda=0.0)
    for b in range(SHAPE[0]):
        next_value = np.append(value[b, mask[b]][1:], 0.0)  # empty rows have no token to compare
        delta = reward[b, mask[b]] + gamma * next_value[: mask[b].sum()] - value[b, mask[b]]
        close(advantage_BT[b, mask[b]], delta, atol=1e-5)


@given(floats(4), masks)
def test_whitened_tokens_have_mean_zero_and_unit_variance(x, mask):
    kept = x[mask].astype(np.float64)
    assume(kept.size > 1 and kept.std() > 1e-2)
    white = np.asarray(ops.whiten(jnp.asarray(x), jnp.asarray(mask)))[mask].astype(np.float64)
    # centring loses up to |x| eps of each number, which dividing by the deviation magnifies
    close([white.mean(), white.std(ddof=1)], [0.0, 1.0], atol=1e-6 * (1 + np.abs(kept).max() / kept.std()))
    kept_mean = np.asarray(ops.whiten(jnp.asarray(x), jnp.asarray(mask), shift_mean=False))[mask]
    close(kept_mean - white, kept.mean(), atol=1e-5)


@given(floats(3, (8,)), floats(3, (8,)))
def test_kl_estimators_are_unbiased_and_k2_k3_never_negative(logits, ref_logits):
    """The vocabulary is small enough to take the expectation under the policy by enumeration."""
    logp_V, ref_V = jax.nn.log_softmax(jnp.asarray(logits)), jax.nn.log_softmax(jnp.asarray(ref_logits))
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (logits, ref_logits))
    exact = (p * np.log(p / q)).sum()
    k1, k2, k3 = (np.asarray(k(logp_V, ref_V), np.float64) for k in (ops.kl_k1, ops.kl_k2, ops.kl_k3))
    close((p * k1).sum(), exact, atol=1e-5)
    close((p * k3).sum(), exact, atol=1e-5)
    close(k2, k1**2 / 2)
    assert (k2 >= 0).all()
    assert (k3 >= -np.finfo(np.float32).eps * np.abs(k1)).all()  # k1's own rounding
    assert not np.asarray([k(logp_V, logp_V) for k in (ops.kl_k1, ops.kl_k2, ops.kl_k3)]).any()


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.2), (6.6, 0.2 * 1.00064), (60.0, 0.2 * 1.00128), (5.4, 0.2 * 0.99936), (0.0, 0.2 * 0.99872)],
)
def test_adaptive_kl_moves_towards_the_target_by_a_bounded_step(kl, expected):
    options = {"target": 6.0, "horizon": 10000.0, "num_samples": 64}
    close(ops.adaptive_kl_coef(jnp.array(0.2), jnp.array(kl), **options), expected, rtol=1e-6)
    close(rl.adaptive_kl_coef(0.2, kl, **options), expected, rtol=1e-12)


def test_explained_variance_of_perfect_and_of_constant_values():
    mask_BT, returns_BT = jnp.asarray(MASK), jnp.asarray(A)
    close(ops.explained_variance(returns_BT, returns_BT, mask_BT), 1.0)
    close(ops.explained_variance(jnp.ones_like(returns_BT), returns_BT, mask_BT), 0.0)
    assert ops.explained_variance(returns_BT, jnp.ones_like(returns_BT), mask_BT) == 0.0  # returns do not vary


def test_signatures_are_checked():
    """A guard on the test set-up itself: shapes that disagree are refused where the hook is installed."""
    with pytest.raises(jaxtyping.TypeCheckError, match="mask_BT"):
        ops.masked_sum(jnp.zeros((2, 3)), jnp.ones((2, 4), bool))
