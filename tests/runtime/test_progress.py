"""What is left of a table, and how long it will take."""

import pytest

from mpo_jax.runtime import progress
from mpo_jax.runtime.progress import Expected, Overall, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def make(overall: Overall, name: str, clock: list[float], seconds: float) -> None:
    with overall.making(name):
        clock[0] += seconds


def test_finished_stages_correct_the_estimates_of_their_kind_and_first_of_all(clock: list[float]) -> None:
    stages = [Expected("sft-0", "sft", 10.0), Expected("ppo-0", "ppo", 20.0), Expected("ppo-1", "ppo", 30.0)]
    overall = Overall([*stages, Expected("ppo-2", "ppo", 5.0, measured=True)])
    assert overall.remaining() == (65.0, 0)
    make(overall, "sft-0", clock, 30.0)
    # all took three times their estimate so far; what was measured stays
    assert overall.remaining() == (3 * 20 + 3 * 30 + 5, 0)
    make(overall, "ppo-0", clock, 10.0)
    # its own kind took half
    assert overall.remaining() == (15.0 + 5.0, 0)
    assert (overall.finished, overall.total) == (2, 4)


def test_a_running_stage_counts_by_its_own_speed(clock: list[float]) -> None:
    overall = Overall([Expected("sft-0", "sft", 10.0), Expected("ppo-0", "ppo", 20.0, measured=True)])
    with overall.making("sft-0"):
        clock[0] += 4.0
        assert overall.remaining() == (10.0 - 4.0 + 20.0, 0)
        overall.update(0.1)
        assert overall.remaining() == (40.0 - 4.0 + 20.0, 0)
        assert progress.current() is overall
        assert overall.text() == "table: stage 1 of 2, ETA 56 s"
    assert progress.current() is None


def test_a_stage_that_failed_or_is_left_out_is_not_finished(clock: list[float]) -> None:
    overall = Overall([Expected("dpo-0", "dpo", 10.0), Expected("ppo-0", "ppo", None)])
    with pytest.raises(RuntimeError), overall.making("dpo-0"):
        raise RuntimeError
    assert (overall.finished, overall.remaining()) == (0, (10.0, 1))
    assert "ETA over 10 s" in overall.text()
    overall.leave_out({"ppo-0", "elsewhere"})
    assert (overall.total, overall.remaining()) == (1, (10.0, 0))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (95, "2 min"), (3600, "60 min"), (12000, "3 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
