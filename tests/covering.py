"""Which cases a test runs: by default enough to see every value once, or some of them; on request all."""

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

EVERY_CASE = bool(os.environ.get("MPO_EVERY_CASE"))
"""Each combination compiles programs of its own, which is most of the suite's time."""


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The product of the axes, or as many of its tuples as the longest axis has values, which have every value."""
    if EVERY_CASE:
        return list(itertools.product(*axes))
    return [tuple(axis[n % len(axis)] for axis in axes) for n in range(max(map(len, axes)))]


def the_rest_thorough(cases: Iterable[Any], keep: int = 1) -> list[Any]:
    """All cases, of which those behind the first `keep` have the mark `thorough`; a tuple is a case's arguments."""
    found = [case if isinstance(case, tuple) else (case,) for case in cases]
    default = len(found) if EVERY_CASE else keep
    return [pytest.param(*case, marks=pytest.mark.thorough if n >= default else ()) for n, case in enumerate(found)]
