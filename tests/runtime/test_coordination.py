"""mpo_jax.runtime.coordination: processes wait for each other in a key-value store, however long it takes."""

import threading
import time

import jax
import pytest

from mpo_jax.runtime import coordination, processes
from mpo_jax.runtime.coordination import Coordination
from tests.runtime.stores import Shared, together


def test_nobody_passes_before_the_last_arrives():
    store, passed = Shared(), []

    def process(one: Coordination, index: int) -> None:
        time.sleep(0.1 * index)
        one.wait("a")
        passed.append(time.monotonic())
        # the same name again is another barrier
        one.wait("a")

    begin = time.monotonic()
    together(store, 3, process)
    assert len(passed) == 3 and min(passed) - begin >= 0.2
    assert max(passed) - min(passed) < 2.0


def test_all_get_process_0_s_values_in_its_order():
    store, got = Shared(), {}

    def process(one: Coordination, index: int) -> None:
        mine = [{"files": {"a": 1}}, None, True, False]
        got[index] = [one.agree(value if index == 0 else "another", "x") for value in mine]

    together(store, 3, process)
    assert got[0] == got[1] == got[2] == [{"files": {"a": 1}}, None, True, False]


def test_a_long_wait_says_for_whom_and_what(monkeypatch):
    monkeypatch.setattr(coordination, "LOG_EVERY_S", 0.1)
    store, lines = Shared(), {0: [], 1: []}

    def process(one: Coordination, index: int) -> None:
        if index == 1:
            time.sleep(0.35)
        one.wait("the first")
        if index == 0:
            time.sleep(0.35)
        one.agree(1, "the second")

    together(store, 2, process, log=lambda index: lines[index].append)
    # each said it more than once, as one look cannot
    assert {line.split(" since")[0] for line in lines[0]} == {"waiting for process 1"}
    assert {line.split(" since")[0] for line in lines[1]} == {"waiting for process 0"}
    assert all(line.endswith("the first") for line in lines[0])
    assert all(line.endswith("the second") for line in lines[1]) and len(lines[1]) > 1


def test_a_lost_service_ends_the_wait():
    class Lost(Shared):
        def key_value_try_get(self, key: str) -> str:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect")

    with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
        Coordination(Lost(), 1, 2, print).agree(None, "x")


def test_ctrl_c_ends_the_wait():
    """A wait inside C++ would swallow it until its time-out."""
    store, begin = Shared(), time.monotonic()
    thread = threading.Timer(0.3, lambda: signal_this_thread(main))
    main = threading.main_thread()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        Coordination(store, 1, 2, print).agree(None, "x")
    assert time.monotonic() - begin < 5


def signal_this_thread(thread: threading.Thread) -> None:
    import signal

    assert thread.ident is not None
    signal.pthread_kill(thread.ident, signal.SIGINT)


def test_one_process_waits_for_nobody():
    assert coordination.coordination() is None
    processes.wait("x")
    assert processes.agree({"a": 1}) == {"a": 1}
