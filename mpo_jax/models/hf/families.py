"""Which Hugging Face architectures are understood, and their config.json to our sizes and back."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from mpo_jax.errors import UserError
from mpo_jax.models.hf.rope import check_agrees, older_keys, read_scaling, written_rope
from mpo_jax.models.hf.sizes import check_given, check_sizes
from mpo_jax.models.spec import Activation, DecoderConfig, LayerSpec, Norm, shortest_pattern
from mpo_jax.types import Head
from mpo_jax.untrusted import read_json


@dataclass(frozen=True)
class Family:
    """One model_type: transformers' configuration class, the prefix of its model classes' names, what it always has.

    Attributes:
      config: the class's name, since with the class comes the list of all of transformers' models, in half a second.
      layer: what all its layers have.
      norm, scale_embedding: as in DecoderConfig.
      sliding_window: whether its config.json has that key.
      layer_types: whether it also says which layers have the window.
      classifier: the prefix of its sequence classifier's name, where it is another.
      gemma: whether it has a key for attention's scale, and keys for both soft caps.
      plain_heads: as many key and value heads as heads, each of hidden_size / heads; there are no keys for them.
      refused: options that are not supported, besides REFUSED.
      switches: keys that turn boolean fields of LayerSpec on and off.
      renamed: keys that are called otherwise than in Llama's config.json.
      rope_by_kind: rope_parameters are given for each of the layer types.
      older_rope: what transformers 4 calls rope_theta, rope_fraction and rope_scaling, of layers that see all.
    """

    config: str
    prefix: str
    layer: LayerSpec = field(default_factory=LayerSpec)
    classifier: str | None = None
    norm: Norm = "rms"
    scale_embedding: bool = False
    sliding_window: bool = False
    layer_types: bool = False
    gemma: bool = False
    plain_heads: bool = False
    refused: tuple[str, ...] = ()
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    rope_by_kind: bool = False
    older_rope: Mapping[str, str] = field(
        default_factory=lambda: {"rope_theta": "rope_theta", "rope_scaling": "rope_scaling"}
    )

    @property
    def config_class(self) -> Any:
        """transformers' class by which config.json is read and written."""
        return getattr(transformers, self.config)

    def key(self, name: str) -> str:
        """What its config.json calls a key of Llama's."""
        return self.renamed.get(name, name)


FAMILIES = {
    "llama": Family("LlamaConfig", "Llama"),
    "mistral": Family("MistralConfig", "Mistral", sliding_window=True),
    "qwen2": Family("Qwen2Config", "Qwen2", LayerSpec(qkv_bias=True), sliding_window=True, layer_types=True),
    "qwen3": Family("Qwen3Config", "Qwen3", LayerSpec(qk_norm=True), sliding_window=True, layer_types=True),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2",
        LayerSpec(norm_places="around"),
        norm="rms_offset",
        scale_embedding=True,
        sliding_window=True,
        layer_types=True,
        gemma=True,
        renamed={"hidden_act": "hidden_activation"},
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        "Gemma3",
        LayerSpec(norm_places="around", qk_norm=True),
        classifier="Gemma3Text",
        norm="rms_offset",
        scale_embedding=True,
        sliding_window=True,
        layer_types=True,
        gemma=True,
        # transformers reads it and does not use it
        refused=("attn_logit_softcapping",),
        renamed={"hidden_act": "hidden_activation"},
        rope_by_kind=True,
    ),
    "olmo2": Family("Olmo2Config", "Olmo2", LayerSpec(norm_places="after", qk_norm=True, qk_norm_joint=True)),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        "GPTNeoX",
        LayerSpec(
            rope_fraction=0.25,
            qkv_bias=True,
            output_bias=True,
            gated=False,
            mlp_bias=True,
            activation="gelu",
            parallel=True,
        ),
        norm="layer",
        plain_heads=True,
        switches={"attention_bias": ("qkv_bias", "output_bias"), "use_parallel_residual": ("parallel",)},
        renamed={"rms_norm_eps": "layer_norm_eps"},
        older_rope={"rope_theta": "rotary_emb_base", "rope_fraction": "rotary_pct", "rope_scaling": "rope_scaling"},
    ),
}

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}
"""hidden_act in config.json -> LayerSpec.activation; the first of several names is the one that is written."""

FULL, LOCAL = "full_attention", "sliding_attention"
"""The values of layer_types that are understood."""

OLDER_LOCAL = {"rope_theta": "rope_local_base_freq"}
"""What transformers 4 calls the rotary base of Gemma 3's layers with a window."""

REFUSED = ("attention_bias", "mlp_bias", "use_bidirectional_attention")
"""Options that are not supported where a family has no switch for them."""


def read_config(folder: str | Path) -> DecoderConfig:
    """Sizes from a folder's config.json.

    Raises:
      UserError: a missing or broken file, or an architecture or option that is not supported; names the key.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        inside = Path(folder) / "model"
        hint = f": name {inside}" if (inside / "config.json").is_file() else " (a Hugging Face folder has one)"
        raise UserError(f"no model at {folder}: config.json is missing{hint}")
    raw = read_json(path)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise UserError(
            f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    check_given(raw, path)
    try:
        # from_dict changes what it is given
        config: Any = family.config_class.from_dict(copy.deepcopy(raw))
        sizes = check_sizes(_to_ours(config, family, path), path)
        _check_rope_agrees(raw, sizes, family, path)
        return sizes
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0] if ' ' in str(error) else f'the key {error} is missing'}") from error
    except (StrictDataclassError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def read_head(folder: Path) -> Head:
    """The head that a folder's config.json describes, which `read_config` has read."""
    named = read_json(folder / "config.json").get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return "value" if str(first).endswith("ForSequenceClassification") else "lm"


def _to_ours(config: Any, family: Family, path: Path) -> DecoderConfig:
    activation = getattr(config, family.key("hidden_act"))
    refused = {family.key("hidden_act"): activation not in ACTIVATIONS}
    refused |= {
        key: bool(getattr(config, key, False)) for key in (*REFUSED, *family.refused) if key not in family.switches
    }
    for key, bad in refused.items():
        if bad:
            raise UserError(f"{path}: {key}={getattr(config, key)!r} is not supported")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{path}: quantization_config is not supported: take the model's unquantised weights")
    heads = int(config.num_attention_heads)
    kv_heads, head_dim = heads, config.hidden_size // heads
    if not family.plain_heads:
        kv_heads, head_dim = config.num_key_value_heads or kv_heads, getattr(config, "head_dim", None) or head_dim
    on = {name: bool(getattr(config, key)) for key, names in family.switches.items() for name in names}
    layer = replace(family.layer, activation=ACTIVATIONS[activation], **on)
    if family.gemma:
        scalar = config.query_pre_attn_scalar
        if not scalar > 0:
            raise UserError(f"{path}: query_pre_attn_scalar={scalar!r} must be positive")
        layer = replace(layer, soft_cap=config.attn_logit_softcapping)
        layer = replace(layer, scale=None if scalar == head_dim else float(scalar) ** -0.5)
    kinds = _kinds(config, family, path)
    ropes = {kind: _rope(config, family, kind, path) for kind in dict(kinds)}
    return DecoderConfig(
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        num_layers=int(config.num_hidden_layers),
        num_heads=heads,
        num_kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        max_positions=int(config.max_position_embeddings),
        norm_eps=float(getattr(config, family.key("rms_norm_eps"))),
        tie_embeddings=bool(config.tie_word_embeddings),
        init_std=float(config.initializer_range),
        family=config.model_type,
        pattern=shortest_pattern([replace(layer, window=window, **ropes[kind]) for kind, window in kinds]),
        norm=family.norm,
        scale_embedding=family.scale_embedding,
        final_soft_cap=config.final_logit_softcapping if family.gemma else None,
    )


def _rope(config: Any, family: Family, kind: str, path: Path) -> dict[str, Any]:
    """The rotary fields of a layer of this kind."""
    given: Any = config.rope_parameters or {}
    rope: dict[str, Any] = dict(given.get(kind) or {}) if family.rope_by_kind else dict(given)
    fraction = float(rope.get("partial_rotary_factor", 1.0))
    if fraction != 1.0 and "rope_fraction" not in family.older_rope:
        raise UserError(f"{path}: partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported")
    theta = rope.get("rope_theta", 10000.0)
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise UserError(f"{path}: rope_theta={theta!r} is not a number")
    return {
        "rope_theta": float(theta),
        "rope_scaling": read_scaling(rope, int(config.max_position_embeddings), path),
        "rope_fraction": fraction,
    }


def _check_rope_agrees(raw: dict[str, Any], config: DecoderConfig, family: Family, path: Path) -> None:
    """Raises UserError where rope_parameters and the older keys of the rotation say different things."""
    if raw.get("rope_parameters") is None:
        return
    check_agrees(raw, _of_kind(config, FULL), dict(family.older_rope), config.max_positions, path)
    if family.rope_by_kind:
        check_agrees(raw, _of_kind(config, LOCAL), OLDER_LOCAL, config.max_positions, path)


def _kinds(config: Any, family: Family, path: Path) -> list[tuple[str, int | None]]:
    """Every layer's kind and window, or a single pair for all."""
    if not family.sliding_window:
        return [(FULL, None)]
    window = None if config.sliding_window is None else int(config.sliding_window)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return [(FULL if window is None else LOCAL, window)]
    known = {FULL: None, LOCAL: window}
    if not set(kinds) <= known.keys() or (len(set(kinds)) > 1 and not family.layer_types):
        wanted = "each can be full_attention or sliding_attention" if family.layer_types else "all must be alike"
        raise UserError(f"{path}: layer_types {', '.join(sorted(set(kinds)))} are not supported: {wanted}")
    if LOCAL in kinds and window is None:
        raise UserError(
            f"{path}: layer_types has sliding_attention, but sliding_window or use_sliding_window is not set"
        )
    return [(kind, known[kind]) for kind in kinds]


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

    transformers finds the token that a classifier reads in a padded batch by `pad_id`. Rotary parameters are written as
    transformers 5 and as transformers 4 read them.

    Raises:
      UserError: if a config.json of this family cannot describe the model.
    """
    family, layer = FAMILIES[config.family], config.pattern[0]
    classifier = f"{family.classifier or family.prefix}ForSequenceClassification"
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    described = family.config_class(
        architectures=[classifier if head == "value" else f"{family.prefix}ForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=config.init_std,
        eos_token_id=eos_id,
        bos_token_id=bos_id,
        pad_token_id=pad_id,
        **{family.key("rms_norm_eps"): config.norm_eps, family.key("hidden_act"): activations[layer.activation]},
        **({} if family.plain_heads else {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}),
        **{key: getattr(layer, names[0]) for key, names in family.switches.items()},
        **(_gemma_keys(config) if family.gemma else {}),
        **_window_keys(config, family),
        rope_parameters=_rope_keys(config, family),
    )
    path = folder / "config.json"
    _check_described(config, _to_ours(described, family, path), path)
    if head == "value":
        described.num_labels = 1
    described.dtype = dtype
    written = json.loads(described.to_json_string(use_diff=False)) | _older_rope_keys(config, family)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _gemma_keys(config: DecoderConfig) -> dict[str, Any]:
    layer = config.pattern[0]
    return {
        "query_pre_attn_scalar": config.head_dim if layer.scale is None else round(layer.scale**-2),
        "attn_logit_softcapping": layer.soft_cap,
        "final_logit_softcapping": config.final_soft_cap,
    }


def _of_kind(config: DecoderConfig, kind: str) -> LayerSpec:
    """The first layer that has a window, or none; layer 0 where there is no such layer."""
    return next((spec for spec in config.layers if (spec.window is None) == (kind == FULL)), config.layers[0])


def _rope_keys(config: DecoderConfig, family: Family) -> dict[str, Any]:
    partial = "rope_fraction" in family.older_rope
    if not family.rope_by_kind:
        return written_rope(config.pattern[0], partial=partial)
    return {kind: written_rope(_of_kind(config, kind), partial=partial) for kind in (FULL, LOCAL)}


def _older_rope_keys(config: DecoderConfig, family: Family) -> dict[str, Any]:
    keys = older_keys(_of_kind(config, FULL), dict(family.older_rope))
    return keys | older_keys(_of_kind(config, LOCAL), OLDER_LOCAL) if family.rope_by_kind else keys


def _window_keys(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The keys of config.json that say which layers have a window."""
    if not family.sliding_window:
        return {}
    windows = [spec.window for spec in config.layers]
    window = next((window for window in windows if window is not None), None)
    if not family.layer_types:
        return {"sliding_window": window}
    kinds = [FULL if window is None else LOCAL for window in windows]
    if family.gemma:
        # transformers makes a mask of the window even where no layer has it: then the default must stay
        return {"layer_types": kinds} | ({} if window is None else {"sliding_window": window})
    # older readers know no layer_types: they give the window to the layers from max_window_layers on
    first = kinds.index(LOCAL) if window is not None else 0
    return {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def _check_described(config: DecoderConfig, described: DecoderConfig, path: Path) -> None:
    """Raises UserError if config.json describes another model than this; names the first field that differs."""
    cannot = f"which the config.json of a {config.family} model cannot express"
    for i, (ours, theirs) in enumerate(zip(config.layers, described.layers, strict=True)):
        for name in (option.name for option in fields(ours)):
            if (value := getattr(ours, name)) != getattr(theirs, name):
                raise UserError(f"{path}: layer {i} has {name}={value!r}, {cannot}")
    for name in (size.name for size in fields(config) if size.name != "pattern"):
        if (value := getattr(config, name)) != getattr(described, name):
            raise UserError(f"{path}: the model has {name}={value!r}, {cannot}")
