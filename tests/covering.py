"""Which combinations of parameters a test runs: by default enough to see every value once, on request all of them."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

EVERY_CASE = bool(os.environ.get("MPO_EVERY_CASE"))
"""Each combination compiles programs of its own, which is most of the suite's time."""


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The product of the axes, or as many of its tuples as the longest axis has values, which have every value."""
    if EVERY_CASE:
        return list(itertools.product(*axes))
    return [tuple(axis[n % len(axis)] for axis in axes) for n in range(max(map(len, axes)))]
