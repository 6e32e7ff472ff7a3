"""Warnings about a stage's result: shown when they arise, kept in its manifest, and shown again by the report."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from rich.markup import escape

from mpo_jax.runtime.console import console

_collected: ContextVar[list[str] | None] = ContextVar("stage_warnings", default=None)


@contextlib.contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """The list of what `warn` is called with inside the block, each message once."""
    collected: list[str] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def warn(message: str) -> None:
    """Shows a warning and keeps it for the manifest of the stage that is being made.

    A warning says what the result does not mean and what to do about it; it stops nothing.
    """
    collected = _collected.get()
    if collected is None or message not in collected:
        console.print(f"  [yellow]warning:[/yellow] {escape(message)}", soft_wrap=True)
    if collected is not None and message not in collected:
        collected.append(message)
