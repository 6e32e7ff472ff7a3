"""Hugging Face folders to parameters and back, both ways through one table. No torch, no pickle."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub.errors import StrictDataclassError
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import LlamaConfig

from mpo_jax.errors import UserError
from mpo_jax.model import functional
from mpo_jax.model.decoder import DecoderConfig
from mpo_jax.types import Params


@dataclass(frozen=True)
class Entry:
    """One parameter: its dotted path here, its name there, and the two ways between the layouts.

    `{i}` in the name is the layer. Both functions act on one layer's array.
    """

    path: str
    name: str
    to_ours: Callable[[np.ndarray, DecoderConfig], np.ndarray]
    to_theirs: Callable[[np.ndarray, DecoderConfig], np.ndarray]

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name

    def their_shape(self, shape: tuple[int, ...], config: DecoderConfig) -> tuple[int, ...]:
        """The shape there of one layer's array that has `shape` here."""
        return self.to_theirs(np.empty(shape, np.bool_), config).shape


def _same(path: str, name: str) -> Entry:
    return Entry(path, name, lambda w, c: w, lambda w, c: w)


def _transposed(path: str, name: str) -> Entry:
    return Entry(path, name, lambda w, c: w.T, lambda w, c: w.T)


def _heads_out(path: str, name: str) -> Entry:
    """[heads * K, D] there, [D, heads, K] here."""
    return Entry(
        path, name, lambda w, c: w.T.reshape(w.shape[1], -1, c.head_dim), lambda w, c: w.reshape(w.shape[0], -1).T
    )


def _heads_in(path: str, name: str) -> Entry:
    """[D, heads * K] there, [heads, K, D] here."""
    return Entry(
        path, name, lambda w, c: w.T.reshape(-1, c.head_dim, w.shape[0]), lambda w, c: w.reshape(-1, w.shape[-1]).T
    )


TABLE = (
    _same("embedding", "model.embed_tokens.weight"),
    _same("norm.scale", "model.norm.weight"),
    _transposed("head", "lm_head.weight"),
    _transposed("score.kernel", "score.weight"),
    _same("layers.attention_norm.scale", "model.layers.{i}.input_layernorm.weight"),
    _heads_out("layers.attention.q", "model.layers.{i}.self_attn.q_proj.weight"),
    _heads_out("layers.attention.k", "model.layers.{i}.self_attn.k_proj.weight"),
    _heads_out("layers.attention.v", "model.layers.{i}.self_attn.v_proj.weight"),
    _heads_in("layers.attention.o", "model.layers.{i}.self_attn.o_proj.weight"),
    _same("layers.mlp_norm.scale", "model.layers.{i}.post_attention_layernorm.weight"),
    _transposed("layers.mlp.gate", "model.layers.{i}.mlp.gate_proj.weight"),
    _transposed("layers.mlp.up", "model.layers.{i}.mlp.up_proj.weight"),
    _transposed("layers.mlp.down", "model.layers.{i}.mlp.down_proj.weight"),
)
ENTRIES = {entry.path: entry for entry in TABLE}


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
    if raw.get("model_type") != "llama":
        raise UserError(f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: llama")
    try:
        config = LlamaConfig.from_dict(raw)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    refused = {
        "rope_type": rope.get("rope_type", "default") != "default",
        "hidden_act": config.hidden_act != "silu",
        "attention_bias": bool(config.attention_bias),
        "mlp_bias": bool(config.mlp_bias),
    }
    for key, bad in refused.items():
        if bad:
            raise UserError(f"{path}: {key}={rope.get(key) or getattr(config, key, None)!r} is not supported")
    return DecoderConfig(
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        num_layers=int(config.num_hidden_layers),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads or config.num_attention_heads),
        head_dim=int(config.head_dim or config.hidden_size // config.num_attention_heads),
        max_positions=int(config.max_position_embeddings),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        norm_eps=float(config.rms_norm_eps),
        tie_embeddings=bool(config.tie_word_embeddings),
        init_std=float(config.initializer_range),
    )


def load_params(folder: str | Path, config: DecoderConfig, mesh: Mesh, *, scalar: bool, dtype: str) -> Params:
    """Parameters of a folder, placed on the mesh.

    Args:
      scalar: True for a reward model or critic (`score.weight` in place of a language-model head).
      dtype: storage type of every parameter.

    Raises:
      UserError: a missing or broken file, a missing tensor, or one of another shape; names the tensor.
    """
    wanted: dict[tuple[str, ...], Any] = flatten_dict(functional.abstract_params(config, scalar=scalar))
    files = _tensor_files(Path(folder))
    shardings = flatten_dict(functional.param_shardings(unflatten_dict(wanted), mesh))
    params = {}
    for path, shape in wanted.items():
        entry = ENTRIES[".".join(path)]
        names = [entry.name.format(i=i) for i in range(config.num_layers)] if entry.stacked else [entry.name]
        layer_shape = shape.shape[1:] if entry.stacked else shape.shape
        layers = [_read_tensor(files, name, folder) for name in names]
        _check_shapes(folder, dict(zip(names, layers, strict=True)), entry.their_shape(layer_shape, config))
        layers = [entry.to_ours(layer, config) for layer in layers]
        whole = np.stack(layers) if entry.stacked else layers[0]
        params[path] = jax.device_put(whole.astype(dtype), shardings[path])
    return unflatten_dict(params)


def _check_shapes(folder: str | Path, tensors: dict[str, np.ndarray], shape: tuple[int, ...]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise UserError(
                f"{folder}: tensor {name} has shape {tensor.shape}, but config.json asks for {shape}: "
                "the weights and config.json do not belong together"
            )


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{index}: broken index: {error}") from error
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise UserError(f"no weights in {folder}: neither model.safetensors nor model.safetensors.index.json is there")
    try:
        with safe_open(single, framework="np") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{single}: broken safetensors file: {error}") from error


def _read_tensor(files: dict[str, Path], name: str, folder: str | Path) -> np.ndarray:
    if name not in files:
        raise UserError(f"{folder}: tensor {name} is missing; the folder holds {len(files)} others")
    try:
        with safe_open(files[name], framework="np") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{files[name]}: cannot read tensor {name}: {error}") from error


def save_params(
    folder: Path, params: Params, config: DecoderConfig, *, eos_id: int, bos_id: int | None, pad_id: int | None = None
) -> None:
    """Writes config.json and model.safetensors (float32), which transformers loads as a causal or classification model.

    A model with a scalar head is a LlamaForSequenceClassification with one label; transformers finds the token that it
    reads in a padded batch by `pad_id`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    host = flatten_dict(jax.device_get(params))
    tensors: dict[str, np.ndarray] = {}
    for path, value in host.items():
        entry = ENTRIES[".".join(path)]
        array = np.asarray(value, np.float32)
        for i, layer in enumerate(array if entry.stacked else [array]):
            tensors[entry.name.format(i=i)] = np.ascontiguousarray(entry.to_theirs(layer, config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scalar = "score" in params
    described = LlamaConfig(
        architectures=["LlamaForSequenceClassification" if scalar else "LlamaForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=config.init_std,
        eos_token_id=eos_id,
        bos_token_id=bos_id,
        pad_token_id=pad_id,
    )
    if scalar:
        described.num_labels = 1
    described.dtype = "float32"
    (folder / "config.json").write_text(described.to_json_string(use_diff=False), encoding="utf-8")
