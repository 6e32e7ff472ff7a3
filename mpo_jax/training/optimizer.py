"""From an optimiser's config section to an optax transformation."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh

from mpo_jax.config.schema import OptimConfig
from mpo_jax.runtime.sharding import replicated
from mpo_jax.types import Params

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
