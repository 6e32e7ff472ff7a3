"""Stopping a stage between two steps, with a checkpoint: on SIGTERM, or at a given step."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from mpo_jax.errors import Preempted


@contextlib.contextmanager
def stopping_at(step: int) -> Iterator[None]:
    """Inside the block, `fit` saves a checkpoint after `step` and raises Preempted, as after SIGTERM."""
    token = _stop_at.set(step)
    try:
        yield
    finally:
        _stop_at.reset(token)


_stop_at: ContextVar[int | None] = ContextVar("stop_at", default=None)

_sync_points = itertools.count(1)
"""JAX compares the numbers of sync points over the whole life of a process, and each stage counts its steps from 1."""


class Preemption:
    """Inside the block, SIGTERM requests a checkpoint instead of ending the process.

    Any of several processes may get the signal; JAX makes all of them agree on the step.
    """

    def __enter__(self) -> Self:
        self._requested, self._before = False, None
        # Python sets signal handlers in its main thread only
        self._handles_signal = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._handles_signal:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self._requested = True

    def requested(self, step: int, *, last: bool) -> bool:
        """Whether to save and stop after this step. After the last step there is no reason to save."""
        if step == _stop_at.get() or last:
            return step == _stop_at.get()
        if jax.process_count() == 1:
            return self._requested
        return multihost_utils.reached_preemption_sync_point(next(_sync_points))

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if self._handles_signal:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
        if self._requested and not isinstance(error, Preempted):
            signal.raise_signal(signal.SIGTERM)
