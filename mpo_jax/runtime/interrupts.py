"""SIGINT (Ctrl-C) and SIGTERM, in every phase of a command.

The first one asks for a stop: inside a block that saves (`mpo_jax.runtime.preemption`) the step at hand is finished and
saved, elsewhere the process ends promptly. A second one ends it at once.

Python runs signal handlers in its main thread and between two bytecodes, so never during a compilation or a long
computation on the device; and what a handler raises may be swallowed by any library. Therefore a thread waits for
signals at the file descriptor to which Python's handler in C writes, and ends the process itself, without Python's own
exit: JAX's threads may crash in that. A killed process leaves nothing that looks finished, so neither does this.

Only the standard library is imported, so that all this is in place before anything else is.
"""

import contextlib
import dataclasses
import math
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mpo_jax.errors import Preempted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

GRACE_S = 3.0
"""Seconds for what should take none: a block's first step, and the way out of a block."""

SAME_S = 0.3
"""A signal this soon after the first is the same one: `timeout` and other wrappers send theirs twice."""

POLL_S = 0.1
LAST_WORDS_S = 2.0
"""Limit for output that does not get through, and for finding out what is saved."""


@dataclasses.dataclass
class Block:
    """A part of the program that saves its work when a stop is asked for.

    Attributes:
      several: whether JAX makes several processes agree on the step after which they stop.
      stepped: whether a step is complete, so that there is work to save.
    """

    several: bool
    stepped: bool = False
    begun: float = dataclasses.field(default_factory=time.monotonic)


class Stops:
    """A process's stop: whether and by which signal it was asked for, and what happens then.

    Attributes:
      signal: the first signal; None: no stop was asked for.
      workdir: folder of the command's stages, for messages; None: it makes none, or has not read its settings yet.
      watching: whether signals are handled in all phases; otherwise only a `Preemption` handles them.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.workdir: str | None = None
        self.watching = False
        self._blocks: list[Block] = []
        self._notes: list[tuple[str, Callable[[], str]]] = []
        self._scratch: list[Path] = []
        self._noted: str | None = None
        self._handled: list[int] = []
        self._asked = self._left = -math.inf
        self._ending = threading.Lock()

    # signals

    def watch(self) -> None:
        """Handles signals until the process ends. An ignored signal, as in a shell's background job, stays ignored."""
        reading, self._waking = os.pipe()
        os.set_blocking(self._waking, False)
        self._numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.watching = True
        self._set_handlers()
        threading.Thread(target=self._wait, args=(reading,), name="interrupts", daemon=True).start()

    def _set_handlers(self) -> None:
        signal.set_wakeup_fd(self._waking, warn_on_full_buffer=False)
        for number in self._numbers:
            signal.signal(number, self._handle)
            # a stop that waits for the step at hand must not break off what that step reads or writes
            signal.siginterrupt(number, False)

    def _handle(self, number: int, _: Any) -> None:
        # an event loop in the main thread takes the wakeup descriptor for itself; a 0 is no signal
        self._handled.append(number)
        with contextlib.suppress(BlockingIOError):
            os.write(self._waking, b"\0")

    def _wait(self, reading: int) -> None:
        woken: list[int] = []
        counted = 0
        while True:
            if select.select([reading], [], [], None if self.signal is None else POLL_S)[0]:
                woken += [number for number in os.read(reading, 512) if number in SIGNALS]
            # both lists hold the same signals, as far as each has them
            arrived = max(woken, self._handled, key=len)
            if self.signal is None and arrived:
                self.ask(arrived[0])
                counted = len(arrived)
            elif self.signal is not None and self.watching:
                if time.monotonic() < self._asked + SAME_S:
                    counted = len(arrived)
                if len(arrived) > counted or time.monotonic() > self._deadline():
                    self.end()

    def ask(self, number: int) -> None:
        """Asks for a stop; outside of blocks the process ends here."""
        self._asked, self.signal = time.monotonic(), number
        blocks = list(self._blocks)
        if not blocks:
            self.end()
        if self.watching and any(block.stepped for block in blocks):
            text = "the step or batch at hand is finished and saved first; a second signal ends the process at once"
            _within(LAST_WORDS_S, lambda: _write(f"{self._word()}{_process()}: {text}"))
        if blocks[0].several and number == signal.SIGINT:
            # JAX listens to SIGTERM, and passes it on to the other processes
            os.kill(os.getpid(), signal.SIGTERM)

    def _deadline(self) -> float:
        """When the process ends if the main thread has not ended it before."""
        blocks = list(self._blocks)
        if not blocks:
            return self._left + GRACE_S
        if any(block.stepped for block in blocks):
            return math.inf
        return max(self._asked, blocks[0].begun) + GRACE_S

    # blocks

    def enter(self, *, several: bool) -> Block:
        """Enters a block. Only the outermost of nested blocks may stop: it knows what to save."""
        if not self.watching:
            self.signal = None if not self._blocks else self.signal
        elif not self._blocks:
            if self.signal is not None:
                self.end()
            if not several and threading.current_thread() is threading.main_thread():
                # again: jax.distributed sets a handler of its own, also for one process
                self._set_handlers()
        self._blocks.append(Block(several))
        return self._blocks[-1]

    def stops(self, block: Block) -> bool:
        """Whether this block is the outermost one."""
        return self._blocks[0] is block

    def leave(self, block: Block, error: BaseException | None) -> None:
        """Leaves a block. A stop that it has not made, since it was complete already, is made here."""
        self._left = time.monotonic()
        self._blocks.remove(block)
        if self.signal is not None and self.watching and error is None and not self._blocks:
            self.end()

    # messages

    @contextlib.contextmanager
    def leaving(self, where: str, saved: Callable[[], str]) -> Iterator[None]:
        """Inside, the message about a stop names the place and what `saved()` returns: what is on disk, and what the
        same command will do. It is called in another thread, at most once.
        """
        note = where, saved
        self._notes.append(note)
        try:
            yield
        except (KeyboardInterrupt, Preempted):
            self._noted = self._noted or self._note()
            raise
        finally:
            self._notes.remove(note)

    @contextlib.contextmanager
    def removing(self, path: Path) -> Iterator[None]:
        """Inside, a stop removes the folder or the file."""
        self._scratch.append(path)
        try:
            yield
        finally:
            self._scratch.remove(path)

    @property
    def status(self) -> int:
        """The exit status, 130 or 143. A stop without a signal here was asked for by another process."""
        return 128 + (self.signal or signal.SIGTERM)

    def message(self, text: str | None = None) -> str:
        """One line about the stop: `interrupted in sft-0f of runs/a: step 2 is saved; the same command goes on ...`."""
        noted, self._noted = self._noted or self._note(text), None
        where, _, saved = noted.partition("\n")
        said = text or saved
        return f"{self._word()}{_process()}" + (f" in {where}" if where else "") + (f": {said}" if said else "")

    def _word(self) -> str:
        return WORDS[signal.Signals(self.signal or signal.SIGTERM)]

    def _note(self, text: str | None = None) -> str:
        where, saved = self._notes[-1] if self._notes else ("", lambda: "")
        return f"{where}\n{text or saved()}"

    def end(self, text: str | None = None) -> NoReturn:
        """Ends the process, with the message and the status."""
        # never released: of two threads one ends the process, and the other must not go on
        self._ending.acquire()
        said = [f"{self._word()}{_process()}"]
        _within(LAST_WORDS_S, lambda: said.append(self.message(text)))
        _within(LAST_WORDS_S, _flush)
        _within(LAST_WORDS_S, lambda: _write_last(said[-1]))
        if fatal := sys.modules.get("mpo_jax.runtime.fatal"):
            _within(LAST_WORDS_S, fatal.finish)
        # last: other threads still work, and may write and rename these
        for path in list(self._scratch):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        os._exit(self.status)


STOPS = Stops()
"""This process's."""


def _within(seconds: float, action: Callable[[], Any]) -> None:
    """Runs the action in a thread, since it may wait for a lock or for a reader that never comes."""

    def run() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _write(line: str, errors: int = 2) -> None:
    """Writes to standard error, below a progress bar or the terminal's ^C, and shows the cursor that a bar hides."""
    terminal = os.isatty(errors)
    os.write(errors, (("\033[?25h\n" if terminal else "") + line + "\n").encode())


def _write_last(line: str) -> None:
    """As `_write`, and nothing can follow: the main thread goes on, and may print, until the process has ended."""
    errors, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    _write(line, errors)
    # not left open: `fatal.finish` waits for the end of this stream
    os.close(errors)


def _process() -> str:
    """This process's name where there are several. Looked up: an import would start JAX."""
    return getattr(sys.modules.get("mpo_jax.runtime.processes"), "name", str)()
