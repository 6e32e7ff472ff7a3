"""Ending a stage between two of its steps, with a checkpoint: on SIGTERM, or at a step named beforehand."""

import contextlib
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
    """Within it, `fit` saves a checkpoint after `step` and raises Preempted, as if SIGTERM had come."""
    token = _stop_at.set(step)
    try:
        yield
    finally:
        _stop_at.reset(token)


_stop_at: ContextVar[int | None] = ContextVar("stop_at", default=None)


class Preemption:
    """While entered, SIGTERM asks for a checkpoint instead of ending the process.

    Of several processes any may get the signal, and all must agree on the step: JAX sees to that.
    """

    def __enter__(self) -> Self:
        self._asked, self._before = False, None
        # Python takes handlers in its main thread only
        self._listens = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def asked(self, step: int, *, last: bool) -> bool:
        """Whether to save after this step and to end. After the last step there is nothing to save for."""
        if step == _stop_at.get() or last:
            return step == _stop_at.get()
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
        if self._asked and not isinstance(error, Preempted):
            signal.raise_signal(signal.SIGTERM)
