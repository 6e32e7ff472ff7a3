"""Which sizes and constants a model can have: checked before memory is taken, and before they turn into NaN."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.errors import UserError
from mpo_jax.models.rope import rope_frequencies, rotary_dim
from mpo_jax.models.spec import DecoderConfig, LayerSpec

MOST = {"num_hidden_layers": 10_000, "num_layers": 10_000, "head_dim": 2**16, "num_labels": 10_000}
"""Of sizes that lists and arrays are made of before the weights are looked at."""
LARGEST = 2**31 - 1
"""Of every other size."""
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "max_positions",
)  # fmt: skip


def check_given(raw: dict[str, Any], path: Path) -> None:
    """Checks of a config.json what transformers would fail on, or make long lists of.

    Raises:
      UserError: a size that no model has, or a type that is no text; names the key.
    """
    for key in ("dtype", "torch_dtype"):
        if not isinstance(raw.get(key), str | dict | None):
            raise UserError(f"{path}: {key}={raw[key]!r} is no name of a type, such as bfloat16")
    for key in ("num_attention_heads", "original_max_position_embeddings"):
        if key in raw and raw[key] == 0:
            raise UserError(f"{path}: {key}=0 must be positive")
    for key, most in MOST.items():
        size = raw.get(key)
        if isinstance(size, int) and size > most:
            raise UserError(f"{path}: {key}={size} is more than any model has ({most}): the file is damaged")


def check_sizes(config: DecoderConfig, path: Path) -> DecoderConfig:
    """The same sizes.

    Raises:
      UserError: if no model can have them, or they make NaN or infinity of any input; names the size and `path`.
    """
    for name in SIZES:
        size, most = getattr(config, name), MOST.get(name, LARGEST)
        if not size > 0:
            raise UserError(f"{path}: {name}={size} must be positive")
        if size > most:
            raise UserError(f"{path}: {name}={size} is more than any model has ({most}): the file is damaged")
    for name, number in _constants(config):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise UserError(f"{path}: {name}={number} must be positive")
    if config.norm_eps >= 1:
        raise UserError(f"{path}: norm_eps={config.norm_eps} must be below 1")
    if not (math.isfinite(config.init_std) and config.init_std >= 0):
        raise UserError(f"{path}: initializer_range={config.init_std} must not be negative")
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"{path}: num_heads={config.num_heads} is no multiple of num_kv_heads={config.num_kv_heads}")
    if config.head_dim % 2:
        raise UserError(f"{path}: head_dim={config.head_dim} is odd, but positions rotate pairs")
    for spec in dict.fromkeys(config.pattern):
        check_rotation(spec, config.head_dim, path)
    return config


def check_rotation(spec: LayerSpec, head_dim: int, path: Path) -> None:
    """Checks that a layer's rotary frequencies are numbers.

    Raises:
      UserError: names the keys that make them.
    """
    if (turned := rotary_dim(spec, head_dim)) % 2 or not 0 < turned <= head_dim:
        raise UserError(
            f"{path}: partial_rotary_factor={spec.rope_fraction} rotates {turned} of head_dim={head_dim}, "
            "but positions rotate pairs"
        )
    try:
        with np.errstate(all="ignore"):
            frequencies = rope_frequencies(spec, head_dim)
        sound = bool(np.isfinite(frequencies).all() and (frequencies >= 0).all())
    except (ValueError, ArithmeticError):
        sound = False
    if not sound:
        raise UserError(
            f"{path}: rope_theta={spec.rope_theta} with rope_scaling {spec.rope_scaling} makes rotary frequencies that "
            "are no positive numbers: correct rope_parameters (or rope_theta and rope_scaling)"
        )


def _constants(config: DecoderConfig) -> Iterator[tuple[str, float | None]]:
    """Every constant that must be positive where it is given."""
    yield "norm_eps (rms_norm_eps or layer_norm_eps)", config.norm_eps
    yield "final_logit_softcapping", config.final_soft_cap
    for spec in dict.fromkeys(config.pattern):
        yield "rope_theta", spec.rope_theta
        yield "sliding_window", spec.window
        yield "partial_rotary_factor", spec.rope_fraction
        yield "attn_logit_softcapping", spec.soft_cap
        yield "the scale of attention", spec.scale
        if (scaling := spec.rope_scaling) is not None:
            yield "rope factor", scaling.factor
            yield "rope attention_factor", scaling.attention_factor
            yield "original_max_position_embeddings", scaling.original_positions
            if scaling.kind == "llama3":
                yield "high_freq_factor - low_freq_factor", scaling.high - scaling.low
