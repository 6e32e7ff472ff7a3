"""Bins by gap, reliability, calibration error and thresholds: hand counts, and a model that is calibrated by design."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import expit

from mpo_jax.evaluation.calibration import (
    EDGES,
    HELD_OUT,
    accuracy_by_gap,
    against_truth,
    by_threshold,
    pooled,
    read_gaps,
    reliability,
    write_gaps,
)


def test_bins_count_by_size_and_score_by_sign() -> None:
    bins = accuracy_by_gap(np.asarray([0.2, -0.2, 0.0, 1.0, -1.2]))
    found = {row["low"]: (row["count"], row["share"], row["accuracy"]) for row in bins}
    assert found == dict.fromkeys(EDGES[:-1], (0, 0.0, None)) | {0.0: (3, 0.6, 0.5), 1.0: (2, 0.4, 0.5)}
    assert (bins[-1]["low"], bins[-1]["high"]) == (3.0, None)


def test_pooled_bins_are_the_bins_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1.5, 200), rng.normal(0.2, 0.3, 70)
    together = pooled([accuracy_by_gap(a), accuracy_by_gap(b)])
    for ours, theirs in zip(together, accuracy_by_gap(np.concatenate([a, b])), strict=True):
        assert ours == pytest.approx(theirs)
    # a bin that is empty everywhere has no accuracy
    assert pooled([accuracy_by_gap(b)] * 2)[-1]["accuracy"] is None


def test_reliability_by_hand() -> None:
    """A gap of 0 is half right, as its confidence says. Gaps of 0, 1 and 2 have confidences 0.5, 0.731 and 0.881."""
    rows, error = reliability(np.asarray([0.0, 1.0, -1.0, 2.0]))
    assert [row["count"] for row in rows] == [1, 2, 1]
    assert [(row["low"], row["high"]) for row in rows] == [
        (0.5, 0.55), (pytest.approx(0.7), pytest.approx(0.75)), (pytest.approx(0.85), pytest.approx(0.9)),
    ]  # fmt: skip
    assert rows[1]["confidence"] == pytest.approx(expit(1.0)) and rows[1]["accuracy"] == pytest.approx(0.5)
    assert error == pytest.approx(0.5 * (expit(1.0) - 0.5) + 0.25 * (1 - expit(2.0)))


def test_bradley_terry_labels_make_a_calibrated_model_and_a_larger_scale_an_overconfident_one() -> None:
    rng = np.random.default_rng(1)
    gap = np.abs(rng.normal(0, 2, 200_000))
    signed = np.where(rng.random(len(gap)) < expit(gap), gap, -gap)
    assert reliability(signed)[1] < 0.005
    rows, error = reliability(3 * signed)
    assert error > 0.1
    assert all(row["accuracy"] < row["confidence"] for row in rows if row["confidence"] > 0.6)


def test_certainty_falls_into_the_last_bin() -> None:
    rows, error = reliability(np.asarray([1e4, 1e4]))
    assert [(row["high"], row["count"]) for row in rows] == [(1.0, 2)] and error == pytest.approx(0.0)


def test_thresholds_split_by_size_strictly() -> None:
    rows = by_threshold(np.asarray([1.0, -1.0, 2.0, -0.5]), (0.0, 1.0, 5.0))
    assert rows[1] == {"threshold": 1.0, "easy": 1, "hard": 3, "easy_accuracy": 1.0, "hard_accuracy": 1 / 3}
    assert rows[0]["hard_accuracy"] is None and rows[2]["easy_accuracy"] is None


def test_gaps_against_the_truth_leave_out_ties_and_the_unknown() -> None:
    gap, truth = np.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([0.5, -0.5, 0.0, np.nan])
    np.testing.assert_array_equal(against_truth(gap, truth), [1.0, -2.0])


@pytest.mark.parametrize("truth", [None, np.asarray([1.0, -1.0])])
def test_gaps_are_read_as_they_were_written(tmp_path: Path, truth: np.ndarray | None) -> None:
    assert read_gaps(tmp_path) is None
    write_gaps(tmp_path, np.asarray([0.25, -3.0]), truth)
    kept = read_gaps(tmp_path)
    assert kept is not None
    np.testing.assert_array_equal(kept[0], [0.25, -3.0])
    assert (kept[1] is None) == (truth is None)
    if truth is not None:
        np.testing.assert_array_equal(kept[1], truth)


def test_gaps_carry_the_categories_that_are_known(tmp_path: Path) -> None:
    write_gaps(tmp_path, np.asarray([0.25, -3.0]), None, [None, "harmless"])
    assert pq.read_table(tmp_path / HELD_OUT)["category"].to_pylist() == [None, "harmless"]
    write_gaps(tmp_path, np.asarray([0.25, -3.0]), None, [None, None])
    assert pq.read_table(tmp_path / HELD_OUT).column_names == ["gap"]
