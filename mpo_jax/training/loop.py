"""The one host loop that every training stage runs: steps, logging, evaluation, checkpoints, and how it stops."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
from etils import epath

from mpo_jax.config.schema import EVAL
from mpo_jax.errors import CheckpointsLost, Preempted, UserError
from mpo_jax.runtime.console import console
from mpo_jax.runtime.preemption import Preemption
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.training.checkpoints import Checkpoints, abstract_state
from mpo_jax.training.guard import Guard
from mpo_jax.training.hashes import leaf_hashes, state_hash
from mpo_jax.training.tracker import Sink, Tracker
from mpo_jax.training.validation import Best, Evaluate, measure_now
from mpo_jax.types import TrainState

State = Any
"""One pytree of arrays with all that changes: a `TrainState`, or several with what else a method carries."""

Step = Callable[[State, Any], tuple[Any, ...]]
"""(state, batch) -> (state, metrics), or (state, metrics, arrays to be kept on disk if the update is skipped)."""


class Batches(Protocol):
    """A sequence of batches by number, so that a resumed run goes on where it was. The next is made during a step."""

    def __getitem__(self, k: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What happens between steps; none of it changes the last state.

    Attributes:
      log_every: steps between two logged lines, each with the averages since the line before.
      log: further places for logged lines, each with `write(step, values)` and `close(failed=...)`.
      evaluate: measures a state on held-out rows, every `eval_every` steps and after the last.
      best_metric: a logged metric: the state with its best value is returned in place of the last. A metric that begins
        with eval/ compares the states that are evaluated, others those at checkpoints.
      best_mode: which of its values are better.
      warmup: how many of the first steps may log fewer metrics than later ones.
      stop_after_skipped: updates in a row that may be skipped for numbers that are not finite.
    """

    log_every: int = 10
    log: Sequence[Sink] = ()
    evaluate: Evaluate | None = None
    eval_every: int | None = None
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    warmup: int = 0
    stop_after_skipped: int = 5

    def __post_init__(self) -> None:
        for field in ("log_every", "eval_every", "stop_after_skipped"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{field}={value} must be at least 1")
        if self.best_mode not in ("min", "max"):
            raise UserError(f"best_mode={self.best_mode!r} must be min or max")
        if (self.best_metric or "").startswith(EVAL) and not (self.evaluate and self.eval_every):
            raise UserError(f"best_metric={self.best_metric} needs evaluate and eval_every")


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """Where and how often a state is saved. `fit` goes on from the newest sound checkpoint that it finds.

    Attributes:
      folder: a Path on a disk, or a bucket's.
      every: steps between two checkpoints. Such a step is logged too, with the state's hash.
      keep: the last ones kept.
      recipe: what the run is made from; a checkpoint of another recipe is refused.
      before_save: called before each, in every process.
    """

    folder: Path | epath.Path
    every: int = 500
    keep: int = 2
    recipe: Mapping[str, Any] | None = None
    before_save: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise UserError(f"every={self.every} and keep={self.keep} must be at least 1")


class Fitted(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: the last state, or the best one where `Hooks.best_metric` is set.
      summary: `steps`, the last logged metrics as `train`, and as `best` the step, metric and value of the best state.
    """

    state: State
    summary: dict[str, Any]


def fit(
    state: State,
    step: Step,
    batches: Batches,
    *,
    num_steps: int | None = None,
    name: str = "train",
    folder: str | Path | None = None,
    tensorboard: bool = False,
    hooks: Hooks | None = None,
    checkpoints: Checkpointing | None = None,
) -> Fitted:
    """Runs `step(state, batches[k])` for every k below `num_steps`, from the newest sound checkpoint if there is one.

    Args:
      state: what training starts from; it is used up, by the first step's donation or where a checkpoint replaces it.
      num_steps: None for as many as there are batches.
      name: what messages and metrics call the run.
      folder: for metrics.jsonl, TensorBoard's files, and batches whose updates were skipped; None: nothing is written.
      hooks: logging and evaluation.
      checkpoints: None: nothing is saved.

    Raises:
      UserError: if too many updates in a row were skipped, a checkpoint is of another recipe, or there is no metric
        `hooks.best_metric`.
      CheckpointsLost: if no checkpoint can be read; the same call then begins anew.
      Preempted: after SIGINT or SIGTERM, once a checkpoint of the current step is saved.
    """
    hooks, folder = hooks or Hooks(), None if folder is None else Path(folder)
    if not hasattr(batches, "__getitem__"):
        raise UserError(f"{name}: batches must be indexed (batches[k]), so that a resumed run can go on: make a list")
    num_steps = len(batches) if num_steps is None else num_steps  # type: ignore[arg-type]
    with Preemption(saves=checkpoints is not None) as preemption, contextlib.ExitStack() as closing:
        sinks = closing.enter_context(contextlib.ExitStack())
        for sink in hooks.log:
            sinks.callback(sink.close, failed=True)
        store = None
        if checkpoints is not None:
            store = Checkpoints(
                checkpoints.folder,
                keep=checkpoints.keep,
                best=hooks.best_mode if hooks.best_metric else None,
                metric=hooks.best_metric,
                recipe=checkpoints.recipe,
                clean=True,
            )
            closing.callback(store.close)
        start = 0
        if store is not None and store.steps():
            # one state in memory at a time; callers hold the initial one until training ends
            initial, state = state, abstract_state(state)
            _free(initial)
            start, found = store.restore(state)
            if found is state:
                raise CheckpointsLost(
                    f"{name}: no checkpoint could be read, and all are removed: the same command begins the stage anew"
                )
            state = found
        if start > num_steps:
            raise UserError(
                f"{name}: the newest checkpoint is of step {start}, but num_steps={num_steps}: raise it, or name "
                "another folder for checkpoints"
            )
        if start:
            line = f"  {name}: resumes from the checkpoint of step {start} of {num_steps}"
            console.print(line, markup=False, soft_wrap=True)
        tracker = Tracker(
            folder,
            name,
            num_steps,
            tensorboard=tensorboard,
            sinks=hooks.log,
            every_step=hooks.log_every == 1,
            start_step=start,
            sums=None if store is None else store.carried,
        )
        # from here on the tracker closes them
        sinks.pop_all()
        closing.push(lambda kind, error, trace: tracker.close(failed=kind is not None))
        guard = Guard(None if folder is None else folder / "bad_batches", name, hooks.stop_after_skipped)
        best = Best(hooks.best_metric, name, store, warmup=hooks.warmup)
        logged = tracker.last_line
        following = batches[start] if start < num_steps else None
        for number in range(start + 1, num_steps + 1):
            batch = following
            state, metrics, *kept = step(state, batch)
            # made while the devices work on this step, before the host waits for them
            following = batches[number] if number < num_steps else None
            guard.check(number, metrics, kept[0] if kept else batch)
            last, due = number == num_steps, checkpoints is not None and number % checkpoints.every == 0
            measures: dict[str, float] = {}
            if hooks.evaluate is not None and hooks.eval_every and (last or number % hooks.eval_every == 0):
                jax.block_until_ready(state)
                with tracker.untimed():
                    measures = measure_now(hooks.evaluate, state, number, name)
            improved, hashes = best.improves(measures), None
            if store is not None and (due or last or improved):
                jax.block_until_ready(state)
                with tracker.untimed():
                    hashes = leaf_hashes(state)
            log = last or due or number % hooks.log_every == 0 or number == 1
            digest = state_hash(hashes) if hashes else None
            line = tracker.update(number, metrics, log=log, measures=measures, state_hash=digest)
            logged = line or logged
            value = best.value(number, line or {}, measures, compared=due or last)
            stop = preemption.requested(number)
            if stop or last or due or improved:
                guard.flush()
            if store is not None and (stop or ((due or improved) and not last)):
                carried = tracker.unlogged()
                with tracker.untimed():
                    if checkpoints is not None and checkpoints.before_save is not None:
                        checkpoints.before_save()
                    store.save(number, state, hashes=hashes, value=value, carried=carried)
            if stop:
                raise Preempted(number)
        _check_skipped(state, name, num_steps)
        chosen = best.choose(num_steps)
        if store is not None and chosen is not None and chosen["step"] != num_steps:
            # the last state leaves the devices before the best one comes
            abstract = abstract_state(state)
            del state
            state = store.load(chosen["step"], abstract)
    return Fitted(state, {"steps": num_steps, "train": logged, "best": chosen})


def _free(state: State) -> None:
    """Gives the arrays' memory back, whoever still refers to them."""
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            leaf.delete()


def _check_skipped(state: State, name: str, num_steps: int) -> None:
    """Warns of skipped updates, which the state has counted through all resumptions.

    Raises:
      UserError: if a model of the state was never updated: it would be exported as trained.
    """
    is_state = lambda node: isinstance(node, TrainState)  # noqa: E731
    for part in filter(is_state, jax.tree.leaves(state, is_leaf=is_state)):
        made, skipped = int(part.step), int(part.skipped)
        if skipped and not made:
            raise UserError(
                f"{name}: the loss or the gradient was not finite in any of its {skipped} updates, so nothing was "
                "trained. Check that the weights it starts from are finite, look at the rows in bad_batches/, or lower "
                "the learning rate"
            )
        if skipped:
            warn(f"{name} skipped {skipped} of {num_steps} steps' updates: their loss or gradient was not finite")
