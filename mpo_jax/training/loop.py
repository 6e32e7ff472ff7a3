"""One exact update, and the one host loop that every training stage runs."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mpo_jax.config.load import to_yaml
from mpo_jax.config.schema import Config, OptimConfig, TrainConfig
from mpo_jax.data.batches import Buckets, TrainBatches, num_steps
from mpo_jax.data.tokens import Example
from mpo_jax.errors import Preempted, UserError
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.pipeline.artifacts import RECIPE, artifact_name
from mpo_jax.pipeline.bucket import Bucket, checkpoint_folder, stage_place
from mpo_jax.runtime.preemption import Preemption
from mpo_jax.runtime.processes import is_main
from mpo_jax.runtime.seeds import data_seed
from mpo_jax.runtime.sharding import check_batch, place_batch, replicated
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.training.checkpoints import Checkpoints, abstract_state, leaf_hashes, state_hash
from mpo_jax.training.guard import Guard
from mpo_jax.training.optimizer import make_optimizer, make_schedule, state_shardings, warmup_steps
from mpo_jax.training.tracker import Tracker
from mpo_jax.training.validation import Best, Evaluate, measure_now
from mpo_jax.training.wandb_log import stage_run
from mpo_jax.types import Head, Mean, Metrics, Params, Skips, TrainState

State = Any

Objective = Callable[..., tuple[Metrics, Metrics]]
"""What a stage minimises: (params, batch, *fixed) -> (terms, metrics); the loss is the sum of the terms' means.

`batch` leads with the batch axis everywhere and is cut into micro-batches; `fixed` is the same for all of them. Terms
are `Mean`s whose counts may depend on the batch but not on the parameters.
"""


def init_state(params: Params, optim: OptimConfig, mesh: Mesh) -> TrainState:
    """A state at step 0 whose optimiser moments are sharded like the parameters.

    The parameters are copied: the steps donate their state, and `params` may be in use elsewhere.
    """
    tx = make_optimizer(optim)
    shardings = forward.param_shardings(params, mesh)
    params = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)(params)
    shardings = state_shardings(tx, params, shardings, mesh)
    step, skipped, in_a_row = (jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)) for _ in range(3))
    return TrainState(step, params, jax.jit(tx.init, out_shardings=shardings)(params), skipped, in_a_row)


def state_sharding(model: Model, optim: OptimConfig, mesh: Mesh, *, head: Head = "lm") -> TrainState:
    """The shardings of a model's training state, without making one."""
    params = forward.abstract_params(model.decoder, head=head)
    shardings = forward.param_shardings(params, mesh)
    counter: Any = replicated(mesh)
    moments = state_shardings(make_optimizer(optim), params, shardings, mesh)
    return TrainState(counter, shardings, moments, counter, counter)


def _gradients(
    objective: Objective, params: Params, batch: Any, fixed: tuple[Any, ...], accumulation: int
) -> tuple[jax.Array, Params, Metrics]:
    """The whole batch's loss, its gradient, and its metrics, from `accumulation` micro-batches.

    Exact: every micro-batch's sums are divided by the whole batch's counts, so uneven masks weigh as in one pass.
    """
    if accumulation == 1:
        return _gradient(objective, params, batch, fixed, None)
    micro = micro_batches(batch, accumulation)
    # counts depend on masks alone, so the compiler drops the forward pass behind them
    counts = jax.tree.map(
        lambda x: x.sum(0), jax.vmap(lambda b: {k: m.count for k, m in objective(params, b, *fixed)[0].items()})(micro)
    )

    def add(total, micro_batch):
        part = _gradient(objective, params, micro_batch, fixed, counts)
        return jax.tree.map(jnp.add, total, part), None

    first = jax.tree.map(lambda x: x[0], micro)
    rest = jax.tree.map(lambda x: x[1:], micro)
    total, _ = jax.lax.scan(add, _gradient(objective, params, first, fixed, counts), rest)
    return total


def micro_batches(batch: Any, count: int) -> Any:
    """[B ...] as [count B/count ...]: interleaved, so that the rows of one device stay on it."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _gradient(
    objective: Objective, params: Params, batch: Any, fixed: tuple[Any, ...], counts: dict[str, jax.Array] | None
) -> Any:
    def loss(params):
        terms, metrics = objective(params, batch, *fixed)
        divisor = {k: m.count for k, m in terms.items()} if counts is None else counts
        value = sum(m.total / jnp.maximum(divisor[k], 1.0) for k, m in terms.items())
        return value, {**metrics, **terms}

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, grads, metrics


def apply(
    state: TrainState, grads: Params, learning_rate: jax.Array, tx: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """One optimiser update; also returns the gradient's global norm before clipping."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    in_a_row = jnp.zeros_like(state.skipped_in_a_row)
    return TrainState(state.step + 1, params, opt_state, state.skipped, in_a_row), optax.tree.norm(grads)


def _only_where(fine: jax.Array, metrics: Metrics) -> Metrics:
    empty = Mean(jnp.zeros(()), jnp.zeros(()))
    choose = partial(jnp.where, fine)
    return {name: jax.tree.map(choose, m, empty) if isinstance(m, Mean) else m for name, m in metrics.items()}


def make_update(
    objective: Objective, optim: OptimConfig, *, accumulation: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A pure (state, batch, learning_rate, *fixed) -> (state, metrics), to be jitted with the state donated.

    Where the loss or the gradient's norm is not finite nothing but the counts of skipped updates changes, and the
    batch's Means count nothing.
    """
    tx = make_optimizer(optim)

    def update(state: TrainState, batch: Any, learning_rate: jax.Array, *fixed: Any) -> tuple[TrainState, Metrics]:
        loss, grads, metrics = _gradients(objective, state.params, batch, fixed, accumulation)
        return apply_if_finite(state, loss, grads, metrics, learning_rate, tx)

    return update


def apply_if_finite(
    state: TrainState,
    loss: jax.Array,
    grads: Params,
    metrics: Metrics,
    learning_rate: jax.Array,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """The updated state, or the old one with one more skipped update; and the metrics, of which then none counts."""
    updated, norm = apply(state, grads, learning_rate, tx)
    fine = jnp.isfinite(loss) & jnp.isfinite(norm)
    skipped = dataclasses.replace(state, skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)
    state = jax.tree.map(partial(jnp.where, fine), updated, skipped)
    skips = Skips(jnp.where(fine, 0, 1), state.skipped_in_a_row)
    return state, {**_only_where(fine, metrics), "grad_norm": norm, "skipped": skips}


def fit(
    state: State,
    step: Callable[[State, int], tuple[State, Metrics, Any]],
    *,
    config: Config,
    train: TrainConfig,
    num_steps: int,
    folder: Path,
    stage: str,
    evaluate: Evaluate | None = None,
    warmup: int = 0,
) -> tuple[State, dict[str, Any]]:
    """Runs `step(state, k)` for k up to `num_steps`, from the newest sound checkpoint in `folder` if there is one.

    A step returns the next state, metrics, and its batch: a pytree of arrays to be kept if its update is skipped.

    Args:
      evaluate: measures a state on held-out rows, every `train.eval_every` steps and after the last.
      warmup: how many of the first steps may log fewer metrics than later ones.

    Returns:
      The last state, or the best one where `train.best_metric` is set; and for the manifest `steps`, the last logged
      metrics as `train`, and as `best` the step, metric and value of the best state, or None.

    Raises:
      UserError: if too many updates in a row were skipped, a checkpoint is of another configuration, or there is no
        metric of the name `train.best_metric`.
      Preempted: after SIGTERM, once a checkpoint of the step at hand is saved.
    """
    with Preemption() as preemption, contextlib.ExitStack() as closing:
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        bucket, recipe = Bucket.of(config), _recipe(folder)
        checkpoints = Checkpoints(
            checkpoint_folder(bucket, folder),
            keep=train.keep_checkpoints,
            best=train.better if train.best_metric else None,
            recipe=recipe,
            clean=True,
        )
        closing.callback(checkpoints.close)
        start, state = checkpoints.restore(state)
        wandb_run = stage_run(config, folder, stage, artifact_name(recipe) if recipe else folder.name)
        tracker = Tracker(
            folder,
            stage,
            num_steps,
            tensorboard=config.runtime.tensorboard,
            sinks=() if wandb_run is None else (wandb_run,),
            every_step=train.log_every == 1,
            start_step=start,
            sums=checkpoints.carried,
        )
        closing.push(lambda kind, error, trace: tracker.close(failed=kind is not None))
        guard = Guard(folder / "bad_batches", stage, train.stop_after_skipped)
        best = Best(train, stage, checkpoints, warmup=warmup)
        logged: dict[str, float] = {}
        for number in range(start + 1, num_steps + 1):
            state, metrics, batch = step(state, number - 1)
            guard.look(number, metrics, batch)
            last, due = number == num_steps, number % train.checkpoint_every == 0
            measures: dict[str, float] = {}
            if evaluate is not None and train.eval_every is not None and (last or number % train.eval_every == 0):
                jax.block_until_ready(state)
                with tracker.untimed():
                    measures = measure_now(evaluate, state, number, stage)
            improved, hashes = best.improves(measures), None
            if due or last or improved:
                jax.block_until_ready(state)
                with tracker.untimed():
                    hashes = leaf_hashes(state)
            log = last or due or number % train.log_every == 0 or number == 1
            digest = state_hash(hashes) if hashes else None
            line = tracker.update(number, metrics, log=log, measures=measures, state_hash=digest)
            logged = line or logged
            value = best.value(number, line or {}, measures, compared=due or last)
            stop = preemption.asked(number, last=last)
            if stop or last or due or improved:
                guard.settle()
            if stop or ((due or improved) and not last):
                carried = tracker.unlogged()
                with tracker.untimed():
                    if bucket is not None and bucket.takes_checkpoints and is_main():
                        # before the checkpoint: one that is there has all of its metrics beside it
                        bucket.send(folder, stage_place(folder))
                    checkpoints.save(number, state, hashes=hashes, value=value, carried=carried)
            if stop:
                raise Preempted(number)
        _check_skipped(state, stage, num_steps)
        chosen = best.choose(num_steps)
        if chosen is not None and chosen["step"] != num_steps:
            # the last state leaves the devices before the best one comes
            abstract = abstract_state(state)
            del state
            state = checkpoints.load(chosen["step"], abstract)
    return state, {"steps": num_steps, "train": logged, "best": chosen}


def _check_skipped(state: State, stage: str, num_steps: int) -> None:
    """Warns of skipped updates, which the state has counted through all resumptions.

    Raises:
      UserError: if a model of the state was never updated: it would be exported as trained.
    """
    is_state = lambda node: isinstance(node, TrainState)  # noqa: E731
    for part in filter(is_state, jax.tree.leaves(state, is_leaf=is_state)):
        made, skipped = int(part.step), int(part.skipped)
        if skipped and not made:
            raise UserError(
                f"{stage}: the loss or the gradient was not finite in any of its {skipped} updates, so nothing was "
                "trained. Check that the weights it starts from are finite, look at the rows in bad_batches/, or lower "
                "the learning rate"
            )
        if skipped:
            warn(f"{stage} skipped {skipped} of {num_steps} steps' updates: their loss or gradient was not finite")


def _recipe(folder: Path) -> dict[str, Any] | None:
    """What the stage in this folder is made from, where a store made the folder."""
    path = folder / RECIPE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def fit_examples(
    params: Params,
    step: Callable[..., tuple[TrainState, Metrics]],
    examples: Sequence[Example],
    *,
    config: Config,
    train: TrainConfig,
    mesh: Mesh,
    folder: Path,
    stage: str,
    evaluate: Callable[[Params], Mapping[str, float]] | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Trains on batches of examples; rows with extra numbers give the step (rows, extra), others rows alone.

    Returns the parameters to export, and what `fit` says for the manifest.
    """
    steps = num_steps(len(examples), epochs=train.epochs, steps=train.steps, batch_size=train.batch_size)
    buckets = Buckets.of(examples, config.text.length_buckets)
    batches = TrainBatches(examples, buckets, train.batch_size, data_seed(config.seed, stage), train.shuffle)
    check_rows(stage, len(examples), train.batch_size)
    check_schedule(f"{stage}.train.optim", train.optim, steps)
    learning_rate = make_learning_rate(train.optim, steps)

    def one(state: TrainState, k: int) -> tuple[TrainState, Metrics, Any]:
        batch = batches[k]
        return *step(state, place_batch(batch.data, mesh), learning_rate(k)), {"rows": batch.rows, "extra": batch.extra}

    state, summary = fit(
        init_state(params, train.optim, mesh),
        one,
        config=config,
        train=train,
        num_steps=steps,
        folder=folder,
        stage=stage,
        evaluate=None if evaluate is None else lambda state: evaluate(state.params),
    )
    return state.params, summary


def make_learning_rate(optim: OptimConfig, num_steps: int) -> Callable[[int], jax.Array]:
    """The schedule's value at update k, computed on the host side of the step."""
    schedule = make_schedule(optim, num_steps)
    return lambda k: jnp.asarray(schedule(k), jnp.float32)


MIN_UPDATES = 20
"""Fewer updates than these teach a model little, whatever its learning rate."""
LONG_WARMUP = 0.3
"""The share of a stage's updates above which a warm-up is worth a warning."""


def check_schedule(key: str, optim: OptimConfig, num_updates: int) -> None:
    """Warns where a model gets few updates or spends many of them warming up.

    Args:
      key: of the section with the optimiser, such as `sft.train.optim`.
    """
    stage = key.partition(".")[0]
    whose = "ppo's critic" if key == "ppo.critic_optim" else stage
    if num_updates < MIN_UPDATES:
        warn(
            f"{whose} makes {num_updates} updates, which hardly train a model: give it more rows, lower "
            f"{stage}.train.batch_size, or raise {stage}.train.epochs (or train.steps, which comes before them)"
        )
    asked, given = optim.warmup_steps, warmup_steps(optim, num_updates)
    if asked is not None and asked > LONG_WARMUP * num_updates:
        shortened = f" and is shortened to {given}" if given < asked else ""
        warn(
            f"{key}.warmup_steps={asked} is {asked / num_updates:.0%} of the {num_updates} updates{shortened}: "
            "lower it, or set it to null for a tenth of the updates"
        )


def check_rows(stage: str, num_rows: int, batch_size: int) -> None:
    """Warns where a batch holds rows more than once."""
    if num_rows < batch_size:
        warn(
            f"{stage} has {num_rows} rows for batches of {batch_size}, which hold each of them several times: lower "
            f"{stage}.train.batch_size"
        )


def check_sizes(config: Config, train: TrainConfig, key: str, *, minibatches: int = 1) -> None:
    """Raises UserError where a stage's micro-batches do not divide over the mesh."""
    check_batch(
        train.batch_size // (train.accumulation * minibatches),
        config.mesh,
        f"{key}.train.batch_size={train.batch_size}, of which a micro-batch is",
    )
