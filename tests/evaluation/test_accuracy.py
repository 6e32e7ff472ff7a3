"""Accuracy with ties and intervals, and RewardBench's sections by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest

from mpo_jax.evaluation.accuracy import SECTIONS, Accuracy, RewardBench, by_group, unlike
from mpo_jax.evaluation.statistics import wilson


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (3, 7), (0, 20), (20, 20), (450, 1000)])
def test_wilson_is_scipy_s(right, total):
    expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson(right / total, total), (expected.low, expected.high), atol=1e-12)


def test_ties_count_half():
    found = Accuracy.of(np.asarray([2.0, 0.0, -1.0, 0.0, 0.5]))
    assert (found.mean, found.rows, found.ties) == (pytest.approx(0.6), 5, 2)
    assert found.margin == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx(wilson(0.6, 5))


def test_equal_weights_change_nothing_and_a_heavy_row_widens_the_interval():
    margin_B = np.asarray([1.0, 1.0, -1.0, 1.0])
    plain, equal = Accuracy.of(margin_B), Accuracy.of(margin_B, np.full(4, 3.0))
    assert (equal.mean, equal.low, equal.high) == pytest.approx((plain.mean, plain.low, plain.high))
    heavy = Accuracy.of(margin_B, np.asarray([1.0, 1.0, 3.0, 1.0]))
    assert heavy.mean == pytest.approx(0.5)
    assert (heavy.low, heavy.high) == pytest.approx(wilson(0.5, 36 / 12))


def test_groups_are_in_the_order_of_their_names():
    found = by_group(np.asarray([1.0, -1.0, 1.0]), ["b", "a", "b"])
    assert {name: (one.mean, one.rows) for name, one in found.items()} == {"a": (0, 1), "b": (1, 2)}
    assert list(found) == ["a", "b"]


def test_the_benchmark_s_weights():
    """Its 2985 rows, with 984 in the place of math-prm's 447."""
    sizes = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert sum(sizes.values()) - 984 + 447 == 2985


def test_sections_weigh_their_subsets_and_not_their_rows():
    subsets = ["math-prm"] * 2 + ["hep-go"] * 3 + ["mt-bench-hard"] + [None, "else"]
    found = RewardBench.of(np.asarray([1, -1, 1, 1, 1, 0, 1, 1]), subsets)
    assert found is not None
    assert {name: one.mean for name, one in found.subsets.items()} == {
        "mt-bench-hard": 0.5, "math-prm": 0.5, "hep-go": 1.0,
    }  # fmt: skip
    assert found.sections["Reasoning"].mean == pytest.approx((0.5 * 984 + 1.0 * 164) / (984 + 164))
    assert found.sections.keys() == {"Chat Hard", "Reasoning"}
    assert found.score is None and found.unknown == 2 and "math-prm" not in found.missing and "hep-js" in found.missing
    assert RewardBench.of(np.ones(2), [None, "else"]) is None


def test_the_score_is_the_mean_of_the_sections():
    subsets = ["mt-bench-easy", "mt-bench-hard", "donotanswer", "hep-go", "hep-go"]
    found = RewardBench.of(np.asarray([1, -1, 1, 1, -1]), subsets)
    assert found is not None and found.score is not None
    assert found.score[0] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    # shares of the rows: 1/4 three times, 1/8 twice
    assert found.score[1:] == pytest.approx(wilson(0.625, 1 / (3 / 16 + 2 / 64)))
    assert found.without_ties == found.score[0]
    tied = RewardBench.of(np.asarray([1, -1, 0, 1, 0]), subsets)
    assert tied is not None and tied.score is not None and tied.without_ties is not None
    assert (tied.score[0], tied.without_ties) == pytest.approx(((1 + 0 + 0.5 + 0.75) / 4, (1 + 0 + 0 + 0.5) / 4))
    assert found.to_dict()["score"] == dict(zip(("mean", "low", "high"), found.score, strict=True))


def test_a_label_differs_from_every_group_s_name():
    assert unlike("all", ["a", None]) == "all"
    assert unlike("all", ["all", "(all)"]) == "((all))"
