"""mpo_jax.selection: ranking, the split and its thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpo_jax import selection
from tests.reference import selection as ref
from tests.reference.cases import normal

# few distinct values, so that ties happen
gaps = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.5]), max_size=12).map(lambda x: np.array(x, np.float32))
thresholds = st.sampled_from([-1.0, 0.0, 0.25, 0.4, 1.0, 2.0, 3.5, 9.0])


def as_set(easy) -> set[int]:
    return set(np.flatnonzero(easy).tolist())


@pytest.mark.parametrize(
    ("score", "order", "gap"),
    [
        ((2.0, 0.5), (0, 1), 1.5),
        ((0.5, 2.0), (1, 0), 1.5),
        ((-3.0, -1.0), (1, 0), 2.0),
        ((1.0, 1.0), (0, 1), 0.0),  # a tie keeps the sampled order
        ((0.0, -0.0), (0, 1), 0.0),
    ],
)
def test_rank(score, order, gap):
    order_BN, gap_B = selection.rank(jnp.array([score]))
    assert (tuple(order_BN[0].tolist()), float(gap_B[0])) == (order, gap)


def test_rank_agrees_with_the_reference_and_sorts():
    score = np.round(normal(0, 200, 2), 1)  # rounded, so that some pairs tie
    order_BN, gap_B = selection.rank(jnp.asarray(score))
    expected = ref.rank(score)
    np.testing.assert_array_equal(order_BN, [order for order, _ in expected])
    np.testing.assert_allclose(gap_B, [gap for _, gap in expected], rtol=1e-6, atol=1e-7)
    ranked_BN = np.take_along_axis(score, np.asarray(order_BN), -1)
    np.testing.assert_array_equal(ranked_BN[:, 0] - ranked_BN[:, 1], gap_B)
    assert (np.asarray(gap_B) == 0).any()


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_tie_is_half_right(kind):
    gaps = kind(np.asarray([2.0, 0.0, -0.0, -1.0, 1e-30, np.nan]))
    np.testing.assert_array_equal(selection.ordered_right(gaps), [1, 0.5, 0.5, 0, 1, 0])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_split_is_strict_and_unknown_gaps_are_hard(kind):
    gap_N = kind(np.array([0.0, 0.999, 1.0, 1.001, 2.0, np.nan, np.inf], np.float32))
    np.testing.assert_array_equal(selection.split(gap_N, 1.0), [0, 0, 0, 1, 1, 0, 1])


@given(gaps, thresholds, thresholds)
def test_splits_are_disjoint_cover_the_data_and_shrink_as_the_threshold_grows(gap_N, low, high):
    low, high = sorted((low, high))
    easy_low, easy_high = (as_set(selection.split(gap_N, t)) for t in (low, high))
    easy, hard = ref.split(gap_N, low)
    assert easy_low == set(easy)
    assert as_set(~selection.split(gap_N, low)) == set(hard)
    assert easy_high <= easy_low
    assert as_set(gap_N == low).isdisjoint(easy_low)


@pytest.mark.parametrize(
    ("gap", "fraction", "num_easy"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.5, 2),
        ([0.1, 0.2, 0.3, 0.4], 0.0, 0),
        ([0.1, 0.2, 0.3, 0.4], 1.0, 4),
        ([0.0, 0.0, 0.0, 0.0], 1.0, 4),  # gap 0 is easy only where all pairs are asked for
        ([0.1, 0.2, 0.3, 0.4], 0.74, 2),
        ([0.1, 0.3, 0.3, 0.3], 0.5, 0),  # equal gaps stay together
        (list(range(10)), 0.3, 3),  # 0.3 * 10 is below 3 in binary
        (list(range(100)), 0.29, 29),
        ([0.1, 0.2, float("nan"), 0.4], 0.25, 1),  # an unknown gap counts as a pair, and is hard
        ([float("nan")] * 2, 0.5, 0),
        ([], 0.5, 0),
    ],
)
def test_threshold_for_fraction(gap, fraction, num_easy):
    gap_N = np.array(gap, np.float32)
    assert selection.split(gap_N, selection.threshold_for_fraction(gap_N, fraction)).sum() == num_easy


@given(gaps, st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0]))
def test_threshold_for_fraction_is_the_best_of_all(gap_N, fraction):
    num_easy = selection.split(gap_N, selection.threshold_for_fraction(gap_N, fraction)).sum()
    assert num_easy == ref.threshold_for_fraction(gap_N.tolist(), fraction)


@pytest.mark.parametrize("fraction", [-0.1, 1.01, float("nan")])
def test_threshold_for_fraction_refuses_what_is_no_fraction(fraction):
    with pytest.raises(ValueError, match="easy_fraction"):
        selection.threshold_for_fraction(np.array([1.0]), fraction)


def score_row(params, row):
    """A small stand-in for a reward model: one prompt with its responses to one score a response."""
    return jnp.tanh(params["table"][row["response"]]).sum(-1) + params["table"][row["prompt"]].sum() * row["weight"]


PARAMS = {"table": normal(1, 11)}
ROWS = {
    "prompt": np.random.default_rng(0).integers(0, 11, (16, 4)),
    "response": np.random.default_rng(1).integers(0, 11, (16, 2, 6)),
    "weight": normal(2, 16),
}


def test_pair_scorer_equals_a_loop():
    params, rows = jax.tree.map(jnp.asarray, (PARAMS, ROWS))
    score_BN = selection.make_pair_scorer(score_row)(params, rows)
    looped = [score_row(params, jax.tree.map(lambda x, b=b: x[b], rows)) for b in range(16)]
    assert score_BN.shape == (16, 2)
    np.testing.assert_allclose(score_BN, np.stack(looped), rtol=1e-6, atol=1e-6)


def test_pair_scorer_ties_the_pair_axis_to_the_mesh():
    """A constraint inside the row function must not gather the pairs onto every device."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def constrained(params, row):
        return jax.lax.with_sharding_constraint(score_row(params, row), NamedSharding(mesh, PartitionSpec(None)))

    scorer = jax.jit(selection.make_pair_scorer(constrained, spmd_axis_name="data"))
    score_BN = scorer(*jax.tree.map(jnp.asarray, (PARAMS, ROWS)))
    assert score_BN.sharding.shard_shape(score_BN.shape) == (2, 2)
    expected = selection.make_pair_scorer(score_row)(*jax.tree.map(jnp.asarray, (PARAMS, ROWS)))
    np.testing.assert_allclose(score_BN, expected, rtol=1e-6, atol=1e-6)
