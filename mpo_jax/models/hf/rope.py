"""config.json's keys of the rotary position embedding to ours and back, as transformers 5 and 4 have them."""

import math
from pathlib import Path
from typing import Any

from mpo_jax.errors import UserError
from mpo_jax.models.spec import LayerSpec, RopeScaling

KINDS = ("default", "linear", "llama3", "yarn", "dynamic")
"""The values of rope_type that are understood."""


ACROSS = (
    "low_freq_factor",
    "high_freq_factor",
    "beta_slow",
    "beta_fast",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
"""Further numbers of one kind of scaling or another."""


def read_scaling(rope: dict[str, Any], max_positions: int, path: Path) -> RopeScaling | None:
    """How the frequencies are stretched, by the `rope_parameters` of one layer.

    Raises:
      UserError: another kind of scaling.
      KeyError: a key that this kind needs is missing.
    """
    kind = rope.get("rope_type", "default")
    if kind not in KINDS:
        raise UserError(f"{path}: rope_type={kind!r} is not supported; supported: {', '.join(KINDS)}")
    if kind == "default":
        return None
    for key in ("factor", "original_max_position_embeddings", *ACROSS):
        if rope.get(key) is not None and (isinstance(rope[key], bool) or not isinstance(rope[key], int | float)):
            raise UserError(f"{path}: {key}={rope[key]!r} in the rope parameters is not a number")
    if rope.get("original_max_position_embeddings") == 0:
        raise UserError(f"{path}: original_max_position_embeddings=0 must be positive")
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, float(rope["factor"]))
    original = int(rope["original_max_position_embeddings"])
    if kind == "llama3":
        return RopeScaling(
            "llama3", float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), original
        )
    factor = max_positions / original if rope["factor"] is None else float(rope["factor"])
    return RopeScaling(
        "yarn",
        factor,
        # 0 means the default too
        float(rope.get("beta_slow") or 1),
        float(rope.get("beta_fast") or 32),
        original,
        _attention_factor(rope, factor),
        bool(rope.get("truncate", True)),
    )


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    """yarn's factor of queries and keys: as given, or 0.1 mscale ln(factor) + 1 over the same with mscale_all_dim.

    Without both of these, 0.1 ln(factor) + 1: equation 22 of arXiv:2309.00071.
    """
    if (given := rope.get("attention_factor")) is not None:
        return float(given)

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1.0)


def written_rope(spec: LayerSpec, *, partial: bool) -> dict[str, Any]:
    """A layer's `rope_parameters`.

    Args:
      partial: say which part of a head is rotated.
    """
    rope = {"rope_theta": spec.rope_theta, "rope_type": "default", **(_written_scaling(spec.rope_scaling) or {})}
    return rope | {"partial_rotary_factor": spec.rope_fraction} if partial else rope


def _written_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """`rope_scaling` as transformers 4 has it: None where nothing is stretched."""
    if scaling is None:
        return None
    keys: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("linear", "dynamic"):
        return keys
    keys["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        return keys | {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    keys |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "attention_factor": scaling.attention_factor}
    return keys if scaling.truncate else keys | {"truncate": False}


def older_keys(spec: LayerSpec, names: dict[str, str]) -> dict[str, Any]:
    """What transformers 4 reads of a layer in place of `rope_parameters`; version 5 reads both, and finds them alike.

    Args:
      names: what the family calls rope_theta, rope_fraction and rope_scaling there; one without a name is left out.
    """
    values = {
        "rope_theta": spec.rope_theta,
        "rope_fraction": spec.rope_fraction,
        "rope_scaling": _written_scaling(spec.rope_scaling),
    }
    # absent stands for null, of which version 5 warns
    return {names[field]: value for field, value in values.items() if field in names and value is not None}


def check_agrees(raw: dict[str, Any], spec: LayerSpec, names: dict[str, str], max_positions: int, path: Path) -> None:
    """Checks a config.json that has the older keys besides `rope_parameters`, from which `spec` was read.

    transformers 4 reads the one and version 5 the other, or a mixture of both.

    Args:
      names: as for `older_keys`.

    Raises:
      UserError: where they differ; names the key.
    """
    expected = {"rope_theta": spec.rope_theta, "rope_fraction": spec.rope_fraction}
    for field, value in expected.items():
        given = raw.get(names.get(field, ""))
        if given is not None and given != value:
            raise UserError(
                f"{path}: {names[field]}={given!r}, but rope_parameters say {value!r}: remove the one that is wrong"
            )
    scaling = raw.get(names.get("rope_scaling", ""))
    parameters = raw["rope_parameters"]
    if isinstance(scaling, dict) and isinstance(parameters, dict):
        both = [
            dict(one) | {"rope_type": one.get("rope_type", one.get("type", "default"))} for one in (scaling, parameters)
        ]
        # rope_parameters by kinds of layers are compared with what was read of them
        here = spec.rope_scaling if "rope_theta" not in parameters else read_scaling(both[1], max_positions, path)
        if read_scaling(both[0], max_positions, path) != here:
            raise UserError(
                f"{path}: rope_scaling={scaling!r}, but rope_parameters={parameters!r}: remove the one that is wrong"
            )
