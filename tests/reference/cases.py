"""Inputs that many tests share: masks of every shape, and garbage to put where a mask is False."""

import numpy as np

MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],  # full
        [1, 1, 1, 1, 0, 0, 0],  # padded on the right
        [0, 0, 1, 1, 1, 1, 1],  # prompt or padding on the left
        [0, 1, 1, 0, 0, 1, 0],  # a hole
        [0, 0, 0, 1, 0, 0, 0],  # one token
        [0, 0, 0, 0, 0, 0, 0],  # nothing: a row that only fills the batch
    ],
    dtype=bool,
)
VALID = np.array([1, 0, 1, 1, 1, 0], dtype=bool)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 numbers: both the code under test and the reference start from the same values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def poison(x: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """`x` with NaN, inf and -inf in turn wherever `keep` is False; `keep` may lack x's trailing axes."""
    keep = np.broadcast_to(keep.reshape(keep.shape + (1,) * (x.ndim - keep.ndim)), x.shape)
    garbage = np.resize(np.array([np.nan, np.inf, -np.inf], x.dtype), x.shape)
    return np.where(keep, x, garbage)
