"""How far a reward model's gaps can be trusted. Figure 2 of the MPO paper."""

from itertools import pairwise
from typing import Any

import numpy as np

EDGES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf"))


def accuracy_by_gap(signed_gap_N: np.ndarray, edges: tuple[float, ...] = EDGES) -> list[dict[str, Any]]:
    """Count, share and accuracy of pairs by |gap| bin, [low, high).

    Args:
      signed_gap_N: score of the side that is truly preferred minus score of the other; right where positive.
      edges: bin edges from 0 up.
    """
    size_N = np.abs(signed_gap_N)
    bins = []
    for low, high in pairwise(edges):
        inside = (size_N >= low) & (size_N < high)
        count = int(inside.sum())
        bins.append(
            {
                "low": low,
                "high": high if np.isfinite(high) else None,
                "count": count,
                "share": count / max(len(size_N), 1),
                "accuracy": float((signed_gap_N[inside] > 0).mean()) if count else None,
            }
        )
    return bins
