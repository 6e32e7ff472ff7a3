"""A pass over many rows outside training: what it has done is kept, and it stops between two batches when asked."""

import contextlib
from collections.abc import Iterator
from typing import Any, Self

from mpo_jax.errors import PassPreempted
from mpo_jax.runtime.parts import Entry, Parts
from mpo_jax.runtime.preemption import Preemption
from mpo_jax.runtime.processes import wait

NO_STEP = -1
"""`mpo verify` has training stop at a step, which a pass before it must not take for one of its batches."""


class Pass:
    """Inside the block, finished rows are kept, and SIGTERM stops the pass with all of them on disk.

    Args:
      name: what messages call the pass.
      every: number of rows between two reports of progress.

    Attributes:
      done: number of finished rows.
      reported: number of rows in the reports of earlier runs that stay valid.
    """

    def __init__(self, name: str, total: int, parts: Parts, *, every: int = 1):
        self.name, self.total, self._parts = name, total, parts
        self.done = parts.rows
        self.reported = self.done if self.done == total else self.done // every * every

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            opened.callback(self._parts.close)
            self._preemption = opened.enter_context(Preemption())
            self._opened = opened.pop_all()
        return self

    def earlier(self) -> Iterator[Entry]:
        """The results of earlier runs of this pass, once: they leave memory as they are read."""
        entries = self._parts.entries[::-1]
        self._parts.entries = []
        while entries:
            yield entries.pop()

    def add(self, entry: Entry, rows: int) -> None:
        """Keeps the results of that many rows."""
        self.done += rows
        self._parts.add(entry, rows)

    def check(self) -> None:
        """Stops here if a signal asks for it; to be called between two batches, equally often in all processes.

        Raises:
          PassPreempted: once all finished rows are on disk.
        """
        if self._preemption.requested(NO_STEP):
            self._parts.flush()
            # process 0 writes; the others would end it by leaving
            wait(f"{self.name} kept")
            raise PassPreempted(self.name, self.done, self.total)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                self._parts.flush()
        finally:
            self._opened.__exit__(kind, error, trace)
