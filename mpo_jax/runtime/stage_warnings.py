"""Warnings about a stage's result: printed at once, stored in its manifest, and repeated in the report."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from rich.markup import escape

from mpo_jax.credentials import hide
from mpo_jax.runtime.console import console

_collected: ContextVar[list[str] | None] = ContextVar("stage_warnings", default=None)


@contextlib.contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Collects the messages of `warn` inside the block, each once."""
    collected: list[str] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def warn(message: str) -> None:
    """Prints a warning and keeps it for the current stage's manifest.

    A warning states how the result is limited and what to do about it; the stage goes on. Credentials in it are hidden.
    """
    collected, message = _collected.get(), hide(message)
    if collected is None or message not in collected:
        console.print(f"  [yellow]warning:[/yellow] {escape(message)}", soft_wrap=True)
    if collected is not None and message not in collected:
        collected.append(message)
