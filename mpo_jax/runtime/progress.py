"""Progress over many stages: the current one, how many are left, and how long they will take."""

import contextlib
import contextvars
import dataclasses
import time
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Expected:
    """A stage to be made, with an estimate.

    Attributes:
      name: its folder's name.
      kind: sft, reward, ...
      seconds: estimated time; None if unknown.
      measured: whether the estimate is the time of a stage like it; otherwise it is counted from its arithmetic.
    """

    name: str
    kind: str
    seconds: float | None
    measured: bool = False


class Overall:
    """Tracks stages as they are made, and estimates when all will be done.

    Counted estimates are scaled by the ratio of actual to estimated time of finished stages: those of the same kind,
    or of any kind if none of that kind is finished.
    """

    def __init__(self, stages: Sequence[Expected]):
        self._stages = {stage.name: stage for stage in stages}
        self._seconds: dict[str, float] = {}
        self._left_out: set[str] = set()
        self._current: str | None = None
        self._begin, self._share = 0.0, 0.0

    @property
    def total(self) -> int:
        return len(self._stages) - len(self._left_out)

    @property
    def finished(self) -> int:
        return len(self._seconds)

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[None]:
        """Marks the stage as the current one; its progress bar then shows the progress of all."""
        self._current, self._begin, self._share = name, time.perf_counter(), 0.0
        self._stages.setdefault(name, Expected(name, name.partition("-")[0], None))
        before = _current.set(self)
        try:
            yield
            self._seconds[name] = time.perf_counter() - self._begin
        finally:
            self._current = None
            _current.reset(before)

    def leave_out(self, names: set[str]) -> None:
        """Removes stages that will not be made."""
        self._left_out |= names & set(self._stages) - set(self._seconds)

    def update(self, share: float) -> None:
        """Sets the share of the current stage's steps that is done."""
        self._share = share

    def expected(self, stage: Expected) -> float | None:
        """The best estimate of a stage's seconds so far."""
        if stage.seconds is None or stage.measured:
            return stage.seconds
        done = [one for name, one in self._stages.items() if name in self._seconds and one.seconds and not one.measured]
        alike = [one for one in done if one.kind == stage.kind] or done
        if not alike:
            return stage.seconds
        return stage.seconds * sum(self._seconds[one.name] for one in alike) / sum(one.seconds or 0.0 for one in alike)

    def remaining(self) -> tuple[float, int]:
        """Estimated seconds of the remaining stages, and the number of stages without an estimate."""
        seconds, unknown = 0.0, 0
        for name, stage in self._stages.items():
            if name in self._seconds or name in self._left_out:
                continue
            expected = self.expected(stage)
            if name == self._current:
                spent = time.perf_counter() - self._begin
                # once some of it is done, the stage's own speed beats any estimate
                if self._share > 0.05:
                    expected = spent / self._share
                expected = None if expected is None else max(expected - spent, 0.0)
            unknown += expected is None
            seconds += expected or 0.0
        return seconds, unknown

    def text(self) -> str:
        """`table: stage 3 of 60, ETA 45 min`."""
        seconds, unknown = self.remaining()
        eta = f"ETA {duration(seconds)}" if not unknown else f"ETA over {duration(seconds)}"
        return f"table: stage {min(self.finished + 1, self.total)} of {self.total}, {eta}"


_current: contextvars.ContextVar[Overall | None] = contextvars.ContextVar("overall", default=None)


def current() -> Overall | None:
    """The progress that the current stage is part of, if any."""
    return _current.get()


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
