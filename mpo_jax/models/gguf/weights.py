"""The model inside a GGUF file: its sizes, and its tensors under Hugging Face's names and in Hugging Face's layout."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.errors import UserError
from mpo_jax.models.gguf.file import GgufFile, open_gguf
from mpo_jax.models.hf.families import FAMILIES
from mpo_jax.models.hf.sizes import check_sizes
from mpo_jax.models.hf.table import TABLE
from mpo_jax.models.rope import rope_frequencies
from mpo_jax.models.spec import DecoderConfig, RopeScaling

LAYER = re.compile(r"blk\.(\d+)\.")
NAMES = {entry.gguf: entry.name for entry in TABLE if entry.gguf is not None}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's divisors of the rotary frequencies, [K/2], which llama.cpp stores in place of their four constants."""


def read_config(path: Path) -> DecoderConfig:
    """Sizes from a GGUF file's metadata.

    Raises:
      UserError: a corrupt file, or an architecture or option that is not supported; names the key.
    """
    file = open_gguf(path)
    if file.get("split.count", 1) != 1:
        raise UserError(f"{path} is one of several parts: join them first (llama-gguf-split --merge)")
    family = str(file.require("general.architecture"))
    if family not in ARCHITECTURES:
        raise UserError(
            f"{path}: general.architecture={family!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )

    def number(key: str, default: float | None = None) -> Any:
        name = f"{family}.{key}"
        value = file.require(name) if default is None else file.get(name, default)
        if not isinstance(value, int | float):
            raise UserError(f"{path}: {name}={value!r} is not supported: expected one number")
        return value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // max(heads, 1))
    # the shortest decimals that mean the stored float32, as they stand in config.json
    rope_theta = float(str(np.float32(number("rope.freq_base", 10000.0))))
    layer = replace(FAMILIES[family].layer, rope_theta=rope_theta)
    config = DecoderConfig(
        vocab_size=number("vocab_size", len(file.get("tokenizer.ggml.tokens", []))),
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length"),
        num_layers=number("block_count"),
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_positions=number("context_length"),
        norm_eps=float(str(np.float32(number("attention.layer_norm_rms_epsilon")))),
        tie_embeddings="output.weight" not in file.tensors,
        family=family,
        pattern=(layer,),
    )
    check_sizes(config, path)
    layers = {int(match[1]) for match in map(LAYER.match, file.tensors) if match}
    if layers != set(range(len(layers))) or len(layers) != config.num_layers:
        raise UserError(
            f"{path}: {family}.block_count={config.num_layers}, but there are tensors of {len(layers)} layers: "
            "fetch the file again"
        )
    if (turned := number("rope.dimension_count", head_dim)) != head_dim:
        raise UserError(f"{path}: {family}.rope.dimension_count={turned} of {head_dim} is not supported")
    return check_sizes(replace(config, pattern=(replace(layer, rope_scaling=_rope_scaling(file, config)),)), path)


def _rope_scaling(file: GgufFile, config: DecoderConfig) -> RopeScaling | None:
    kind = file.get(f"{config.family}.rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling("linear", float(file.require(f"{config.family}.rope.scaling.factor")))
    if kind != "none":
        raise UserError(f"{file.path}: {config.family}.rope.scaling.type={kind!r} is not supported")
    if ROPE_FACTORS not in file.tensors:
        return None
    divisors = file.read(ROPE_FACTORS)
    scaling = RopeScaling("llama3", float(divisors.max()))
    layer, head_dim = config.pattern[0], config.head_dim
    scaled = rope_frequencies(replace(layer, rope_scaling=scaling), head_dim)
    if divisors.shape != (head_dim // 2,) or not np.allclose(
        rope_frequencies(layer, head_dim) / divisors, scaled, rtol=1e-4
    ):
        raise UserError(f"{file.path}: tensor {ROPE_FACTORS} is not the scaling of Llama 3.1 or later: not supported")
    return scaling


class GgufTensors:
    """The tensors of a GGUF file by their Hugging Face names."""

    def __init__(self, path: Path):
        self.where = str(path)
        self._file = open_gguf(path)
        self._config = read_config(path)
        self._names = {_renamed(name): name for name in self._file.tensors if name != ROPE_FACTORS}

    dtype = "float32"
    """The type in which tensors are read, whatever the file's own."""

    def names(self) -> set[str]:
        return set(self._names)

    def check(self) -> None:
        # opening the file has compared the header with its size
        pass

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._file.tensors[self._names[name]].shape))

    def read(self, name: str) -> np.ndarray:
        tensor = self._file.read(self._names[name])
        if self._config.family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            return _halves(tensor, self._config.head_dim)
        return tensor


def _renamed(name: str) -> str:
    """The Hugging Face name; a tensor that the table does not know keeps its own, to be refused by it."""
    layer = LAYER.match(name)
    known = NAMES.get(LAYER.sub("blk.{i}.", name))
    return name if known is None else known.format(i=layer[1]) if layer else known


def _halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Each head's rows from llama.cpp's order, in which rotated pairs are neighbours, to halves: 0 2 4 ... 1 3 5 ..."""
    if weight.ndim != 2 or weight.shape[0] % head_dim:
        return weight
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
