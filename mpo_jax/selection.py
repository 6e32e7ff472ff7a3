"""Data selection: score gaps of response pairs and the split into easy and hard. Section 3.1 of the MPO paper."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def make_pair_scorer(
    score_row: Callable[[Any, Any], Float[Array, " N"]], *, spmd_axis_name: Any = None
) -> Callable[[Any, Any], Float[Array, "B N"]]:
    """Batched pair scoring: vmaps `score_row(params, row)`, which scores the N responses of one prompt, over the pairs.

    All pairs share the parameters. `rows` is any pytree with the pair axis first; `spmd_axis_name` names the mesh axes
    that this axis is sharded over.
    """
    return jax.vmap(score_row, in_axes=(None, 0), spmd_axis_name=spmd_axis_name)


def ordered_right(gap_N: Float[Array, " N"] | np.ndarray) -> Float[Array, " N"] | np.ndarray:
    """1 where a pair's gap, the better side minus the other, is positive, 1/2 where it is 0: a tie is half right.

    A model that scores everything alike then has the accuracy of chance, not 0.
    """
    return (gap_N > 0) + 0.5 * (gap_N == 0)


def rank(score_BN: Float[Array, "B 2"]) -> tuple[Int[Array, "B 2"], Float[Array, " B"]]:
    """Order of each pair with the higher score first, and the non-negative gap.

    A tie keeps the sampled order: sample 0 is chosen and the gap is 0.
    """
    swap_B = score_BN[:, 1] > score_BN[:, 0]
    order_BN = jnp.stack([swap_B, ~swap_B], -1).astype(jnp.int32)
    return order_BN, jnp.abs(score_BN[:, 0] - score_BN[:, 1])


def split(gap_N: Float[Array, " N"] | np.ndarray, threshold: float) -> Bool[Array, " N"] | np.ndarray:
    """True for easy pairs: gap > threshold. A gap equal to the threshold is hard, and so is a NaN gap."""
    return gap_N > threshold


def threshold_for_fraction(gap_N: np.ndarray, easy_fraction: float) -> float:
    """The threshold that gives the largest easy set with at most `easy_fraction` of the pairs.

    Pairs with equal gaps stay together, so the easy set may be smaller than requested.
    """
    if not 0.0 <= easy_fraction <= 1.0:
        raise ValueError(f"easy_fraction must be in [0, 1], got {easy_fraction}")
    # round before the floor: 0.3 * 10 must give 3 pairs, not 2
    num_easy = int(np.floor(round(easy_fraction * len(gap_N), 9)))
    # a NaN gap is hard at any threshold, so it ranks below all others
    descending_N = np.sort(np.where(np.isnan(gap_N), -np.inf, gap_N))[::-1]
    return float(descending_N[num_easy]) if num_easy < len(gap_N) else float("-inf")
