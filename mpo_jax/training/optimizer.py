"""From an optimiser's settings to an optax transformation whose learning rate is a number in its state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mpo_jax.config.schema import OptimConfig
from mpo_jax.runtime.sharding import replicated
from mpo_jax.types import TrainState, Tree

NO_DECAY = ("norm", "bias", "scale")


MAX_WARMUP_STEPS = 500
"""The longest warm-up that is chosen here, and the paper's for SFT and the reward model."""


def warmup_steps(config: OptimConfig, num_steps: int) -> int:
    """Updates of warm-up in a run of `num_steps`: a tenth of them, at most 500, unless the configuration says.

    A cosine schedule needs an update after its warm-up, so there it is at most `num_steps` - 1.
    """
    if config.warmup_steps is None:
        return min(MAX_WARMUP_STEPS, num_steps // 10)
    return config.warmup_steps if config.schedule == "constant" else min(config.warmup_steps, max(num_steps - 1, 0))


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to 0 at `num_steps`, or constant. Update k (from 0) uses schedule(k)."""
    warmup, peak = warmup_steps(config, num_steps), config.learning_rate
    if config.schedule == "constant":
        constant = optax.constant_schedule(peak)
        return (
            optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), constant], [warmup]) if warmup else constant
        )
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, max(num_steps, 1), 0.0)


def make_learning_rate(config: OptimConfig, num_steps: int) -> Callable[[int], jax.Array]:
    """The schedule's value at update k, float32, computed on the host's side of the step."""
    schedule = make_schedule(config, num_steps)
    return lambda k: jnp.asarray(schedule(k), jnp.float32)


def decay_mask(params: Tree) -> Tree:
    """True where weight decay applies: by name, because stacked norms have two axes like matrices have."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(getattr(part, "key", part)) for part in path]
        return not any(word in name for name in names for word in NO_DECAY)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW after global-norm clipping, with an injected learning rate of 0: `with_learning_rate` sets each update's.

    The rate is a leaf of the optimiser's state, so runs of different lengths and rates share one compiled step.
    """

    def adamw(learning_rate: float) -> optax.GradientTransformation:
        parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []
        parts.append(optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps))
        if config.weight_decay:
            parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
        return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))

    return optax.inject_hyperparams(adamw)(learning_rate=0.0)


def with_learning_rate(state: TrainState, rate: jax.Array | float) -> TrainState:
    """The state whose next update uses this rate.

    Raises:
      ValueError: if the optimiser was not made with `optax.inject_hyperparams`, so that its rate is its own.
    """
    injected = getattr(state.opt_state, "hyperparams", None)
    if injected is None or "learning_rate" not in injected:
        raise ValueError("the optimiser has no injected learning_rate: wrap it in optax.inject_hyperparams")
    hyperparams = {**injected, "learning_rate": jnp.asarray(rate, jnp.float32)}
    return dataclasses.replace(state, opt_state=state.opt_state._replace(hyperparams=hyperparams))


def state_shardings(tx: optax.GradientTransformation, params: Tree, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings of tx's state: moments like their parameters, all else (counters, factored moments) replicated.

    A moment is known by its shape and by its path, which ends with its parameter's. Without shardings
    `jax.jit(tx.init)` would leave every moment whole on every device.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    known = {
        (path, leaf.shape): sharding
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(param_shardings), strict=True)
    }

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        ends = ((path[begin:], leaf.shape) for begin in range(len(path)))
        return next((known[end] for end in ends if end in known), replicated(mesh))

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))
