"""How a pattern of layers runs: what its layers share, what the backward pass recomputes, and the scan over them."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array

from mpo_jax.models import attention
from mpo_jax.models.spec import DecoderConfig, LayerSpec
from mpo_jax.types import Params

Made = TypeVar("Made")
Remat: TypeAlias = Literal["none", "dots", "full"]

Layer: TypeAlias = Callable[[Array, Any], tuple[Array, Any]]
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


def scan_layers(
    layer: Callable[[int, Array, Params], tuple[Array, Any]],
    sizes: DecoderConfig,
    x: Array,
    params: Params,
    remat: Remat,
) -> tuple[Array, Any]:
    """Runs all layers of a model.

    Args:
      layer: (its place in the pattern, x, its parameters) -> (x, cache).
      params: the parameters of all layers, stacked.

    Returns:
      x, and the caches of all layers, stacked.
    """
    pattern = sizes.pattern
    if sizes.num_layers % len(pattern):
        places = sorted({pattern.index(spec) for spec in pattern})
        kinds = [places.index(pattern.index(spec)) for spec in sizes.layers]
        return scan_kinds([partial(layer, place) for place in places], kinds, x, params, remat)

    def at_place(place: int, x: Array, period_params: Params) -> tuple[Array, Any]:
        # sliced inside the checkpoint: sliced outside, the weights would be saved for the backward pass a second time
        return layer(place, x, period_params if len(pattern) == 1 else jax.tree.map(itemgetter(place), period_params))

    layers = [checkpointed(partial(at_place, place), remat) for place in range(len(pattern))]
    return scan_periods(layers, x, params)


def scan_kinds(
    layers: Sequence[Layer], kinds: Sequence[int], x: Array, params: Params, remat: Remat
) -> tuple[Array, Any]:
    """Runs all layers, one per step of a scan, where layer i is layers[kinds[i]].

    For layers that are no whole number of periods: the stacked parameters would have to be cut in two, which copies
    them. The price is a branch in the loop, ahead of which nothing of the next layer can begin.

    Args:
      layers: one layer of each kind, not checkpointed.
      params: the parameters of all layers, stacked.
    """

    def either(x: Array, inputs: tuple[Array, Params]) -> tuple[Array, Any]:
        kind, layer_params = inputs
        return jax.lax.switch(kind, layers, x, layer_params)

    # around the branch: what a branch hands to the backward pass, its weights among it, would be stacked
    return jax.lax.scan(checkpointed(either, remat), x, (jnp.asarray(kinds), params))


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
