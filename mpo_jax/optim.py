"""From an optimiser's config section to an optax transformation."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh

from mpo_jax.config import OptimConfig
from mpo_jax.sharding import replicated
from mpo_jax.types import Params

NO_DECAY = ("norm", "bias", "scale")


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to 0 at `num_steps`, or constant. Update k (from 0) uses schedule(k)."""
    if config.schedule == "constant":
        warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps) if config.warmup_steps else None
        constant = optax.constant_schedule(config.learning_rate)
        return optax.join_schedules([warmup, constant], [config.warmup_steps]) if warmup else constant
    # a run shorter than its warm-up (a debug run of a real config) still gets a valid schedule
    warmup_steps = min(config.warmup_steps, max(num_steps - 1, 0))
    start = 0.0 if warmup_steps else config.learning_rate
    return optax.warmup_cosine_decay_schedule(start, config.learning_rate, warmup_steps, max(num_steps, 1), 0.0)


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: by name, because stacked norms have two axes like matrices have."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(getattr(part, "key", part)) for part in path]
        return not any(word in name for name in names for word in NO_DECAY)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW's direction after global-norm clipping, without the learning rate.

    The rate is an argument of the update, so that runs of different lengths share one compiled step.
    """
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []
    parts.append(optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    return optax.chain(*parts)


def state_shardings(tx: optax.GradientTransformation, params: Params, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings of tx's state: moments like their parameters, counters replicated.

    Without them `jax.jit(tx.init)` would leave every moment whole on every device.
    """
    shapes = jax.eval_shape(tx.init, params)
    return optax.tree_utils.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        shapes,
        param_shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
