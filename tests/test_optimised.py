"""The mark `optimised` reaches fixtures of every scope, and processes; tests without it are compiled faster."""

import os
import subprocess
import sys

import jax
import pytest

DISABLED = "jax_disable_most_optimizations"


def is_optimised() -> tuple[bool, bool]:
    """Here, and in processes that are started."""
    inherited = subprocess.run(
        [sys.executable, "-c", f"import jax; print(jax.config.values[{DISABLED!r}])"],
        env=dict(os.environ), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return not jax.config.values[DISABLED], inherited.stdout.strip() == "False"


@pytest.fixture(scope="module")
def in_a_fixture() -> tuple[bool, bool]:
    return is_optimised()


@pytest.mark.optimised
def test_with_the_mark(in_a_fixture):
    assert in_a_fixture == is_optimised() == (True, True)


def test_without_the_mark():
    assert is_optimised() == (False, False)
