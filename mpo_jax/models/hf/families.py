"""Which Hugging Face architectures are understood, and their config.json to our sizes and back."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from mpo_jax.errors import UserError
from mpo_jax.models.spec import Activation, DecoderConfig, LayerSpec, RopeScaling, shortest_pattern
from mpo_jax.types import Head


@dataclass(frozen=True)
class Family:
    """One model_type: transformers' configuration class, the prefix of its model classes' names, what it always has.

    Attributes:
      sliding_window: whether its config.json has that key.
      layer_types: whether it also says which layers have the window.
    """

    config: Any
    prefix: str
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: bool = False
    layer_types: bool = False


FAMILIES = {
    "llama": Family(LlamaConfig, "Llama"),
    "mistral": Family(MistralConfig, "Mistral", sliding_window=True),
    "qwen2": Family(Qwen2Config, "Qwen2", qkv_bias=True, sliding_window=True, layer_types=True),
    "qwen3": Family(Qwen3Config, "Qwen3", qk_norm=True, sliding_window=True, layer_types=True),
}

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""hidden_act in config.json -> LayerSpec.activation."""


def read_config(folder: str | Path) -> DecoderConfig:
    """Sizes from a folder's config.json.

    Raises:
      UserError: a missing or broken file, or an architecture or option that is not supported; names the key.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"no model at {folder}: config.json is missing (model.path wants a Hugging Face folder)")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: broken JSON: expected an object, found {type(raw).__name__}")
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise UserError(
            f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    try:
        config: Any = family.config.from_dict(raw)
        return check_sizes(_to_ours(config, family, path), path)
    except (StrictDataclassError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def check_sizes(config: DecoderConfig, path: Path) -> DecoderConfig:
    """The same sizes.

    Raises:
      UserError: if no model can have them; names the size and `path`.
    """
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
        "max_positions",
    )  # fmt: skip
    sizes = [(name, getattr(config, name)) for name in names]
    for spec in config.pattern:
        sizes += [("rope_theta", spec.rope_theta), ("sliding_window", spec.window)]
    for name, size in sizes:
        if size is not None and not size > 0:
            raise UserError(f"{path}: {name}={size} must be positive")
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"{path}: num_heads={config.num_heads} is no multiple of num_kv_heads={config.num_kv_heads}")
    if config.head_dim % 2:
        raise UserError(f"{path}: head_dim={config.head_dim} is odd, but positions rotate pairs")
    return config


def read_head(folder: Path) -> Head:
    """The head that a folder's config.json describes, which `read_config` has read."""
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    return "value" if architectures[0].endswith("ForSequenceClassification") else "lm"


def _to_ours(config: Any, family: Family, path: Path) -> DecoderConfig:
    refused = {
        "hidden_act": config.hidden_act not in ACTIVATIONS,
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
    }
    for key, bad in refused.items():
        if bad:
            raise UserError(f"{path}: {key}={getattr(config, key)!r} is not supported")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{path}: quantization_config is not supported: take the model's unquantised weights")
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    layer = LayerSpec(
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope, path),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        activation=ACTIVATIONS[config.hidden_act],
    )
    windows = _windows(config, family, path) if family.sliding_window else [None]
    return DecoderConfig(
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        num_layers=int(config.num_hidden_layers),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads or config.num_attention_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        max_positions=int(config.max_position_embeddings),
        norm_eps=float(config.rms_norm_eps),
        tie_embeddings=bool(config.tie_word_embeddings),
        init_std=float(config.initializer_range),
        family=config.model_type,
        pattern=shortest_pattern([replace(layer, window=window) for window in windows]),
    )


def _rope_scaling(rope: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", "default")
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise UserError(f"{path}: rope_type={kind!r} is not supported; supported: default, linear, llama3")


def _windows(config: Any, family: Family, path: Path) -> list[int | None]:
    """Every layer's window, or a single one for all."""
    window = None if config.sliding_window is None else int(config.sliding_window)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return [window]
    known = {"full_attention": None, "sliding_attention": window}
    if not set(kinds) <= known.keys() or (len(set(kinds)) > 1 and not family.layer_types):
        wanted = "each can be full_attention or sliding_attention" if family.layer_types else "all must be alike"
        raise UserError(f"{path}: layer_types {', '.join(sorted(set(kinds)))} are not supported: {wanted}")
    if "sliding_attention" in kinds and window is None:
        raise UserError(
            f"{path}: layer_types has sliding_attention, but sliding_window or use_sliding_window is not set"
        )
    return [known[kind] for kind in kinds]


def save_config(
    folder: Path,
    config: DecoderConfig,
    *,
    head: Head,
    eos_id: int,
    bos_id: int | None,
    pad_id: int | None = None,
    dtype: str = "float32",
) -> None:
    """Writes the config.json of an exported model: a causal language model, or a classifier with one label.

    transformers finds the token that a classifier reads in a padded batch by `pad_id`.

    Raises:
      UserError: if a config.json of this family cannot describe the model.
    """
    family, layer = FAMILIES[config.family], config.pattern[0]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": layer.rope_theta}
    if (scaling := layer.rope_scaling) is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                "original_max_position_embeddings": scaling.original_positions,
            }
    described = family.config(
        architectures=[family.prefix + ("ForSequenceClassification" if head == "value" else "ForCausalLM")],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rope_parameters=rope,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=config.init_std,
        eos_token_id=eos_id,
        bos_token_id=bos_id,
        pad_token_id=pad_id,
        hidden_act={ours: theirs for theirs, ours in ACTIVATIONS.items()}[layer.activation],
        **_window_keys(config, family),
    )
    path = folder / "config.json"
    _check_described(config, _to_ours(described, family, path), path)
    if head == "value":
        described.num_labels = 1
    described.dtype = dtype
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(described.to_json_string(use_diff=False), encoding="utf-8")


def _window_keys(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The keys of config.json that say which layers have a window."""
    if not family.sliding_window:
        return {}
    windows = [spec.window for spec in config.layers]
    window = next((window for window in windows if window is not None), None)
    if not family.layer_types:
        return {"sliding_window": window}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    # older readers know no layer_types: they give the window to the layers from max_window_layers on
    first = kinds.index("sliding_attention") if window is not None else 0
    return {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def _check_described(config: DecoderConfig, described: DecoderConfig, path: Path) -> None:
    """Raises UserError if config.json describes other layers than these; names the first field that differs."""
    for i, (ours, theirs) in enumerate(zip(config.layers, described.layers, strict=True)):
        for field in fields(ours):
            if (value := getattr(ours, field.name)) != getattr(theirs, field.name):
                raise UserError(
                    f"{path}: layer {i} has {field.name}={value!r}, which the config.json of a {config.family} model "
                    "cannot express"
                )
