"""From answers to win, tie, lose: averages over orders, and nothing made of an answer that cannot be read."""

import dataclasses

import numpy as np
import pytest
import statsmodels.api as sm

from mpo_jax.evaluation.answers import Pair
from mpo_jax.tools.judge.calls import Call, Failure, Reply
from mpo_jax.tools.judge.verdict import Grade, Judged, grade, places, summary
from tests.tools.judge.server import scores

UNREAD, FAILED = Reply("no idea"), Failure("500")


def judged(*outcomes, category=None):
    """A pair from the answers with A first, and then with B first."""
    calls = [Call(0, swapped, "", "") for swapped in (False, True)]
    grades = tuple(grade(call, outcome) for call, outcome in zip(calls, outcomes, strict=False))
    return Judged(Pair("p", "a", "b", category), grades)


def says(first, second):
    return Reply(scores(first, second))


@pytest.mark.parametrize(
    ("outcomes", "totals", "outcome", "status"),
    [
        ((says(8, 7), says(7, 8)), (8.0, 7.0), "win", "ok"),
        ((says(9, 7), says(8, 7)), (8.0, 7.5), "win", "ok"),  # each order prefers response 1, the first one more
        ((says(8, 7), says(8, 7)), (7.5, 7.5), "tie", "ok"),
        ((says(0, 0.5), says(1, 1)), (0.5, 0.75), "lose", "ok"),
        ((says(8, 7),), (8.0, 7.0), "win", "ok"),
        ((says(8, 7), UNREAD), None, None, "unparsed"),
        ((UNREAD, UNREAD), None, None, "unparsed"),
        ((UNREAD, FAILED), None, None, "failed"),
        ((FAILED, says(9, 1)), None, None, "failed"),
    ],
)
def test_a_pair(outcomes, totals, outcome, status):
    found = judged(*outcomes)
    assert (found.totals, found.outcome, found.status) == (totals, outcome, status)
    row = found.to_dict()
    assert (row["total_a"], row["total_b"]) == (totals or (None, None)) and len(row["grades"]) == len(outcomes)


ROWS = [
    judged(says(8, 7), says(7, 8), category="x"),  # A by both
    judged(says(9, 5), says(8, 7), category="x"),  # response 1 by both: they contradict, and A wins on average
    judged(says(5, 5), says(5, 5), category="y"),
    judged(says(5, 5), UNREAD, category="y"),
    judged(FAILED, says(1, 2), category="y"),
]


def test_orders_that_agree_and_the_place_that_is_preferred():
    found = places(ROWS)
    assert found.agree is not None and found.agree.value == pytest.approx(2 / 3)
    # calls with totals, of pairs without a verdict too: 8-7 9-5 8-7 are the first's, 7-8 1-2 the second's
    assert (found.first, found.equal, found.second) == (3, 3, 2)


def test_summary_counts_everything_once():
    found = summary(ROWS, resamples=200, seed=0)
    verdict = found["verdict"]
    assert [verdict[k] for k in ("win", "tie", "lose", "without")] == [2, 1, 0, 2]
    assert (found["prompts"], found["unparsed"], found["failed"]) == (5, 1, 1)
    assert found["calls"] == {"ok": 8, "unparsed": 1, "failed": 1}
    assert verdict["rates"]["win"]["value"] == pytest.approx(2 / 3)
    y = found["by_category"]["y"]
    assert [y[k] for k in ("win", "tie", "lose", "without")] == [0, 1, 0, 2] and list(found["by_category"]) == [
        "x",
        "y",
    ]
    assert found["total_a"] == pytest.approx((8 + 8 + 5) / 3) and found["total_b"] == pytest.approx((7 + 6.5 + 5) / 3)
    assert found["difference"]["mean"] == pytest.approx(found["total_a"] - found["total_b"])
    assert found["difference"]["low"] <= found["difference"]["mean"] <= found["difference"]["high"]


def test_what_a_judge_that_likes_length_leaves_at_equal_length():
    """The reward a word, over both sides at once, by statsmodels."""
    rng = np.random.default_rng(0)
    words = np.stack([rng.integers(20, 40, 60), rng.integers(5, 25, 60)], -1)
    totals = np.round(0.1 * words + rng.normal(0, 0.2, words.shape) + [0.5, 0.0], 2)
    rows = [
        Judged(Pair(f"p{n}", "w " * int(words[n, 0]), "w " * int(words[n, 1])), (Grade(False, (float(a), float(b))),))
        for n, (a, b) in enumerate(totals)
    ]
    found = summary([*rows, judged(UNREAD)], resamples=400, seed=0)
    sides = np.repeat(np.eye(2), 60, axis=0)
    fit = sm.OLS(totals.T.ravel(), np.column_stack([sides, words.T.ravel()])).fit()
    assert (found["length_a"], found["length_b"]) == pytest.approx(words.mean(0)) and found["length_in"] == "words"
    correlations = [np.corrcoef(words[:, side], totals[:, side])[0, 1] for side in (0, 1)]
    assert [found["correlation_a"], found["correlation_b"]] == pytest.approx(correlations)
    assert found["total_per_length"] == pytest.approx(fit.params[2]) and found["difference"]["mean"] > 1.5
    left = found["difference_at_equal_length"]
    assert left["mean"] == pytest.approx(fit.params[0] - fit.params[1])
    assert 0.4 < left["low"] < left["mean"] < left["high"] < 0.6
    # what the judge read counts, where it says so
    cut = [dataclasses.replace(row, tokens=(4, 3 + n % 2)) for n, row in enumerate(rows)]
    found = summary(cut, resamples=40, seed=0)
    assert found["length_in"] == "tokens"
    assert (found["length_a"], found["length_b"]) == (4.0, 3.5) and found["correlation_a"] is None


def test_answers_of_one_length_say_nothing_of_what_length_gives():
    """Of one length on both sides the difference stays what it is; of one on each it is not known."""
    equal = summary([judged(says(8, 7), says(7, 8))] * 3, resamples=40, seed=0)
    assert equal["total_per_length"] is None and equal["difference_at_equal_length"] == equal["difference"]
    apart = summary([Judged(Pair("p", "a b", "c"), (Grade(False, (8.0, 7.0)),))] * 3, resamples=40, seed=0)
    assert apart["total_per_length"] is apart["difference_at_equal_length"] is None


def test_without_a_single_verdict():
    found = summary([judged(UNREAD, UNREAD), judged(FAILED, FAILED)], resamples=10, seed=0)
    assert found["verdict"]["rates"] == {"win": None, "tie": None, "lose": None}
    assert found["places"]["agree"] is None and "difference" not in found and "by_category" not in found


def test_one_order_says_nothing_of_places():
    assert "places" not in summary([judged(says(8, 7))], resamples=10, seed=0)
