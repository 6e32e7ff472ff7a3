"""`--part I/N`: of the long tests those of every N-th module only, so that N runs, one after the other, see them all.

A plugin of pytest's, which `tests/conftest.py` loads. Tests that a default run has are in every part.
"""

import re
from collections.abc import Sequence

import pytest

LONG = ("thorough", "processes")
"""Marks of the tests that take turns."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", metavar="I/N", type=part, help=f"of the tests marked {' or '.join(LONG)}, a part: 1/4 to 4/4"
    )


def part(text: str) -> tuple[int, int]:
    """(1, 4) of "1/4"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"{text!r} is no part such as 1/4 or 4/4")
    return int(found[1]), int(found[2])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.part is None:
        return
    kept = in_part(*config.option.part, [(item.path.as_posix(), is_long(item)) for item in items])
    config.hook.pytest_deselected(items=[item for item, keep in zip(items, kept, strict=True) if not keep])
    items[:] = [item for item, keep in zip(items, kept, strict=True) if keep]


def is_long(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in LONG)


def in_part(number: int, parts: int, tests: Sequence[tuple[str, bool]]) -> list[bool]:
    """Which tests are in part `number` of `parts`.

    Modules that have long tests are dealt out in the order of their names, so that parts differ by at most one module.

    Args:
      tests: each test's module, and whether it is long.
    """
    modules = sorted({module for module, long in tests if long})
    turn = {module: place % parts for place, module in enumerate(modules)}
    return [not long or turn[module] == number - 1 for module, long in tests]
