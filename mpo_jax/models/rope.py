"""Rotary position embedding: frequencies, stretched or not, and the rotation of heads. arXiv:2104.09864."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mpo_jax.models.spec import LayerSpec, RopeScaling


def rotary_dim(spec: LayerSpec, head_dim: int) -> int:
    """How many of a head's components are rotated."""
    return int(head_dim * spec.rope_fraction)


def rope_frequencies(spec: LayerSpec, head_dim: int) -> np.ndarray:
    """[k/2] radians a position, float32, for the k rotated components: theta^(-2i/k), stretched by `rope_scaling`.

    dynamic leaves them as they are: it stretches rows that are longer than the model's positions, and by their length,
    which no compiled program knows. Such rows are refused for every model.
    """
    size = rotary_dim(spec, head_dim)
    inverse = spec.rope_theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    scaling = spec.rope_scaling
    if scaling is None or scaling.kind == "dynamic":
        return inverse.astype(np.float32)
    if scaling.kind == "linear":
        return (inverse / scaling.factor).astype(np.float32)
    kept = _kept_by_yarn(spec, scaling, size) if scaling.kind == "yarn" else _kept_by_llama3(scaling, inverse)
    return (kept * inverse + (1.0 - kept) * inverse / scaling.factor).astype(np.float32)


def _kept_by_llama3(scaling: RopeScaling, inverse: np.ndarray) -> np.ndarray:
    """[k/2] how much of the original frequency is kept, by its turns within the pre-trained length."""
    turns = scaling.original_positions * inverse / (2 * np.pi)
    return np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)


def _kept_by_yarn(spec: LayerSpec, scaling: RopeScaling, size: int) -> np.ndarray:
    """[k/2] how much of the original frequency is kept, by its index. Section 3.2 of arXiv:2309.00071."""

    def index(turns: float) -> float:
        """Where a frequency has so many turns within the pre-trained length."""
        return size * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    begin, end = index(scaling.high), index(scaling.low)
    if scaling.truncate:
        begin, end = math.floor(begin), math.ceil(end)
    begin, end = max(begin, 0), min(end, size - 1)
    # as transformers has it, so that two equal ends divide by something
    end = end + 0.001 if begin == end else end
    return 1.0 - np.clip((np.arange(size // 2, dtype=np.float64) - begin) / (end - begin), 0.0, 1.0)


def rope_tables(spec: LayerSpec, head_dim: int, position_BT: Int[Array, "B T"]) -> tuple[Array, Array]:
    """cos and sin [B T k/2] of the rotary embedding, float32, halves convention; times yarn's attention factor."""
    frequency = jnp.asarray(rope_frequencies(spec, head_dim))
    angle = position_BT.astype(jnp.float32)[..., None] * frequency[None, None]
    factor = spec.rope_scaling.attention_factor if spec.rope_scaling else 1.0
    if factor == 1.0:
        return jnp.cos(angle), jnp.sin(angle)
    return factor * jnp.cos(angle), factor * jnp.sin(angle)


def rotate(x: Float[Array, "B T H K"], cos: Float[Array, "B T k"], sin: Float[Array, "B T k"]) -> Array:
    """Rotates the two halves of each head's first 2 k components, computed in float32; the others stay as they are."""
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :turned], cos, sin), x[..., turned:]], -1)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
