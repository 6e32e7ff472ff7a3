"""How reliable a reward model's gaps are: Figure 2 of the MPO paper, and calibration."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mpo_jax.runtime.files import anew, naming_damage
from mpo_jax.selection import ordered_right

EDGES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf"))
"""Of the bins of gaps."""

CONFIDENCE_BINS = 10
"""Equal parts of confidences from 0.5 to 1."""


def accuracy_by_gap(signed_gap_N: np.ndarray) -> list[dict[str, Any]]:
    """Count, share and accuracy of pairs by |gap| bin, [low, high).

    Args:
      signed_gap_N: score of the side that is truly preferred minus score of the other; right where positive, and
        half right at 0.
    """
    size_N = np.abs(signed_gap_N)
    bins = []
    for low, high in pairwise(EDGES):
        inside = (size_N >= low) & (size_N < high)
        count = int(inside.sum())
        bins.append(
            {
                "low": low,
                "high": high if np.isfinite(high) else None,
                "count": count,
                "share": count / max(len(size_N), 1),
                "accuracy": float(ordered_right(signed_gap_N[inside]).mean()) if count else None,
            }
        )
    return bins


def pooled(bins: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The bins of several sets of pairs, pooled; all have the same edges."""
    total = sum(one["count"] for part in bins for one in part)
    together = []
    for parts in zip(*bins, strict=True):
        count = sum(one["count"] for one in parts)
        right = sum(one["accuracy"] * one["count"] for one in parts if one["count"])
        accuracy = right / count if count else None
        ends = {key: parts[0][key] for key in ("low", "high")}
        together.append({**ends, "count": count, "share": count / max(total, 1), "accuracy": accuracy})
    return together


def reliability(signed_gap_N: np.ndarray) -> tuple[list[dict[str, Any]], float]:
    """Reliability curve and expected calibration error of sigmoid(|gap|), the model's confidence in its order.

    ECE = sum over bins of the bin's share of pairs times |accuracy - mean confidence|; 0 where a model that says 80% is
    right in 80% of those pairs. Naeini, Cooper and Hauskrecht (2015).

    Args:
      signed_gap_N: positive where the model orders the pair right; a gap of 0 is half right, at confidence 0.5.

    Returns:
      A row a bin that has pairs, and the error.
    """
    gap_N, bins = np.asarray(signed_gap_N, np.float64), CONFIDENCE_BINS
    confidence_N, right_N = 1 / (1 + np.exp(-np.abs(gap_N))), ordered_right(gap_N)
    place_N = np.minimum((2 * (confidence_N - 0.5) * bins).astype(int), bins - 1)
    rows, error = [], 0.0
    for place in np.unique(place_N):
        inside = place_N == place
        confidence, accuracy = float(confidence_N[inside].mean()), float(right_N[inside].mean())
        error += inside.mean() * abs(accuracy - confidence)
        rows.append(
            {
                "low": 0.5 + place / (2 * bins),
                "high": 0.5 + (place + 1) / (2 * bins),
                "count": int(inside.sum()),
                "confidence": confidence,
                "accuracy": accuracy,
            }
        )
    return rows, float(error)


def by_threshold(signed_gap_N: np.ndarray, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """For each threshold on |gap|: the sizes of easy (above it) and hard, and the accuracy in each."""
    rows = []
    for threshold in thresholds:
        easy = np.abs(signed_gap_N) > threshold
        row: dict[str, Any] = {"threshold": threshold, "easy": int(easy.sum()), "hard": int((~easy).sum())}
        for name, inside in {"easy": easy, "hard": ~easy}.items():
            row[f"{name}_accuracy"] = float(ordered_right(signed_gap_N[inside]).mean()) if inside.any() else None
        rows.append(row)
    return rows


HELD_OUT = "held_out.parquet"


def write_gaps(
    folder: Path, gap_N: np.ndarray, truth_N: np.ndarray | None, category_N: Sequence[str | None] = ()
) -> None:
    """Writes `held_out.parquet`: score of chosen minus rejected of every held-out pair, true utility likewise, and the
    pair's category; the last two where any is known.
    """
    columns: dict[str, Any] = {"gap": np.asarray(gap_N, np.float32)}
    if truth_N is not None:
        columns["truth"] = np.asarray(truth_N, np.float64)
    if any(category is not None for category in category_N):
        columns["category"] = pa.array(category_N, pa.string())
    pq.write_table(pa.table(columns), folder / HELD_OUT)


def read_gaps(folder: Path) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The arrays of `write_gaps`; None if the reward model has no such file."""
    if not os.path.lexists(folder / HELD_OUT):
        return None
    with naming_damage(folder / HELD_OUT, anew(folder)):
        table = pq.read_table(folder / HELD_OUT)
        truth = table["truth"].to_numpy() if "truth" in table.column_names else None
        return table["gap"].to_numpy(), truth


def read_gap_categories(folder: Path) -> list[str | None] | None:
    """The category of every pair of `read_gaps`; None where the file names none, or where there is no file."""
    if not (folder / HELD_OUT).is_file() or "category" not in pq.read_schema(folder / HELD_OUT).names:
        return None
    return pq.read_table(folder / HELD_OUT, columns=["category"])["category"].to_pylist()


def against_truth(gap_N: np.ndarray, truth_N: np.ndarray) -> np.ndarray:
    """Gaps signed by whether the truth agrees, for pairs with a known truth that is not a tie.

    Args:
      gap_N: a score difference.
      truth_N: the same sides' true utilities' difference, NaN where unknown.
    """
    decided = np.isfinite(truth_N) & (truth_N != 0)
    return np.where(truth_N > 0, gap_N, -gap_N)[decided]
