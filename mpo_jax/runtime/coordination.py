"""Barriers and values for all processes through JAX's coordination service: no device takes part.

A collective on the devices fails after minutes in which a process does not join it. Process 0 may need hours, for a
lock that another run holds or an upload. So the processes wait in its key-value store, which any of them can read at
any time. There is no time limit: a process that dies loses its heartbeat, and the service stops the others within
`runtime.processes.timeout_s`.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import jax

# JAX offers the client under no public name, and its public barriers are collectives on the devices
from jax._src import distributed
from rich.markup import escape

from mpo_jax.runtime.console import console

T = TypeVar("T")

POLLS_S = (0.005, 1.0)
"""Shortest and longest pause between two looks at a key. Short sleeps, so that Ctrl-C ends the wait."""
LOG_EVERY_S = 60.0


class Client(Protocol):
    """The part of JAX's client that is used here."""

    def key_value_set(self, key: str, value: str) -> None: ...

    def key_value_try_get(self, key: str) -> str: ...


class Coordination:
    """Every process makes the same calls in the same order; a name may be used again.

    Args:
      client: of the key-value store.
      index: number of this process, of `count`.
      log: prints a line about a long wait.
    """

    def __init__(self, client: Client, index: int, count: int, log: Callable[[str], None]):
        self._client, self._index, self._count, self._log = client, index, count, log
        self._uses: Counter[str] = Counter()

    def wait(self, name: str) -> None:
        """Returns once all processes have made this call."""
        place = self._place(f"wait/{name}")
        if self._index == 0:
            for other in range(1, self._count):
                self._get(f"{place}/{other}", f"process {other}", name)
            self._client.key_value_set(f"{place}/all", "1")
        else:
            self._client.key_value_set(f"{place}/{self._index}", "1")
            self._get(f"{place}/all", "process 0", name)

    def agree(self, value: T, name: str) -> T:
        """Process 0's value, which must be JSON; the others wait for it, and process 0 does not wait for them."""
        place = self._place(f"agree/{name}")
        if self._index == 0:
            self._client.key_value_set(place, json.dumps(value))
            return value
        return json.loads(self._get(place, "process 0", name))

    def _place(self, name: str) -> str:
        """A key that no earlier call has used, the same in every process."""
        self._uses[name] += 1
        return f"mpo/{name}/{self._uses[name]}"

    def _get(self, key: str, whom: str, what: str) -> str:
        """The key's value, as soon as there is one."""
        pause, longest = POLLS_S
        begin = said = time.monotonic()
        while True:
            try:
                return self._client.key_value_try_get(key)
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith("NOT_FOUND"):
                    raise
            now = time.monotonic()
            if now - said >= LOG_EVERY_S:
                said = now
                self._log(f"waiting for {whom} since {now - begin:.0f} s: {what}")
            time.sleep(pause)
            pause = min(1.5 * pause, longest)


@lru_cache(maxsize=1)
def coordination() -> Coordination | None:
    """This process's; None where it is the only one."""
    if jax.process_count() == 1:
        return None
    client: Any = distributed.global_state.client
    index = jax.process_index()

    def log(line: str) -> None:
        # the console is process 0's alone, and a host that hangs is looked for in its own log
        if index == 0:
            console.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True)
        else:
            print(f"process {index}: {line}", file=sys.stderr, flush=True)

    return Coordination(client, index, jax.process_count(), log)
