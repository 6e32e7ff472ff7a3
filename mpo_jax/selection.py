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
    """Batched pair scoring: `score_row(params, row)` for one prompt with its N responses, vmapped over the pairs.

    The parameters are shared by all pairs; `rows` is any pytree whose leaves lead with the pair axis, which
    `spmd_axis_name` ties to mesh axes.
    """
    return jax.vmap(score_row, in_axes=(None, 0), spmd_axis_name=spmd_axis_name)


def rank(score_BN: Float[Array, "B 2"]) -> tuple[Int[Array, "B 2"], Float[Array, " B"]]:
    """Order of each pair with the higher score first, and the gap, which is never negative.

    A tie keeps the sampled order: sample 0 counts as chosen, and its gap is 0.
    """
    swap_B = score_BN[:, 1] > score_BN[:, 0]
    order_BN = jnp.stack([swap_B, ~swap_B], -1).astype(jnp.int32)
    return order_BN, jnp.abs(score_BN[:, 0] - score_BN[:, 1])


def split(gap_N: Float[Array, " N"] | np.ndarray, threshold: float) -> Bool[Array, " N"] | np.ndarray:
    """True for easy pairs: gap > threshold, strictly. Ties with the threshold are hard, and so is a NaN gap."""
    return gap_N > threshold


def threshold_for_fraction(gap_N: np.ndarray, easy_fraction: float) -> float:
    """The threshold whose easy set is the largest that holds at most `easy_fraction` of the pairs.

    Equal gaps are never split apart, so the easy set may be smaller than asked for.
    """
    if not 0.0 <= easy_fraction <= 1.0:
        raise ValueError(f"easy_fraction must lie in [0, 1], got {easy_fraction}")
    # the fraction is rounded before the floor, since 0.3 * 10 must give 3 pairs and not 2
    num_easy = int(np.floor(round(easy_fraction * len(gap_N), 9)))
    # a NaN gap is hard whatever the threshold, so it ranks below all others
    descending_N = np.sort(np.where(np.isnan(gap_N), -np.inf, gap_N))[::-1]
    return float(descending_N[num_easy]) if num_easy < len(gap_N) else float("-inf")
