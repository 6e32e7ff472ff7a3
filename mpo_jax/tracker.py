"""Metrics of one stage: metrics.jsonl, TensorBoard, and progress on the terminal. Of several processes one writes."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mpo_jax.processes import is_main
from mpo_jax.types import Mean

PLAIN_WIDTH = 110
console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=PLAIN_WIDTH)
PLAIN_SECONDS = 15.0


class Tracker:
    """Writes one line of metrics a logged step, and shows progress: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, folder: Path, stage: str, num_steps: int, *, tensorboard: bool, start_step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.stage, self.num_steps = stage, num_steps
        self._path = folder / "metrics.jsonl" if is_main() else Path(os.devnull)
        if is_main():
            _forget_after(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard and is_main():
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._pending: list[Mapping[str, Any]] = []
        self._begin = self._last_log = self._last_line = time.perf_counter()
        self.step = self._first_step = start_step
        self._steps_since = 0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                                 console=console)  # fmt: skip
            self._task = self._bar.add_task(stage, total=num_steps, completed=start_step, note="")
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, Any], *, log: bool) -> dict[str, float] | None:
        """Takes one step's metrics (Means or scalars, on the device); when `log`, fetches and writes their averages.

        Means are added before dividing. The host waits for the device only when it logs.
        """
        self._pending.append(metrics)
        self.step = step
        self._steps_since += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if not log:
            return None
        values = summarise(jax.device_get(self._pending))
        self._pending = []
        now = time.perf_counter()
        seconds = (now - self._last_log) / self._steps_since
        self._last_log, self._steps_since = now, 0
        tokens = values.pop("tokens", None)
        values["timing_s/step"] = seconds
        if tokens is not None:
            values["perf/tokens_per_s"] = tokens / seconds
        self.write(step, values)
        self._show(step, values, now)
        return values

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, flushed, and the same to TensorBoard."""
        self._file.write(json.dumps({"step": step, **{k: float(v) for k, v in values.items()}}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{self.stage}/{name}", value, step)

    def _show(self, step: int, values: Mapping[str, float], now: float) -> None:
        note = "  ".join(f"{name.split('/')[-1]} {values[name]:.4g}" for name in self._headline(values))
        if self._bar is not None:
            self._bar.update(self._task, note=note)
        elif step >= self.num_steps or now - self._last_line > PLAIN_SECONDS:
            self._last_line = now
            rate = (now - self._begin) / max(step - self._first_step, 1)
            eta = (
                f"ETA {rate * (self.num_steps - step):.0f} s" if step < self.num_steps else f"{now - self._begin:.0f} s"
            )
            console.print(f"  {self.stage} {step}/{self.num_steps}  {note}  {eta}", soft_wrap=True)

    @staticmethod
    def _headline(values: Mapping[str, float]) -> list[str]:
        wanted = ("loss", "accuracy", "rewards/accuracies", "objective/scores", "objective/kl", "perf/tokens_per_s")
        return [name for name in wanted if name in values]

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        self._file.flush()
        if is_main():
            os.fsync(self._file.fileno())
        self._file.close()


def summarise(steps: list[Mapping[str, Any]]) -> dict[str, float]:
    """One number a metric over the steps that have it: Means added then divided, plain scalars averaged."""
    values = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        column = [step[name] for step in steps if name in step]
        if isinstance(column[0], Mean):
            total, count = (sum(float(np.asarray(getattr(m, part))) for m in column) for part in ("total", "count"))
            values[name] = total / count if count else 0.0
        else:
            values[name] = float(np.mean([np.asarray(x, np.float64) for x in column]))
    return values


def _forget_after(path: Path, step: int) -> None:
    """Drops lines of steps that a resumed run will make again, and a line that a kill left half-written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
