"""Metrics of one stage: metrics.jsonl, sinks such as TensorBoard, and progress on the terminal. Only the main
process writes."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mpo_jax.config.schema import EVAL
from mpo_jax.runtime import progress
from mpo_jax.runtime.console import console
from mpo_jax.runtime.processes import is_main
from mpo_jax.types import Mean, Skips
from mpo_jax.untrusted import loads

PLAIN_SECONDS = 15.0
PEAK_S = "peak_s"
"""A metric that is not logged itself: seconds of the step's FLOPs at the devices' peak; `perf/mfu` is made of it."""

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

Sums = dict[str, tuple[float, float | None]]
"""Totals and counts of metrics by name, in float64; the count is None if the total itself is logged."""


class Sink(Protocol):
    """Another destination of the metrics in metrics.jsonl, in the main process."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of one step."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Ends the log; `failed`: the stage ended with an error."""
        ...


class TensorBoard:
    """Event files, where every metric's name begins with the stage; steps after `start_step` are replaced."""

    def __init__(self, folder: Path, stage: str, start_step: int):
        from tensorboardX import SummaryWriter

        self._stage = stage
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{self._stage}/{name}", value, step)

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()


class _Eta(TimeRemainingColumn):
    """The task's own `eta` field if given, else rich's estimate from the speed so far."""

    def render(self, task: Task) -> Text:
        given = task.fields.get("eta")
        return super().render(task) if given is None else Text(f"{given:>7}", style="progress.remaining")


class Tracker:
    """Writes one line of metrics for each logged step, and shows progress: a bar on a terminal, plain lines elsewhere.

    Args:
      sinks: other destinations of the logged metrics.
      whole: whether these steps are the stage's progress as a part of all stages; a pass beside them is not.
      bursts: whether steps end in bursts, as the batches of a pass do: the time of a step and the tokens a second are
        then means since the start, compilation left out, in place of means since the last logged step.
      every_step: without a terminal, print each logged step as one line of names and values, for programs to parse.
      start_step: the number of steps already made; lines of later steps are dropped from the file.
      sums: the value of `unlogged` at that step.

    Attributes:
      last_line: the metrics that the file ends with where a run resumes; empty in a new file.
    """

    def __init__(
        self,
        folder: Path | None,
        stage: str,
        num_steps: int,
        *,
        tensorboard: bool,
        sinks: Iterable[Sink] = (),
        every_step: bool = False,
        start_step: int = 0,
        sums: Mapping[str, Any] | None = None,
        whole: bool = True,
        bursts: bool = False,
    ):
        self.stage, self.num_steps, self._every_step = stage, num_steps, every_step
        self._whole, self._bursts = whole, bursts
        self.last_line: dict[str, float] = {}
        writes = folder is not None and is_main()
        self._path = folder / "metrics.jsonl" if folder is not None and is_main() else Path(os.devnull)
        if writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.last_line = _truncate_after(self._path, start_step)
        self._syncs = writes
        self._file = self._path.open("a", encoding="utf-8")
        self._sinks = list(sinks)
        if tensorboard and folder is not None and is_main():
            self._sinks.append(TensorBoard(folder / "tensorboard", stage, start_step))
        self._pending: list[Mapping[str, Any]] = []
        self._measures: dict[str, float] = {}
        self._sums: Sums = {name: (total, count) for name, (total, count) in (sums or {}).items()}
        self._begin = self._last_log = self._last_line = time.perf_counter()
        self.step = self._first_step = start_step
        self._steps_since = 0
        self._compile_seconds = 0.0
        self._compiled = _compile_clock()
        self._compiled_before, self._untimed = self._compiled.seconds, 0.0
        self._tokens = 0.0
        self._overall = progress.current()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("ETA"), _Eta(), TextColumn("{task.fields[note]}"),
                                 console=console)  # fmt: skip
            self._task = self._bar.add_task(stage, total=num_steps, completed=start_step, note=COMPILING)
            if self._overall is not None:
                self._table = self._bar.add_task(
                    "table", total=self._overall.total, completed=self._overall.finished, note="stages", eta=""
                )
            self._bar.start()

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any],
        *,
        log: bool,
        measures: Mapping[str, float] | None = None,
        state_hash: str | None = None,
    ) -> dict[str, float] | None:
        """Takes one step's metrics (on the device); with `log`, fetches and writes their averages since the last log.

        `measures` are of this step's state alone, and are written unchanged even if the metrics are not.

        `tokens` and `PEAK_S`, of a step, are logged as `perf/tokens_per_s` and `perf/mfu`: per second of it.
        The host waits for the device only when it logs. This process's first step counts as `timing_s/compile`,
        together with all later compilations, and not as time of a step.
        """
        first = self.step == self._first_step
        self._pending.append(metrics)
        self.step = step
        if self._overall is not None and self._whole:
            self._overall.update(step / self.num_steps)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if first:
                self._bar.update(self._task, note="")
            if self._overall is not None:
                self._bar.update(self._table, eta=progress.duration(self._overall.remaining()[0]))
        values = mean_values(self._fetch()) if log else {}
        now = time.perf_counter()
        if first and not self._bursts:
            self._compile_seconds, self._untimed = now - self._begin - self._untimed, 0.0
            self._compiled_before = self._compiled.seconds
            self._last_log = now
        else:
            self._steps_since += 1
        if not log:
            if measures:
                self.write(step, measures, state_hash=state_hash)
                self._show(step, measures, now)
            return None
        self._sums = {}
        tokens, at_peak = values.pop("tokens", None), values.pop(PEAK_S, None)
        values |= self._timing(now, tokens, at_peak) | dict(measures or {})
        self.write(step, values, state_hash=state_hash)
        self._show(step, values, now)
        return values

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Excludes the block, such as saving, from the time of a step; compilation is always excluded."""
        begin, compiled = time.perf_counter(), self._compiled.seconds
        yield
        self._untimed += time.perf_counter() - begin - (self._compiled.seconds - compiled)

    def unlogged(self) -> Sums:
        """The sums since the last logged step, as JSON: a resumed run needs them."""
        return self._fetch()

    def _fetch(self) -> Sums:
        self._sums = add_up(jax.device_get(self._pending), self._sums)
        self._pending = []
        return self._sums

    def _timing(self, now: float, tokens: float | None, at_peak: float | None) -> dict[str, float]:
        """Seconds of compilation since the last log, and of a step without them; what a step does in that time."""
        later = self._compiled.seconds - self._compiled_before
        if self._bursts:
            seconds = max(now - self._begin - later - self._untimed, 1e-9)
            self._tokens += tokens or 0.0
            rate = {"perf/tokens_per_s": self._tokens / seconds} if self._tokens else {}
            return {"timing_s/step": seconds / self._steps_since, **rate}
        compiled = self._compile_seconds + later
        values = {"timing_s/compile": compiled} if compiled else {}
        if self._steps_since:
            seconds = max(now - self._last_log - later - self._untimed, 1e-9) / self._steps_since
            values["timing_s/step"] = seconds
            if tokens is not None:
                values["perf/tokens_per_s"] = tokens / seconds
            if at_peak is not None:
                values["perf/mfu"] = at_peak / seconds
        self._last_log, self._steps_since = now, 0
        self._compile_seconds, self._compiled_before, self._untimed = 0.0, self._compiled.seconds, 0.0
        return values

    def write(self, step: int, values: Mapping[str, float], *, state_hash: str | None = None) -> None:
        """Writes a line to metrics.jsonl and to the sinks, flushed; a line with a hash is synced to disk."""
        line: dict[str, Any] = {"step": step, **{k: float(v) for k, v in values.items()}}
        if state_hash is not None:
            line["state_hash"] = state_hash
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if state_hash is not None and self._syncs:
            os.fsync(self._file.fileno())
        for sink in self._sinks:
            sink.write(step, values)

    def _show(self, step: int, values: Mapping[str, float], now: float) -> None:
        measured = any(name.startswith(EVAL) for name in values)
        if self._bar is not None:
            # a bar has one line, which keeps the last measures until there are new ones
            self._measures = {k: v for k, v in values.items() if k.startswith(EVAL)} if measured else self._measures
            values = {**values, **self._measures}
        note = "  ".join(f"{_short(name)} {values[name]:.4g}" for name in self._headline(values))
        if self._bar is not None:
            self._bar.update(self._task, note=note)
        elif self._every_step:
            # rich flushes its output
            console.print(step_line(self.stage, step, values), soft_wrap=True, markup=False)
        elif measured or step >= self.num_steps or now - self._last_line > PLAIN_SECONDS:
            self._last_line = now
            rate = (now - self._begin) / max(step - self._first_step, 1)
            eta = (
                f"ETA {rate * (self.num_steps - step):.0f} s" if step < self.num_steps else f"{now - self._begin:.0f} s"
            )
            whole = f"  [{self._overall.text()}]" if self._overall is not None else ""
            line = f"  {self.stage} {step}/{self.num_steps}  {note}  {eta}{whole}"
            console.print(line, soft_wrap=True, markup=False)

    @staticmethod
    def _headline(values: Mapping[str, float]) -> list[str]:
        wanted = ("loss", "accuracy", "rewards/accuracies", "objective/scores", "objective/kl")
        names = (*wanted, "perf/tokens_per_s", *(EVAL + name for name in wanted))
        return [name for name in names if name in values]

    def close(self, *, failed: bool = False) -> None:
        """Ends the display and the files; `failed`: the stage ended with an error."""
        if self._bar is not None:
            self._bar.stop()
        for sink in self._sinks:
            sink.close(failed=failed)
        self._file.flush()
        if self._syncs:
            os.fsync(self._file.fileno())
        self._file.close()


COMPILING = "compiling"
"""What the bar says until the first step is done; what takes long is named above it."""
LINE_FIELDS = {
    "loss/value_avg": ("value_loss", ".6g"),
    "objective/scores": ("score", ".6g"),
    "objective/kl": ("kl", ".6g"),
    "eval/loss": ("eval_loss", ".7g"),
    "eval/accuracy": ("eval_accuracy", ".6g"),
    "eval/rewards/accuracies": ("eval_accuracy", ".6g"),
    "eval/objective/scores": ("eval_score", ".6g"),
    "eval/objective/kl": ("eval_kl", ".6g"),
    "timing_s/compile": ("compile_s", ".3f"),
    "timing_s/step": ("step_time_s", ".4g"),
    "perf/tokens_per_s": ("tokens_per_s", ".0f"),
    "perf/mfu": ("mfu", ".3f"),
}
"""The fields of a step's line besides its loss: metric to name and format."""


def _short(name: str) -> str:
    return ("eval " if name.startswith(EVAL) else "") + name.split("/")[-1]


def step_line(stage: str, step: int, values: Mapping[str, float]) -> str:
    """`STAGE step K loss X ...`: names and values in turn, for programs to read.

    PPO's loss is the policy's; a skipped or missing update has a loss of nan. A step that compiled has `compile_s`,
    and the first one has no `step_time_s`.
    """
    loss = values.get("loss", values.get("loss/policy_avg", math.nan))
    fields = [f"{name} {values[metric]:{shape}}" for metric, (name, shape) in LINE_FIELDS.items() if metric in values]
    return " ".join([f"{stage} step {step} loss {loss:.7g}", *fields])


def add_up(steps: list[Mapping[str, Any]], sums: Sums) -> Sums:
    """`sums` plus those of further steps; bit-identical whether added in parts or at once.

    Scalars that are not finite do not count: they are those of skipped updates.
    """
    sums = dict(sums)
    for step in steps:
        for name, value in step.items():
            total, count = _parts(value)
            before, counted = sums.get(name, (0.0, None if count is None else 0.0))
            sums[name] = (before + total, None if count is None or counted is None else counted + count)
    return sums


def mean_values(sums: Sums) -> dict[str, float]:
    """total / count of each metric for which that is finite; a total without a count is returned itself."""
    values = {name: total if count is None else total / count for name, (total, count) in sums.items() if count != 0}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _parts(value: Any) -> tuple[float, float | None]:
    if isinstance(value, Mean):
        return float(np.asarray(value.total)), float(np.asarray(value.count))
    if isinstance(value, Skips):
        return float(np.asarray(value.count)), None
    number = float(np.asarray(value, np.float64))
    return (number, 1.0) if math.isfinite(number) else (0.0, 0.0)


@dataclasses.dataclass
class _CompileClock:
    """Seconds this process has spent in the compiler."""

    seconds: float = 0.0

    def on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == COMPILE_EVENT:
            self.seconds += duration_secs


@functools.cache
def _compile_clock() -> _CompileClock:
    """This process's only clock: JAX's listeners cannot be removed."""
    clock = _CompileClock()
    jax.monitoring.register_event_duration_secs_listener(clock.on_event)
    return clock


def _truncate_after(path: Path, step: int) -> dict[str, float]:
    """Drops lines of steps that a resumed run makes again, and a line that a killed process left incomplete.

    The file is truncated, not rewritten, so that a kill at this point loses nothing. Returns the metrics of the last
    line that stays, without its step and hash.
    """
    last: dict[str, float] = {}
    if not path.exists():
        return last
    kept = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or (values := loads(line))["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept += len(line)
            last = {name: value for name, value in values.items() if name not in ("step", "state_hash")}
    os.truncate(path, kept)
    return last
