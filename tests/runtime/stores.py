"""A key-value store in memory in place of JAX's service, and threads in place of processes."""

import threading
from collections.abc import Callable
from typing import Any

import jax

from mpo_jax.runtime.coordination import Coordination


class Shared:
    """What JAX's client does with keys and values."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        if key in self.values:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_try_get(self, key: str) -> str:
        if key not in self.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: Config key {key} not found.")
        return self.values[key]


def together(
    store: Shared,
    count: int,
    process: Callable[[Coordination, int], Any],
    log: Callable[[int], Callable[[str], None]] = lambda _: print,
) -> None:
    """Runs `process(coordination, index)` in a thread for every index; an error of any of them is raised here."""
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            process(Coordination(store, index, count, log(index)), index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a process waits for ever"
    if errors:
        raise errors[0]
