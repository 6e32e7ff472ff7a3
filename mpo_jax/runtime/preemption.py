"""Stopping a stage between two steps, with a checkpoint: on SIGINT or SIGTERM, or at a given step."""

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
from mpo_jax.runtime.interrupts import SIGNALS, STOPS, Block


@contextlib.contextmanager
def stopping_at(step: int) -> Iterator[None]:
    """Inside the block, `fit` saves a checkpoint after `step` and raises Preempted. Signals stop it at once."""
    token = _stop_at.set(step)
    try:
        yield
    finally:
        _stop_at.reset(token)


_stop_at: ContextVar[int | None] = ContextVar("stop_at", default=None)

_sync_points = itertools.count(1)
"""JAX compares the numbers of sync points over the whole life of a process, and each stage counts its steps from 1."""


class Preemption:
    """Inside the block, the first SIGINT or SIGTERM asks for a stop after the step at hand; a second one acts as ever.

        with Preemption() as preemption:
            for number in range(start, total):
                ...
                if preemption.requested(number):
                    save()
                    raise Preempted(number)

    Blocks may follow each other. Of nested ones the outermost stops; `requested` of the others is False. A block that
    ends without Preempted gives the signal back. Any of several processes may get the signal; JAX makes all of them
    agree on the step. Without the command line's handlers it works in Python's main thread only.

    Args:
      saves: whether there is a place to save to; if not, signals act as ever.
    """

    def __init__(self, *, saves: bool = True):
        self._saves = saves

    def __enter__(self) -> Self:
        self._block: Block | None = None
        self._before: dict[int, Any] = {}
        if not self._saves or _stop_at.get() is not None:
            return self
        self._block = STOPS.enter(several=jax.process_count() > 1)
        # Python sets signal handlers in its main thread only
        if not STOPS.watching and STOPS.stops(self._block) and _in_main_thread():
            for number in SIGNALS:
                # SIGTERM of several processes is JAX's; a handler of None was not set from Python
                if not (self._block.several and number == signal.SIGTERM) and signal.getsignal(number) not in (
                    signal.SIG_IGN,
                    None,
                ):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: Any) -> None:
        if STOPS.signal is None:
            STOPS.ask(number)
        else:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def requested(self, step: int, *, last: bool = False) -> bool:
        """Whether to save and stop after this step.

        Args:
          last: the work is complete and needs no saving, so the answer is False.
        """
        if self._block is None:
            return step == _stop_at.get()
        self._block.stepped = True
        if last or not STOPS.stops(self._block):
            return False
        if self._block.several and multihost_utils.reached_preemption_sync_point(next(_sync_points)):
            STOPS.signal = STOPS.signal or signal.SIGTERM
            return True
        return not self._block.several and STOPS.signal is not None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if self._block is None:
            return
        outermost = STOPS.stops(self._block)
        self._restore()
        STOPS.leave(self._block, error)
        if outermost and STOPS.signal is not None and not STOPS.watching and not isinstance(error, Preempted):
            signal.raise_signal(STOPS.signal)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
