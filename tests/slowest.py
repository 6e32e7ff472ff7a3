"""The slowest tests at the end of a run, each with what it spent its time on: compiling, or other processes.

A plugin of pytest's, which `tests/conftest.py` loads. With several workers each measures its own tests, and what it
finds travels in the reports.
"""

import resource
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import pytest

SHOWN, LEAST_S = 10, 5.0
"""How many tests are named, and from how many seconds."""
COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event for one program; one that comes from the compilation cache has it too, and is short."""
PROPERTY = "spent"

_so_far: Counter[str] = Counter()
_before: Counter[str] = Counter()
_seconds: dict[str, float] = defaultdict(float)
_spent: dict[str, Counter[str]] = defaultdict(Counter)


def _note(event: str, seconds: float, **_: Any) -> None:
    if event == COMPILED:
        _so_far.update(programs=1, compiling=seconds)  # type: ignore[call-overload]


jax.monitoring.register_event_duration_secs_listener(_note)


def _totals() -> Counter[str]:
    """What this worker has spent up to now."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Counter({**_so_far, "processes": children.ru_utime + children.ru_stime})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Gives the report of a set-up, a test or a clean-up what was spent since the last report."""
    report: Any = yield
    now = _totals()
    spent = {name: now[name] - _before[name] for name in now}
    _before.update(spent)
    report.user_properties.append((PROPERTY, spent))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration
    for name, spent in report.user_properties:
        if name == PROPERTY:
            _spent[report.nodeid].update(spent)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    slow = sorted((s, test) for test, s in _seconds.items() if s >= LEAST_S)[: -SHOWN - 1 : -1]
    if slow:
        terminalreporter.section(f"slowest {len(slow)} tests, set-up and clean-up included")
    for seconds, test in slow:
        terminalreporter.write_line(f"{seconds:7.1f} s  {test}: {reason(seconds, _spent[test])}")


def reason(seconds: float, spent: Mapping[str, float]) -> str:
    """What a test's seconds went to, in words.

    Args:
      seconds: how long it took.
      spent: `compiling` in seconds, how many `programs` that were, and `processes`, the seconds of the processor that
        the processes took which it started and waited for.
    """
    words = []
    if spent.get("programs"):
        words.append(f"compiling {spent['programs']:.0f} programs {spent['compiling']:.1f} s")
    if spent.get("processes", 0) >= 0.1:
        words.append(f"other processes {spent['processes']:.1f} s of the processor")
    if seconds > 2 * sum(spent.get(name, 0) for name in ("compiling", "processes")):
        words.append("mostly this process's own work")
    return ", ".join(words)
