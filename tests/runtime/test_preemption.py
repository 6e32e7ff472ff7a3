"""mpo_jax.runtime.preemption: which block stops, after which step, and who gets a signal that no block took."""

import signal
from types import SimpleNamespace

import pytest

from mpo_jax.errors import Preempted
from mpo_jax.runtime import preemption as module
from mpo_jax.runtime.interrupts import STOPS
from mpo_jax.runtime.preemption import Preemption, stopping_at


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """The signals that reach the handlers outside of blocks."""
    heard = []
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in (2, 15)}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)
    STOPS.signal = None


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_both_signals_ask_for_a_stop_after_the_step_at_hand(heard, number, status):
    handlers = signal.getsignal(2), signal.getsignal(15)
    with pytest.raises(Preempted), Preemption() as preemption:
        assert not preemption.requested(1)
        signal.raise_signal(number)
        assert preemption.requested(2) and preemption.requested(3)
        raise Preempted(2)
    assert STOPS.status == status and not heard
    assert (signal.getsignal(2), signal.getsignal(15)) == handlers


def test_a_second_signal_acts_as_ever(heard):
    with Preemption() as preemption:
        signal.raise_signal(2)
        signal.raise_signal(15)
        assert heard == [15] and preemption.requested(1)
        signal.raise_signal(2)
        assert heard == [15, 2]


def test_blocks_follow_each_other(heard):
    """A block that is complete before it could stop gives the signal back; the next one starts without."""
    with Preemption() as preemption:
        assert not preemption.requested(8, last=False)
        signal.raise_signal(15)
        assert not preemption.requested(9, last=True), "nothing is left to save for"
    assert heard == [15]
    with Preemption() as preemption:
        assert not preemption.requested(1)


def test_of_nested_blocks_the_outermost_stops(heard):
    with Preemption() as outer:
        with Preemption() as inner:
            signal.raise_signal(2)
            assert not inner.requested(1)
        assert not heard and outer.requested(1)
        with Preemption() as inner:
            assert not inner.requested(1)
        assert outer.requested(1)
    assert heard == [2]


def test_without_a_place_to_save_to_signals_act_as_ever(heard):
    with Preemption(saves=False) as preemption:
        signal.raise_signal(2)
        assert heard == [2] and not preemption.requested(1)


def test_a_run_that_is_told_where_to_stop_leaves_signals_alone(heard):
    with stopping_at(2), Preemption() as preemption:
        signal.raise_signal(2)
        assert heard == [2]
        assert [preemption.requested(step, last=step == 3) for step in (1, 2, 3)] == [False, True, False]


def test_another_error_lets_the_signal_through(heard):
    with pytest.raises(ValueError), Preemption():
        signal.raise_signal(15)
        raise ValueError
    assert heard == [15]


def test_several_processes_agree_by_one_count_over_all_blocks(heard, monkeypatch):
    """JAX compares numbers, and would wait for one that a stage with few steps never reaches."""
    asked = []
    sync = SimpleNamespace(reached_preemption_sync_point=lambda number: asked.append(number) or len(asked) == 5)
    monkeypatch.setattr(module, "multihost_utils", sync)
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    sent = []
    monkeypatch.setattr("os.kill", lambda _, number: sent.append(number))
    with Preemption() as preemption:
        assert not any(preemption.requested(step) for step in (1, 2, 3))
    with Preemption() as preemption:
        assert not preemption.requested(1)
        signal.raise_signal(2)
        assert sent == [signal.SIGTERM], "to which JAX listens"
        assert signal.getsignal(15) is not signal.getsignal(2), "SIGTERM's handler is JAX's"
        assert preemption.requested(2) and STOPS.signal == 2
        with pytest.raises(Preempted):
            raise Preempted(2)
    assert asked == list(range(asked[0], asked[0] + 5))
