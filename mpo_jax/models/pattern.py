"""How a pattern of layers runs: what its layers share, what the backward pass recomputes, and the scan over periods."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array

from mpo_jax.models import attention
from mpo_jax.models.spec import LayerSpec
from mpo_jax.types import Params

Made = TypeVar("Made")
Remat: TypeAlias = Literal["none", "dots", "full"]

Layer: TypeAlias = Callable[[Array, Params], tuple[Array, Any]]
"""(x, the parameters of its period) -> (x, cache)."""


def shared(pattern: tuple[LayerSpec, ...], make: Callable[[LayerSpec], Made], *names: str) -> tuple[Made, ...]:
    """make(spec) for each layer of a pattern, called once for all layers that agree on the fields `names`."""
    key, made = attrgetter(*names), {}
    for spec in pattern:
        if key(spec) not in made:
            made[key(spec)] = make(spec)
    return tuple(made[key(spec)] for spec in pattern)


def checkpointed(layer: Layer, remat: Remat) -> Layer:
    """The layer under jax.checkpoint, with the policy that `remat` names."""
    if remat == "none":
        return layer
    if remat == "full":
        return jax.checkpoint(layer)
    policies = jax.checkpoint_policies
    keep = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(attention.SAVED)
    )
    return jax.checkpoint(layer, policy=keep)


def scan_periods(layers: list[Layer], x: Array, params: Params) -> tuple[Array, Any]:
    """Runs all layers, one period of the pattern per step of a scan: the program grows with the period, not the depth.

    Args:
      layers: the layers of one period. Each gets the parameters of the whole period, stacked; a period of one layer
        has no such axis.
      params: the parameters of all layers, stacked.

    Returns:
      x, and the caches of all layers, stacked.
    """
    if len(layers) == 1:
        return jax.lax.scan(layers[0], x, params)

    def period(x: Array, period_params: Params) -> tuple[Array, Any]:
        caches = []
        for layer in layers:
            x, cache = layer(x, period_params)
            caches.append(cache)
        return x, jax.tree.map(lambda *each: jnp.stack(each), *caches)

    periods = jax.tree.map(lambda leaf: rearrange(leaf, "(n p) ... -> n p ...", p=len(layers)), params)
    x, caches = jax.lax.scan(period, x, periods)
    return x, jax.tree.map(lambda cache: rearrange(cache, "n p ... -> (n p) ..."), caches)
