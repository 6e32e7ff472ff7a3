"""Every draw is NumPy's, in any order of kinds; a change of NumPy's own would show here."""

import numpy as np
import pytest

from mpo_jax.data.draws import BLOCK, Draws


@pytest.mark.parametrize("seed", [0, 7, (3, 1)])
def test_draws_are_those_of_numpy(seed):
    ours, theirs, order = Draws(seed), np.random.default_rng(seed), np.random.default_rng(5)
    for _ in range(2 * BLOCK):
        limit = int(order.integers(1, 20))
        count = int(order.integers(0, limit + 1))
        match order.integers(3):
            case 0:
                assert ours.random() == theirs.random()
            case 1:
                assert ours.below(limit) == theirs.integers(limit)
            case _:
                assert ours.distinct(limit, count) == theirs.choice(limit, count, replace=False).tolist()


@pytest.mark.parametrize("limit", [2**31 + 1, 3 * 2**30, 2**32 - 1])
def test_draws_that_are_rejected(limit):
    """Up to half of all words are, at these limits."""
    ours, theirs = Draws(1), np.random.default_rng(1)
    assert [ours.below(limit) for _ in range(500)] == theirs.integers(limit, size=500).tolist()
    assert ours.random() == theirs.random()
