"""Seconds of calls, and the matrix product that bounds a device's speed."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

REPEATS = 3


def seconds(call: Callable[[], Any]) -> float:
    """One call's time until its result is on the devices."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def fastest(call: Callable[[], Any]) -> float:
    """The fastest of a few calls, after one that compiles."""
    jax.block_until_ready(call())
    return min(seconds(call) for _ in range(REPEATS))


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A large square matrix product on one device.

    Attributes:
      rate: FLOP/s of the fastest of a few.
      is_right: whether its result is the exact one.
    """

    size: int
    rate: float
    is_right: bool


def time_matmul(dtype: str, *, cpu_size: int = 1024) -> Matmul:
    """Times a product that is large enough to keep one accelerator busy.

    Args:
      cpu_size: its size on a CPU, where a large one takes seconds.
    """
    size = cpu_size if jax.default_backend() == "cpu" else 8192
    # a power of two: sums and product are exact in every type
    x = jnp.full((size, size), 1 / size, dtype)
    product = jax.jit(lambda x: x @ x)
    is_right = float(product(x)[-1, -1]) == 1 / size
    return Matmul(size, 2.0 * size**3 / min(seconds(lambda: product(x)) for _ in range(REPEATS)), is_right)
