"""Intervals and agreement against hand tables and published numbers."""

import sys

import numpy as np
import pytest

from mpo_jax.errors import UserError
from mpo_jax.evaluation.verdicts import Tally, band, by_category, compare, fleiss_kappa, plurality, rate

FLEISS = np.asarray(
    [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]
)  # fmt: skip
"""The table of ten items and fourteen raters by which Fleiss' kappa is usually explained; its kappa is 0.210."""


def wilson(count, total, z=1.959963984540054):
    p, share = count / total, z * z / total
    middle = (p + share / 2) / (1 + share)
    half = z / (1 + share) * np.sqrt(p * (1 - p) / total + share / (4 * total))
    return middle - half, middle + half


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (1, 1), (61, 100)])
def test_wilson_s_interval(count, total):
    found = rate(count, total)
    assert found.value == count / total
    np.testing.assert_allclose((found.low, found.high), wilson(count, total), atol=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_tallies():
    outcomes = ["win", None, "lose", "win", "tie", None]
    tally = Tally.of(outcomes)
    assert tally == Tally(2, 1, 1, without=2) and tally.decided == 4
    assert tally.rates()["win"].value == 0.5 and rate(0, 0) is None
    assert Tally.of([None]).to_dict()["rates"] == {"win": None, "tie": None, "lose": None}
    found = by_category(["b", None, "b", "a", None, "a"], outcomes)
    assert found == {"a": Tally(1, 0, 0, without=1), "b": Tally(1, 0, 1)} and list(found) == ["a", "b"]
    assert by_category([None, None], ["win", "tie"]) == {} == by_category(["a", "a"], ["win", "tie"])
    assert by_category(["a", None], ["win", "tie"]) == {"a": Tally(1, 0, 0)}


def test_comparison_and_plurality():
    assert [compare(*pair) for pair in ((2, 1), (1, 1), (1, 2))] == ["win", "tie", "lose"]
    assert plurality(["win", "lose", "win"]) == "win" and plurality(["tie", "lose", "lose"]) == "lose"
    assert plurality(["win", "lose"]) == plurality(["win", "lose", "tie"]) == plurality(["tie"]) == "tie"


def test_kappa_of_the_published_table():
    found = fleiss_kappa(FLEISS, resamples=200, seed=0)
    assert round(found.value, 3) == 0.210 and found.band == "fair"
    assert found.low < found.value < found.high
    assert found == fleiss_kappa(FLEISS, resamples=200, seed=0) != fleiss_kappa(FLEISS, resamples=200, seed=1)


def test_kappa_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.stats", None)
    with pytest.raises(UserError, match="pip install statsmodels"):
        fleiss_kappa(FLEISS, resamples=1, seed=0)


def test_unanimity_is_one():
    """Also where all items are in one category, for which the equation is 0 / 0."""
    for table in ([[3, 0, 0]] * 4, [[3, 0, 0], [0, 3, 0], [0, 0, 3]]):
        found = fleiss_kappa(np.asarray(table), resamples=100, seed=0)
        assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1)) and found.band == "almost perfect"


def test_bootstrap_covers_the_truth():
    """Votes at random have kappa 0: of 40 such tables about two intervals miss it, and fewer than seven."""
    rng = np.random.default_rng(0)
    missed = 0
    for seed in range(40):
        table = rng.multinomial(4, [0.4, 0.2, 0.4], size=60)
        found = fleiss_kappa(table, resamples=200, seed=seed)
        missed += not found.low <= 0 <= found.high
    assert missed < 7


@pytest.mark.parametrize(
    ("kappa", "word"),
    [(-0.01, "poor"), (0.0, "slight"), (0.2, "slight"), (0.21, "fair"), (0.4, "fair"), (0.6, "moderate"),
     (0.8, "substantial"), (0.81, "almost perfect"), (1.0, "almost perfect"), (1.0 + 1e-12, "almost perfect")],
)  # fmt: skip
def test_bands(kappa, word):
    assert band(kappa) == word
