"""Says what is being compiled, and how long it took.

JAX reports through `jax.monitoring`: a program has been lowered, was found in the compilation cache, and is compiled.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from mpo_jax.runtime.console import console
from mpo_jax.runtime.progress import duration
from mpo_jax.runtime.words import counted

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"
CACHE_HIT = "/jax/compilation_cache/cache_hits"
SLOW_S = 5.0
"""A compilation that takes longer gets lines of its own."""
LONG_S = 30.0
"""A stage whose compilations take longer together says so at its end."""


@dataclasses.dataclass
class _Running:
    """A compilation under way in one thread."""

    label: str
    begin: float
    shown: bool = False
    cached: bool = False


class Compilations:
    """The compilations of one stage.

    Attributes:
      number: of expected programs compiled or found in the cache.
      cached: those of them found in the cache.
      seconds: of all compilations, summed over threads, small ones included.
    """

    def __init__(self) -> None:
        self.number = self.cached = 0
        self.seconds = 0.0
        self._names: Mapping[str, Sequence[str]] = {}
        self._begun: dict[str, int] = {}
        self._expected = 0
        self._running: dict[int, _Running] = {}
        self._lock = threading.Lock()

    def expect(self, names: Mapping[str, Sequence[str]], number: int) -> None:
        """Sets what is to come.

        Args:
          names: of programs by their functions' names, in the order in which they run.
          number: of programs, at most.
        """
        with self._lock:
            self._names, self._expected = names, number
            self.number = self.cached = 0

    def lowered(self, function: str) -> None:
        """A compilation begins in this thread."""
        with self._lock:
            names = self._names.get(function)
            count = self._begun[function] = self._begun.get(function, -1) + 1
            label = names[count % len(names)] if names else ""
            self._running[threading.get_ident()] = _Running(label or _readable(function), time.perf_counter())

    def found(self) -> None:
        """This thread's program is in the cache."""
        with self._lock:
            if running := self._running.get(threading.get_ident()):
                running.cached = True

    def compiled(self, function: str, seconds: float) -> None:
        """This thread's compilation has ended."""
        with self._lock:
            running = self._running.pop(threading.get_ident(), None)
            self.seconds += seconds
            if function in self._names:
                self.number += 1
                self.cached += running is not None and running.cached
        if running is not None and running.shown:
            console.print(f"  compiled {running.label} in {duration(seconds)}", markup=False)

    def show_slow(self) -> None:
        """Says which compilations have been running for long, each once."""
        with self._lock:
            now = time.perf_counter()
            slow = [one for one in self._running.values() if not one.shown and now - one.begin > SLOW_S]
            for one in slow:
                one.shown = True
            place = f" ({self.number + 1} of {self._expected})" if self._expected > self.number else ""
        for one in slow:
            console.print(f"  compiling {one.label}{place} ...", markup=False)

    @property
    def summary(self) -> str:
        """`6 programs of the stage compiled, 3 of them found in the cache; all compilations took 45 s`."""
        found = f", {self.cached} of them found in the cache" if self.cached else ""
        programs = counted(self.number, "program")
        return f"{programs} of the stage compiled{found}; all compilations took {duration(self.seconds)}"


def _readable(function: str) -> str:
    """A function's name; those of lambdas and partial functions say nothing."""
    return "a small program without a name" if not function or function.startswith("<") else function


_current: Compilations | None = None
"""Of the whole process: programs also compile in other threads than the stage's own."""


@contextlib.contextmanager
def watched() -> Iterator[Compilations]:
    """Watches the compilations of a stage, says which take long, and at the end how long a slow start took."""
    global _current
    _listen()
    before, here, over = _current, Compilations(), threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            here.show_slow()

    thread = threading.Thread(target=watch, name="compilations", daemon=True)
    _current = here
    thread.start()
    try:
        yield here
    finally:
        _current = before
        over.set()
        thread.join()
    if here.seconds > LONG_S:
        console.print(f"  {here.summary}", markup=False)


_listening = False


def _listen() -> None:
    global _listening
    if _listening:
        return
    _listening = True

    def on_duration(event: str, duration_secs: float, **about: Any) -> None:
        if _current is None or event not in (LOWERED, COMPILED):
            return
        # jit(name)
        function = str(about.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        if event == LOWERED:
            _current.lowered(function)
        else:
            _current.compiled(function, duration_secs)

    def on_event(event: str, **_: Any) -> None:
        if _current is not None and event == CACHE_HIT:
            _current.found()

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
