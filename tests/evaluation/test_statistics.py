"""Bootstrap over seeds and prompts, p-values, Holm's correction and verdicts; scipy and statsmodels as oracles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mpo_jax.evaluation.statistics import (
    bootstrap_p,
    holm,
    mean_and_se,
    paired_bootstrap,
    paired_difference,
    standard_errors,
    verdict,
)


def half_width(interval: tuple[float, ...]) -> float:
    return (interval[2] - interval[1]) / 2


@pytest.mark.parametrize("shared", [True, False])
def test_one_seed_is_the_plain_bootstrap_over_prompts(shared: bool) -> None:
    x = np.random.default_rng(0).gamma(2.0, 1.0, 300)
    mean, low, high, p = paired_bootstrap(x[None], shared_prompts=shared, resamples=40000, seed=1)
    theirs = stats.bootstrap(
        (x,), np.mean, n_resamples=40000, batch=4000, method="percentile", rng=np.random.default_rng(2)
    )
    interval, se = theirs.confidence_interval, mean_and_se(x)[1]
    assert (mean, p) == (pytest.approx(x.mean()), pytest.approx(2 / 40001))
    np.testing.assert_allclose([low, high], [interval.low, interval.high], atol=0.12 * se)


def test_a_paired_difference_is_the_case_of_one_seed() -> None:
    a, b = np.random.default_rng(3).normal(size=(2, 50))
    found = paired_difference(a, b, resamples=200, seed=4)
    mean, low, high, _ = paired_bootstrap([a - b], shared_prompts=True, resamples=200, seed=4)
    assert found == {"mean": pytest.approx(mean), "se": pytest.approx(stats.sem(a - b)), "low": low, "high": high}


def coverage(*, shared: bool, seeds: int = 5, seed_deviation: float = 0.0, data_sets: int = 400) -> float:
    """Share of intervals that hold 0, the truth, with 500 prompts, prompt deviation 1 and noise 0.5."""
    rng, held = np.random.default_rng(5), 0
    for _ in range(data_sets):
        prompt_SP = rng.normal(size=(1 if shared else seeds, 500))
        noise_SP = rng.normal(0, 0.5, (seeds, 500))
        difference_SP = rng.normal(0, seed_deviation, (seeds, 1)) + prompt_SP + noise_SP
        _, low, high, p = paired_bootstrap(difference_SP, shared_prompts=shared, resamples=400, seed=6)
        assert (p < 0.05) == (low > 0 or high < 0)
        held += low <= 0 <= high
    return held / data_sets


@pytest.mark.parametrize("shared", [True, False], ids=["crossed", "nested"])
def test_a_95_percent_interval_holds_the_truth_in_95_percent_of_data_sets(shared: bool) -> None:
    assert 0.92 <= coverage(shared=shared) <= 0.98


@pytest.mark.parametrize("shared", [True, False], ids=["crossed", "nested"])
def test_it_does_so_where_seeds_differ(shared: bool) -> None:
    assert 0.92 <= coverage(shared=shared, seed_deviation=0.3) <= 0.98


def test_crossed_data_taken_for_nested_miss_far_more() -> None:
    """The mistake that the two designs are there for: prompts that are shared do not average out over seeds."""
    rng, missed = np.random.default_rng(7), 0
    for _ in range(200):
        difference_SP = rng.normal(size=(1, 500)) + rng.normal(0, 0.5, (5, 500))
        _, low, high, _ = paired_bootstrap(difference_SP, shared_prompts=False, resamples=400, seed=8)
        missed += not low <= 0 <= high
    assert missed > 50


def test_errors_are_those_of_the_analysis_of_variance() -> None:
    """Crossed, by hand: seeds' means 1 and 3, prompts' means 0, 2, 4; residuals are 0, so no noise is taken off."""
    errors = standard_errors(np.asarray([[-1.0, 1.0, 3.0], [1.0, 3.0, 5.0]]), shared_prompts=True)
    assert errors.prompts == pytest.approx(2 / np.sqrt(3))
    assert errors.seeds == pytest.approx(np.sqrt(2.0 / 2))
    assert errors.total == pytest.approx(np.sqrt(4 / 3 + 1))
    # nested: each seed's mean has the error 2 / sqrt 3, which explains 4/3 of the variance 2 of the means
    errors = standard_errors(np.asarray([[-1.0, 1.0, 3.0], [1.0, 3.0, 5.0]]), shared_prompts=False)
    assert errors.prompts == pytest.approx(np.sqrt(2 * 4 / 3) / 2)
    assert errors.seeds == pytest.approx(np.sqrt((2 - 4 / 3) / 2))


@pytest.mark.thorough
def test_the_interval_has_the_width_of_its_errors() -> None:
    """Many seeds and prompts, where Student's t is near the normal: 1.96 total errors to each side."""
    rng = np.random.default_rng(9)
    x_SP = rng.normal(0, 0.2, (60, 1)) + rng.normal(size=(1, 300)) + rng.normal(0, 0.5, (60, 300))
    for shared in (True, False):
        found = paired_bootstrap(x_SP, shared_prompts=shared, resamples=8000, seed=10)
        total = standard_errors(x_SP, shared_prompts=shared).total
        assert half_width(found) == pytest.approx(1.96 * total, rel=0.05)
        assert found.mean == pytest.approx(x_SP.mean())


def test_seeds_with_prompts_of_their_own_may_have_more_or_fewer() -> None:
    rng = np.random.default_rng(11)
    groups = [rng.normal(shift, 1.0, size) for shift, size in ((0.0, 40), (1.0, 60), (3.0, 5))]
    found = paired_bootstrap(groups, shared_prompts=False, resamples=400, seed=12)
    # seeds weigh alike, whatever their numbers of prompts
    assert found.mean == pytest.approx(np.mean([group.mean() for group in groups]))
    with pytest.raises(ValueError, match="share prompts have equally many"):
        paired_bootstrap(groups, shared_prompts=True, resamples=400, seed=12)
    with pytest.raises(ValueError, match="there must be a seed"):
        paired_bootstrap([], shared_prompts=False, resamples=400, seed=12)


@pytest.mark.parametrize("shared", [True, False])
def test_what_cannot_be_known_is_no_evidence(shared: bool) -> None:
    """One prompt a seed says nothing of other prompts, and NaN compares with nothing."""
    for one in ([[1.0], [1.0]], [[1.0]]):
        found = paired_bootstrap(np.asarray(one), shared_prompts=shared, resamples=400, seed=0)
        assert (found.mean, found.low, found.high, found.p) == (1.0, -np.inf, np.inf, 1.0)
    for broken in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            paired_bootstrap(np.asarray([[broken, 1.0, 2.0]]), shared_prompts=shared, resamples=400, seed=0)
    with pytest.raises(ValueError, match="resamples=0"):
        paired_bootstrap(np.ones((1, 3)), shared_prompts=shared, resamples=0, seed=0)


def test_two_seeds_that_differ_say_little() -> None:
    """Student's t with 1 degree of freedom: 12.7 standard errors of the seeds to each side."""
    x_SP = np.asarray([[0.0], [1.0]]) + 0.001 * np.random.default_rng(13).normal(size=(2, 50))
    for shared in (True, False):
        found = paired_bootstrap(x_SP, shared_prompts=shared, resamples=2000, seed=14)
        assert half_width(found) == pytest.approx(12.7 * 0.5, rel=0.05)
        assert found.p > 0.05


def test_a_handful_of_prompts_has_student_s_interval() -> None:
    rng, held = np.random.default_rng(15), 0
    for _ in range(400):
        _, low, high, _ = paired_bootstrap(rng.normal(size=(1, 5)), shared_prompts=True, resamples=400, seed=16)
        held += low <= 0 <= high
    assert held > 0.92 * 400


def test_one_value_says_nothing_and_equal_values_leave_no_doubt() -> None:
    assert paired_bootstrap([[3.0]], shared_prompts=True, resamples=100, seed=0) == (3.0, -np.inf, np.inf, 1.0)
    found = paired_bootstrap(np.full((3, 7), 0.1), shared_prompts=True, resamples=100, seed=0)
    assert found == pytest.approx((0.1, 0.1, 0.1, 2 / 101))


def test_the_seed_of_the_resampling_alone_decides() -> None:
    x_SP = np.random.default_rng(17).normal(size=(3, 40))
    first, again, other = (paired_bootstrap(x_SP, shared_prompts=True, resamples=100, seed=s) for s in (0, 0, 1))
    assert first == again != other


def test_p_is_twice_the_smaller_tail_and_never_zero() -> None:
    assert bootstrap_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 * 1 / 4)
    assert bootstrap_p(np.array([-1.0, *[1.0] * 98])) == pytest.approx(2 * 2 / 100)
    assert bootstrap_p(-np.array([-1.0, *[1.0] * 98])) == pytest.approx(2 * 2 / 100)
    assert bootstrap_p(np.zeros(10)) == 1.0


def test_p_agrees_with_the_t_test_on_many_prompts() -> None:
    x = np.random.default_rng(9).normal(0.1, 1.0, 400)
    ours = paired_bootstrap([x], shared_prompts=True, resamples=20000, seed=10).p
    assert ours == pytest.approx(stats.ttest_1samp(x, 0.0).pvalue, rel=0.25)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels_s(p: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # statsmodels collects garbage in every call, which takes longer the more there is
        patch.setattr("gc.collect", lambda: 0)
        adjusted = multipletests(p, method="holm")[1]
    np.testing.assert_allclose(holm(p), adjusted, atol=1e-12)


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


def test_a_single_prompt_has_no_error_and_no_interval():
    found = paired_difference(np.array([2.0]), np.array([0.5]), resamples=100, seed=0)
    assert found == {"mean": 1.5, "se": None, "low": None, "high": None}
