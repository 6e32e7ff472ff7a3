"""Bootstrap over seeds and prompts, p-values, Holm's correction and verdicts; scipy and statsmodels as oracles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mpo_jax.evaluation.statistics import bootstrap_p, holm, mean_and_se, resampled_means, verdict


def test_one_group_is_the_plain_bootstrap_over_prompts() -> None:
    x = np.random.default_rng(0).gamma(2.0, 1.0, 300)
    ours = resampled_means([x], resamples=4000, seed=1)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2))
    se = mean_and_se(x)[1]
    assert ours.mean() == pytest.approx(x.mean(), abs=0.1 * se)
    assert ours.std() == pytest.approx(theirs.standard_error, rel=0.05)
    interval = theirs.confidence_interval
    np.testing.assert_allclose(np.percentile(ours, [2.5, 97.5]), [interval.low, interval.high], atol=0.15 * se)


def test_spread_is_that_of_seeds_and_of_prompts_within_them() -> None:
    """Variance of the resampled mean: (variance of the seeds' means, and the mean of their prompts' / n) / seeds."""
    rng = np.random.default_rng(3)
    groups = [rng.normal(shift, 1.0, size) for shift, size in ((0.0, 40), (1.0, 60), (3.0, 50))]
    expected = (np.var([g.mean() for g in groups]) + np.mean([g.var() / len(g) for g in groups])) / 3
    drawn = resampled_means(groups, resamples=20000, seed=4)
    assert drawn.var() == pytest.approx(expected, rel=0.03)
    # seeds weigh alike, whatever their numbers of prompts
    assert drawn.mean() == pytest.approx(np.mean([g.mean() for g in groups]), abs=0.02)


def test_prompts_are_drawn_anew_where_a_seed_is_drawn_twice() -> None:
    """Two equal seeds give the spread of twice the prompts, which a shared draw would not."""
    x = np.random.default_rng(5).normal(size=100)
    two = resampled_means([x, x], resamples=20000, seed=6)
    assert two.var() == pytest.approx(x.var() / 200, rel=0.05)


def test_portions_change_nothing_in_distribution() -> None:
    """So many prompts that a group's draws are made in several portions: every resample still has its own mean."""
    x = np.random.default_rng(7).normal(size=50_000)
    drawn = resampled_means([x], resamples=200, seed=8)
    assert len(np.unique(drawn)) == 200
    assert drawn.std() == pytest.approx(x.std() / np.sqrt(len(x)), rel=0.2)


def test_p_is_twice_the_smaller_tail_and_never_zero() -> None:
    assert bootstrap_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 * 1 / 4)
    assert bootstrap_p(np.array([-1.0, *[1.0] * 98])) == pytest.approx(2 * 2 / 100)
    assert bootstrap_p(-np.array([-1.0, *[1.0] * 98])) == pytest.approx(2 * 2 / 100)
    assert bootstrap_p(np.zeros(10)) == 1.0


def test_p_agrees_with_the_t_test_on_many_prompts() -> None:
    x = np.random.default_rng(9).normal(0.1, 1.0, 400)
    ours = bootstrap_p(resampled_means([x], resamples=20000, seed=10))
    assert ours == pytest.approx(stats.ttest_1samp(x, 0.0).pvalue, rel=0.25)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels_s(p: list[float]) -> None:
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], atol=1e-12)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("mean", "p", "expected"),
    [
        (0.2, 0.049, "supported"),
        (-0.2, 0.049, "contradicted"),
        (0.2, 0.05, "undecided"),
        (-0.2, 0.9, "undecided"),
        (0.0, 0.001, "undecided"),
    ],
)
def test_verdict_needs_a_sign_and_a_small_p(mean: float, p: float, expected: str) -> None:
    assert verdict(mean, p) == expected
