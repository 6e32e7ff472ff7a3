"""Frozen kernels as int8 with one float32 scale an output channel: half the memory of bfloat16.

W[..., j] is about int8[..., j] * scale[j], with scale[j] = max |W[..., j]| / 127, so that no element is off by more
than half a scale. A quantised kernel is {"int8", "scale"} in the place of its array. Layers alone are quantised:
embedding, head, norms and biases keep their type.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from mpo_jax.models.kernels import KERNELS, MODULES, Kernel
from mpo_jax.types import Tree

LEVELS = 127


def is_quantised(leaf: Any) -> bool:
    """Whether this is a quantised kernel."""
    return isinstance(leaf, dict) and "int8" in leaf


def quantise(kernel: Kernel, array: Array, *, stacked: bool = False) -> dict[str, Array]:
    """A kernel [*inputs *outputs] as int8 and scales [*outputs], float32; a column of zeros has the scale 0.

    Args:
      stacked: whether a layer axis comes first, which both parts then have.
    """
    contracted = tuple(range(int(stacked), int(stacked) + kernel.inputs))
    array = array.astype(jnp.float32)
    scale = jnp.abs(array).max(contracted) / LEVELS
    spread = jnp.expand_dims(jnp.where(scale > 0, scale, 1.0), contracted)
    return {"int8": jnp.round(array / spread).astype(jnp.int8), "scale": scale}


def quantised(tree: Tree) -> Tree:
    """The model with the kernels of its stacked layers quantised."""
    layers = dict(tree["layers"])
    for name, kernel in KERNELS.items():
        if name in layers[kernel.module]:
            held = layers[kernel.module]
            layers[kernel.module] = {**held, name: quantise(kernel, held[name], stacked=True)}
    return {**tree, "layers": layers}


def restored(layers: Tree, dtype: str) -> Tree:
    """A layer, or a stack of them, whose quantised kernels are arrays of `dtype` again."""
    found = dict(layers)
    for module in MODULES:
        found[module] = {
            name: _restored(leaf, KERNELS[name], dtype) if is_quantised(leaf) else leaf
            for name, leaf in layers[module].items()
        }
    return found


def _restored(parts: dict[str, Array], kernel: Kernel, dtype: str) -> Array:
    levels, scale = parts["int8"], parts["scale"]
    first = levels.ndim - kernel.inputs - kernel.outputs
    spread = jnp.expand_dims(scale, tuple(range(first, first + kernel.inputs)))
    return (levels.astype(jnp.float32) * spread).astype(dtype)


def axes(kernels: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Logical axes of all quantised kernels' parts by dotted path, from those of the kernels."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, kernel in KERNELS.items():
        path = f"layers.{kernel.module}.{name}"
        whole = kernels[path]
        found |= {f"{path}.int8": whole, f"{path}.scale": (*whole[:1], *whole[1 + kernel.inputs :])}
    return found
