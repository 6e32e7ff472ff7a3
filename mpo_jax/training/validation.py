"""Measures on held-out rows while a stage trains, and which of the stage's states is the best by a metric."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
from jax.sharding import Mesh

from mpo_jax.config.schema import EVAL
from mpo_jax.data.batches import Batch, Buckets, padded_batches
from mpo_jax.data.packing import Packing
from mpo_jax.data.tokens import Example
from mpo_jax.errors import UserError
from mpo_jax.models.packed import sum_over
from mpo_jax.runtime.console import console
from mpo_jax.runtime.sharding import place_batch, replicated
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.training.tracker import add_up, mean_values
from mpo_jax.types import Mean, Metrics, Params, merge

Row = TypeVar("Row")

Evaluate = Callable[[Any], Mapping[str, float]]
"""From a stage's state to its measures on held-out rows, by the names of the training metrics; it changes nothing."""


HELD_OUT_ROWS = 256
"""The first held-out rows that a stage is measured on, unless the configuration says how many."""


class Watched(Protocol):
    """How often a stage is measured, and on how many rows."""

    @property
    def eval_every(self) -> int | None: ...

    @property
    def eval_rows(self) -> int | None: ...


def first_rows(rows: Sequence[Row], watch: Watched, stage: str, *, default: int = HELD_OUT_ROWS) -> Sequence[Row]:
    """The rows that a stage is measured on, the same at every evaluation; none where it never is.

    Raises:
      UserError: if there is nothing to measure on.
    """
    if watch.eval_every is None:
        return []
    if not rows:
        raise UserError(
            f"{stage}.train.eval_every={watch.eval_every} needs held-out rows, and the data has none: name preference "
            "rows as data.test_path, or raise data.validation_fraction above 0"
        )
    return rows[: default if watch.eval_rows is None else watch.eval_rows]


def make_measure(objective: Callable[..., tuple[Metrics, Metrics]], mesh: Mesh) -> Any:
    """The jitted forward pass of an objective: (params, batch) -> its terms and metrics that are means."""

    def measure(params: Params, batch: Any) -> Metrics:
        def of(rows: Any) -> Metrics:
            terms, metrics = objective(merge(params), rows)
            return only_means({**metrics, **terms})

        return sum_over(of, batch)

    return jax.jit(measure, out_shardings=replicated(mesh))


def make_evaluate(
    measure: Callable[[Params, Any], Metrics],
    examples: Sequence[Example],
    *,
    buckets: int,
    batch_size: int,
    mesh: Mesh,
    packing: Packing | None = None,
    data: Callable[[Batch], Any] = lambda batch: batch.rows,
) -> Callable[[Params], dict[str, float]] | None:
    """From parameters to the exact means over all examples; None without examples.

    Args:
      measure: what `make_measure` gives.
      buckets: widths that batches are padded to, at most, where they are not packed.
      batch_size: rows at a time; padded, that of training's micro-batches, which is known to fit the devices.
      packing: the shape of packed rows; None: rows are padded.
      data: what the objective takes of a batch.
    """
    if not examples:
        return None
    layout = packing or Buckets.of(examples, buckets)
    batches = [data(batch) for batch in padded_batches(examples, layout, batch_size)]
    return lambda params: means(measure(params, place_batch(batch, mesh)) for batch in batches)


def only_means(metrics: Metrics) -> Metrics:
    """The metrics that add up over batches, and say something of the model; filler rows count in none of them."""
    return {name: m for name, m in metrics.items() if isinstance(m, Mean) and not name.startswith("perf/")}


def means(batches: Iterable[Metrics]) -> dict[str, float]:
    """The means over all batches, each with one division in float64; NaN if it is not finite."""
    sums = add_up([jax.device_get(metrics) for metrics in batches], {})
    return {name: math.nan for name in sums} | mean_values(sums)


def measure_now(evaluate: Evaluate, state: Any, step: int, stage: str) -> dict[str, float]:
    """The measures under their logged names, and the seconds they took; values that are not finite are left out."""
    begin = time.perf_counter()
    found = {f"{EVAL}{name}": value for name, value in evaluate(state).items()}
    if broken := [name for name, value in found.items() if not math.isfinite(value)]:
        console.print(
            f"  [yellow]{stage} step {step}: not finite on the held-out rows: {', '.join(broken)}[/yellow]",
            soft_wrap=True,
        )
    finite = {name: value for name, value in found.items() if name not in broken}
    return {**finite, "timing_s/eval": time.perf_counter() - begin}


class Best:
    """Which of a run's states has the best value of a metric; of equals the earliest.

    A measure on held-out rows compares the states that are measured. A metric of training compares those at
    checkpoints, by its average since the line logged before. The last state is always among them.

    Args:
      warmup: during the first updates a metric may not be logged yet.
    """

    def __init__(self, metric: str | None, stage: str, checkpoints: Checkpoints | None, *, warmup: int = 0):
        if metric is not None and checkpoints is None:
            raise UserError(f"{stage}: best_metric={metric} needs checkpoints, from which the best state is restored")
        self.metric, self._stage, self._warmup = metric, stage, warmup
        self._checkpoints: Any = checkpoints
        self.on_held_out = self.metric is not None and self.metric.startswith(EVAL)
        self._last: tuple[int, float] | None = None

    def improves(self, measures: Mapping[str, float]) -> bool:
        """Whether these held-out measures are the best so far, so that the state must be saved."""
        value = measures.get(self.metric) if self.metric is not None and self.on_held_out else None
        return value is not None and self._checkpoints.improves(value)

    def value(
        self, step: int, logged: Mapping[str, float], measures: Mapping[str, float], *, compared: bool
    ) -> float | None:
        """This step's value of the metric by which states are compared.

        Args:
          logged: the step's line, empty where it has none.
          compared: whether this is a step at which a metric of training is compared.

        Returns:
          None where there is no metric, or its updates were skipped.

        Raises:
          UserError: if the stage logs no such metric.
        """
        found = measures if self.on_held_out else logged
        if self.metric is None or not found:
            return None
        if self.metric not in found:
            self._refuse_unknown(step, found)
            return None
        if not (compared or self.on_held_out):
            return None
        self._last = step, found[self.metric]
        return found[self.metric]

    def _refuse_unknown(self, step: int, found: Mapping[str, float]) -> None:
        """Raises UserError, unless the metric may be absent at this step."""
        skipped = any(name.endswith("skipped") and count > 0 for name, count in found.items())
        if skipped or self.on_held_out or step <= self._warmup:
            return
        known = ", ".join(name for name in found if not name.startswith(("timing_s", "perf", EVAL)))
        raise UserError(f"{self._stage}.train.best_metric={self.metric} is not logged; known here: {known}")

    def choose(self, last: int) -> dict[str, Any] | None:
        """For the manifest: the best state's step, metric and value; None where nothing was compared."""
        if self.metric is None:
            return None
        chosen = self._checkpoints.best()
        if self._last is not None and self._last[0] == last and self._checkpoints.improves(self._last[1]):
            chosen = self._last
        if chosen is None:
            console.print(
                f"  [yellow]{self._stage}: {self.metric} has no finite value, so the last state is exported[/yellow]",
                soft_wrap=True,
            )
            return None
        step, value = chosen
        chosen_text = f"the best {self.metric} is {value:.6g}, of step {step} of {last}: that state is exported"
        console.print(f"  {self._stage}: {chosen_text}", soft_wrap=True)
        return {"step": step, "metric": self.metric, "value": value}
