"""One exact update, and the one host loop that every training stage runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mpo_jax.checkpoint import Checkpoints
from mpo_jax.config import Config, OptimConfig, TrainConfig
from mpo_jax.data.batches import Buckets, TrainBatches, num_steps
from mpo_jax.data.tokens import Example
from mpo_jax.model import functional
from mpo_jax.model.functional import Model
from mpo_jax.optim import make_optimizer, make_schedule, state_shardings
from mpo_jax.runtime import data_seed
from mpo_jax.sharding import check_batch, place_batch, replicated
from mpo_jax.tracker import Tracker
from mpo_jax.types import Metrics, Params, TrainState

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
    shardings = functional.param_shardings(params, mesh)
    params = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)(params)
    shardings = state_shardings(tx, params, shardings, mesh)
    step = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    return TrainState(step, params, jax.jit(tx.init, out_shardings=shardings)(params))


def state_sharding(model: Model, optim: OptimConfig, mesh: Mesh, *, scalar: bool = False) -> TrainState:
    """The shardings of a model's training state, without making one."""
    params = functional.abstract_params(model.decoder, scalar=scalar)
    shardings = functional.param_shardings(params, mesh)
    return TrainState(
        replicated(mesh),  # type: ignore[arg-type]
        shardings,
        state_shardings(make_optimizer(optim), params, shardings, mesh),
    )


def gradients(
    objective: Objective, params: Params, batch: Any, *fixed: Any, accumulation: int
) -> tuple[Params, Metrics]:
    """The gradient of the whole batch's loss and its metrics, from `accumulation` micro-batches.

    Exact: every micro-batch's sums are divided by the whole batch's counts, so uneven masks weigh as in one pass.
    """
    if accumulation == 1:
        return _gradient(objective, params, batch, fixed, None)
    # interleaved, so that the rows of one device stay on it
    micro = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
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


def _gradient(
    objective: Objective, params: Params, batch: Any, fixed: tuple[Any, ...], counts: dict[str, jax.Array] | None
) -> Any:
    def loss(params):
        terms, metrics = objective(params, batch, *fixed)
        divisor = {k: m.count for k, m in terms.items()} if counts is None else counts
        value = sum(m.total / jnp.maximum(divisor[k], 1.0) for k, m in terms.items())
        return value, {**metrics, **terms}

    grads, metrics = jax.grad(loss, has_aux=True)(params)
    return grads, metrics


def apply(
    state: TrainState, grads: Params, learning_rate: jax.Array, tx: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """One optimiser update; also returns the gradient's global norm before clipping."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    return TrainState(state.step + 1, params, opt_state), optax.tree.norm(grads)


def make_update(
    objective: Objective, optim: OptimConfig, *, accumulation: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A pure (state, batch, learning_rate, *fixed) -> (state, metrics), to be jitted with the state donated."""
    tx = make_optimizer(optim)

    def update(state: TrainState, batch: Any, learning_rate: jax.Array, *fixed: Any) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(objective, state.params, batch, *fixed, accumulation=accumulation)
        state, norm = apply(state, grads, learning_rate, tx)
        return state, {**metrics, "grad_norm": norm}

    return update


def fit(
    state: State,
    step: Callable[[State, int], tuple[State, Metrics]],
    *,
    config: TrainConfig,
    num_steps: int,
    folder: Path,
    stage: str,
    tensorboard: bool,
) -> tuple[State, dict[str, float]]:
    """Runs `step(state, k)` for k up to `num_steps`, from the newest checkpoint in `folder` if there is one.

    Returns the last state and the last logged metrics.
    """
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints)
    start, state = checkpoints.restore(state)
    tracker = Tracker(folder, stage, num_steps, tensorboard=tensorboard, start_step=start)
    logged: dict[str, float] = {}
    try:
        for k in range(start, num_steps):
            state, metrics = step(state, k)
            last = k + 1 == num_steps
            logged = tracker.update(k + 1, metrics, log=last or (k + 1) % config.log_every == 0 or k == 0) or logged
            if (k + 1) % config.checkpoint_every == 0 and not last:
                checkpoints.save(k + 1, state)
    finally:
        tracker.close()
        checkpoints.close()
    return state, logged


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
) -> tuple[Params, dict[str, Any]]:
    """Trains on shuffled batches of examples; rows with extra numbers give the step (rows, extra), others rows alone.

    Returns the trained parameters, and the steps made and last logged metrics for the manifest.
    """
    steps = num_steps(len(examples), epochs=train.epochs, steps=train.steps, batch_size=train.batch_size)
    buckets = Buckets.of(examples, config.text.length_buckets)
    batches = TrainBatches(examples, buckets, train.batch_size, data_seed(config.seed, stage))
    learning_rate = make_learning_rate(train.optim, steps)

    def one(state: TrainState, k: int) -> tuple[TrainState, Metrics]:
        batch = batches[k]
        data = (batch.rows, batch.extra) if batch.extra.shape[1] else batch.rows
        return step(state, place_batch(data, mesh), learning_rate(k))

    state, logged = fit(
        init_state(params, train.optim, mesh),
        one,
        config=train,
        num_steps=steps,
        folder=folder,
        stage=stage,
        tensorboard=config.runtime.tensorboard,
    )
    return state.params, {"steps": steps, "train": logged}


def make_learning_rate(optim: OptimConfig, num_steps: int) -> Callable[[int], jax.Array]:
    """The schedule's value at update k, computed on the host side of the step."""
    schedule = make_schedule(optim, num_steps)
    return lambda k: jnp.asarray(schedule(k), jnp.float32)


def check_sizes(config: Config, train: TrainConfig, key: str, *, minibatches: int = 1) -> None:
    """Raises UserError where a stage's micro-batches do not divide over the mesh."""
    check_batch(
        train.batch_size // (train.accumulation * minibatches),
        config.mesh,
        f"{key}.train.batch_size={train.batch_size}, of which a micro-batch is",
    )
