"""One exact update of any objective by any optax transformation."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mpo_jax.models import forward
from mpo_jax.models.packed import packed_in, sum_at_once, sum_over
from mpo_jax.runtime.sharding import replicated
from mpo_jax.training.optimizer import state_shardings
from mpo_jax.types import Mean, Metrics, Params, Skips, TrainState, Tree, merge

Objective = Callable[..., tuple[Metrics, Metrics]]
"""What is minimised: (tree, batch, *fixed) -> (terms, metrics); the loss is the sum of the terms' means.

`tree` holds all of the model's parameters. `batch` leads with the batch axis everywhere and is cut into micro-batches,
or holds a `Packed`, in whose place the objective finds one micro-batch's `PackedRows` beside all else, which stays
whole; `fixed` is the same for all of them. Terms are `Mean`s whose counts may depend on the batch but not on the
parameters. Metrics are `Mean`s too, or numbers that are added over micro-batches, such as a count of tokens.
"""

Total = TypeVar("Total")
Kept = TypeVar("Kept")


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, *, donate: bool = False
) -> TrainState:
    """A state at step 0 whose optimiser moments are sharded like the parameters.

    Args:
      donate: whether the state takes over the trainable part's memory; `params["trainable"]` must not be used again.
        Otherwise it is copied, since a step donates its state, and `params` may be in use elsewhere.
    """

    def take_over_parameters(tree: Tree) -> Tree:
        return tree

    def copy_parameters(tree: Tree) -> Tree:
        return jax.tree.map(jnp.copy, tree)

    tree = params["trainable"]
    shardings = forward.param_shardings(tree, mesh)
    if donate:
        # device_put would give further arrays on the same memory, so that a step could not take it over
        tree = jax.jit(take_over_parameters, donate_argnums=0, out_shardings=shardings)(tree)
    else:
        tree = jax.jit(copy_parameters, out_shardings=shardings)(tree)
    shardings = state_shardings(optimizer, tree, shardings, mesh)
    step, skipped, in_a_row = (jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)) for _ in range(3))
    return TrainState(step, tree, jax.jit(optimizer.init, out_shardings=shardings)(tree), skipped, in_a_row)


def state_sharding(trainable: Tree, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shardings of a training state, from the trainable part's arrays or shapes."""
    shardings = forward.param_shardings(trainable, mesh)
    counter: Any = replicated(mesh)
    moments = state_shardings(optimizer, trainable, shardings, mesh)
    return TrainState(counter, shardings, moments, counter, counter)


def make_update(
    objective: Objective, optimizer: optax.GradientTransformation, *, accumulation: int = 1
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A pure (state, batch, frozen={}, *fixed) -> (state, metrics), to be jitted with the state donated.

    Exact: the sums of every micro-batch are divided by the whole batch's counts, so that `accumulation` micro-batches
    with uneven masks weigh as they do in one pass. Where the loss or the gradient's norm is not finite, nothing changes
    but the counts of skipped updates, and the batch's Means count nothing. A packed batch brings its own micro-batches.

    Args:
      objective: what is minimised.
      optimizer: any optax transformation, learning rate included (see `optimizer.with_learning_rate`).
      accumulation: micro-batches an update of a padded batch; it must divide the batch.
    """

    def update(state: TrainState, batch: Any, frozen: Tree | None = None, *fixed: Any) -> tuple[TrainState, Metrics]:
        tree = partial(_with_frozen, frozen)
        loss, grads, metrics = _gradients(objective, tree, state.trainable, batch, fixed, accumulation)
        return apply_if_finite(state, loss, grads, metrics, optimizer)

    return update


def jit_update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    trainable: Tree,
    mesh: Mesh,
    *,
    accumulation: int = 1,
) -> Any:
    """`make_update` compiled for a mesh: the state is donated and keeps its sharding, metrics are on every device.

    Args:
      trainable: arrays or shapes of the trainable part.
    """
    return jax.jit(
        make_update(objective, optimizer, accumulation=accumulation),
        donate_argnums=0,
        out_shardings=(state_sharding(trainable, optimizer, mesh), replicated(mesh)),
    )


def _with_frozen(frozen: Tree | None, trainable: Tree) -> Tree:
    return merge({"trainable": trainable, "frozen": frozen or {}})


def _gradients(
    objective: Objective,
    tree: Callable[[Tree], Tree],
    trainable: Tree,
    batch: Any,
    fixed: tuple[Any, ...],
    accumulation: int,
) -> tuple[jax.Array, Tree, Metrics]:
    """The whole batch's loss, its gradient, and its metrics, from `accumulation` micro-batches."""
    counts: dict[str, jax.Array] | None = None
    packed = packed_in(batch) is not None

    def count(rows: Any) -> dict[str, jax.Array]:
        return {k: m.count for k, m in objective(tree(trainable), rows, *fixed)[0].items()}

    # counts depend on masks alone, so the compiler drops the forward pass behind them
    if packed:
        counts = sum_at_once(count, batch)
    elif accumulation > 1:
        counts = jax.tree.map(lambda x: x.sum(0), jax.vmap(count)(micro_batches(batch, accumulation)))

    def gradient(rows: Any) -> Any:
        def loss(part: Tree) -> Any:
            terms, metrics = objective(tree(part), rows, *fixed)
            divisor = {k: m.count for k, m in terms.items()} if counts is None else counts
            value = sum(m.total / jnp.maximum(divisor[k], 1.0) for k, m in terms.items())
            return value, {**metrics, **terms}

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return value, grads, metrics

    if packed:
        return sum_over(gradient, batch, keep=lambda sums: (sums[0], like_parameters(sums[1]), sums[2]))
    return accumulate(lambda rows: (gradient(rows), ()), batch, accumulation)[0]


def like_parameters(grads: Tree) -> Tree:
    """The gradients divided over the current mesh as their parameters are."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return grads
    return jax.lax.with_sharding_constraint(grads, forward.param_shardings(grads, mesh))


def accumulate(function: Callable[[Any], tuple[Total, Kept]], batch: Any, count: int) -> tuple[Total, Kept]:
    """`function` (rows -> (sums, arrays over the rows)) over `count` micro-batches: sums added, arrays put together."""
    if count == 1:
        return function(batch)
    micro = micro_batches(batch, count)

    def add(total: Total, rows: Any) -> tuple[Total, Kept]:
        part, kept = function(rows)
        return jax.tree.map(jnp.add, total, part), kept

    total, first = function(jax.tree.map(lambda x: x[0], micro))
    total, rest = jax.lax.scan(add, total, jax.tree.map(lambda x: x[1:], micro))
    together = lambda a, b: jnp.concatenate([a[None], b]).swapaxes(0, 1).reshape(-1, *a.shape[1:])  # noqa: E731
    return total, jax.tree.map(together, first, rest)


def micro_batches(batch: Any, count: int) -> Any:
    """[B ...] as [count B/count ...]: interleaved, so that the rows of one device stay on it."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def apply_if_finite(
    state: TrainState, loss: jax.Array, grads: Tree, metrics: Metrics, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """The updated state, or the old one with one more skipped update; and the metrics, of which then none counts.

    `grad_norm` among them is the gradient's global norm, before the optimiser clips it.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    params: Any = optax.apply_updates(state.trainable, updates)
    norm = optax.tree.norm(grads)
    updated = TrainState(state.step + 1, params, opt_state, state.skipped, jnp.zeros_like(state.skipped_in_a_row))
    # an optimiser can make a finite gradient infinite, such as by its schedule
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    skipped = dataclasses.replace(state, skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)
    state = jax.tree.map(partial(jnp.where, finite), updated, skipped)
    skips = Skips(jnp.where(finite, 0, 1), state.skipped_in_a_row)
    return state, {**_only_where(finite, metrics), "grad_norm": norm, "skipped": skips}


def _only_where(finite: jax.Array, metrics: Metrics) -> Metrics:
    empty = Mean(jnp.zeros(()), jnp.zeros(()))
    choose = partial(jnp.where, finite)
    return {name: jax.tree.map(choose, m, empty) if isinstance(m, Mean) else m for name, m in metrics.items()}
