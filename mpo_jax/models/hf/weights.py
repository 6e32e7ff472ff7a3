"""Checkpoints to parameters and back, both ways through one table, one tensor at a time. No torch, no pickle."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpo_jax.errors import UserError
from mpo_jax.models import forward, quantised
from mpo_jax.models.decoder import FLOAT32
from mpo_jax.models.kernels import KERNELS, Kernel
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime.processes import wait
from mpo_jax.types import Head, Tree

SHARD_BYTES = 2 * 2**30
"""Size of an exported file, and so about the host memory that an export takes."""


@dataclass(frozen=True)
class Entry:
    """One parameter: its dotted path here, its names there, and the two ways between the layouts.

    `{i}` in a name is the layer. Both functions act on one layer's array. GGUF tensors come in Hugging Face's layout.
    """

    path: str
    name: str
    gguf: str
    to_ours: Callable[[np.ndarray, DecoderConfig], np.ndarray]
    to_theirs: Callable[[np.ndarray, DecoderConfig], np.ndarray]

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name

    def their_shape(self, shape: tuple[int, ...], config: DecoderConfig) -> tuple[int, ...]:
        """The shape there of one layer's array that has `shape` here."""
        return self.to_theirs(np.empty(shape, np.bool_), config).shape


def _same(path: str, name: str, gguf: str) -> Entry:
    return Entry(path, name, gguf, lambda w, c: w, lambda w, c: w)


def _transposed(path: str, name: str, gguf: str) -> Entry:
    return Entry(path, name, gguf, lambda w, c: w.T, lambda w, c: w.T)


def _heads_out(path: str, name: str, gguf: str) -> Entry:
    """[heads * K, D] there, [D, heads, K] here."""
    return Entry(
        path, name, gguf, lambda w, c: w.T.reshape(w.shape[1], -1, c.head_dim), lambda w, c: w.reshape(len(w), -1).T
    )


def _heads_in(path: str, name: str, gguf: str) -> Entry:
    """[D, heads * K] there, [heads, K, D] here."""
    return Entry(
        path, name, gguf, lambda w, c: w.T.reshape(-1, c.head_dim, len(w)), lambda w, c: w.reshape(-1, w.shape[-1]).T
    )


def _heads_bias(path: str, name: str, gguf: str) -> Entry:
    """[heads * K] there, [heads, K] here."""
    return Entry(path, name, gguf, lambda w, c: w.reshape(-1, c.head_dim), lambda w, c: w.reshape(-1))


_LAYER, _BLK = "model.layers.{i}.", "blk.{i}."
TABLE = (
    _same("embedding", "model.embed_tokens.weight", "token_embd.weight"),
    _same("norm.scale", "model.norm.weight", "output_norm.weight"),
    _transposed("head", "lm_head.weight", "output.weight"),
    _transposed("score.kernel", "score.weight", "cls.output.weight"),
    _same("layers.attention_norm.scale", _LAYER + "input_layernorm.weight", _BLK + "attn_norm.weight"),
    _heads_out("layers.attention.q", _LAYER + "self_attn.q_proj.weight", _BLK + "attn_q.weight"),
    _heads_out("layers.attention.k", _LAYER + "self_attn.k_proj.weight", _BLK + "attn_k.weight"),
    _heads_out("layers.attention.v", _LAYER + "self_attn.v_proj.weight", _BLK + "attn_v.weight"),
    _heads_in("layers.attention.o", _LAYER + "self_attn.o_proj.weight", _BLK + "attn_output.weight"),
    _heads_bias("layers.attention.q_bias", _LAYER + "self_attn.q_proj.bias", _BLK + "attn_q.bias"),
    _heads_bias("layers.attention.k_bias", _LAYER + "self_attn.k_proj.bias", _BLK + "attn_k.bias"),
    _heads_bias("layers.attention.v_bias", _LAYER + "self_attn.v_proj.bias", _BLK + "attn_v.bias"),
    _same("layers.attention.q_norm.scale", _LAYER + "self_attn.q_norm.weight", _BLK + "attn_q_norm.weight"),
    _same("layers.attention.k_norm.scale", _LAYER + "self_attn.k_norm.weight", _BLK + "attn_k_norm.weight"),
    _same("layers.mlp_norm.scale", _LAYER + "post_attention_layernorm.weight", _BLK + "ffn_norm.weight"),
    _transposed("layers.mlp.gate", _LAYER + "mlp.gate_proj.weight", _BLK + "ffn_gate.weight"),
    _transposed("layers.mlp.up", _LAYER + "mlp.up_proj.weight", _BLK + "ffn_up.weight"),
    _transposed("layers.mlp.down", _LAYER + "mlp.down_proj.weight", _BLK + "ffn_down.weight"),
)
EMBEDDING = "model.embed_tokens.weight"
WRITTEN = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types that are written here, by their names in safetensors files."""
ENTRIES = {entry.path: entry for entry in TABLE}


class Tensors(Protocol):
    """Where tensors come from: their Hugging Face names, and one tensor at a time in Hugging Face's layout."""

    where: str

    def names(self) -> set[str]: ...

    def check(self) -> None:
        """Raises UserError if a file is broken or cut off."""
        ...

    def read(self, name: str) -> np.ndarray: ...

    @property
    def dtype(self) -> str:
        """The type in which a model like this is written: float32, bfloat16 or float16."""
        ...


class SafetensorsFolder:
    """The safetensors files of a folder, single or sharded with an index.

    Raises:
      UserError: a missing or broken file or index.
    """

    def __init__(self, folder: str | Path):
        self.where = str(folder)
        self._files = _tensor_files(Path(folder))

    def names(self) -> set[str]:
        return set(self._files)

    def check(self) -> None:
        for path in sorted(set(self._files.values())):
            try:
                # reads the header, and compares the sizes in it with the file's
                with safe_open(path, framework="np") as file:
                    held = set(file.keys())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: broken safetensors file: {error}") from error
            if absent := sorted(name for name, place in self._files.items() if place == path and name not in held):
                raise UserError(f"{path}: the index says that tensor {absent[0]} is here, but it is not")

    def read(self, name: str) -> np.ndarray:
        try:
            with safe_open(self._files[name], framework="np") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._files[name]}: cannot read tensor {name}: {error}") from error

    @property
    def dtype(self) -> str:
        """The embedding's, from the file's header: config.json may say another; float32 for types that are not written.

        Raises:
          UserError: if there is no embedding, or its file cannot be read.
        """
        path = self._files.get(EMBEDDING)
        if path is None:
            raise UserError(f"{self.where}: there is no tensor {EMBEDDING}")
        try:
            with safe_open(path, framework="np") as file:
                return WRITTEN.get(file.get_slice(EMBEDDING).get_dtype(), "float32")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot read tensor {EMBEDDING}: {error}") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / file for name, file in weight_map.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: broken index: {error}") from error
        if absent := sorted({file.name for file in files.values() if not file.is_file()}):
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            raise UserError(f"{index} names {absent[0]}{more}, which is not there: fetch the model's files again")
        return files
    single = folder / "model.safetensors"
    if not single.is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        hint = f" ({pickled[0]} is pickled and is not read: convert it to safetensors)" if pickled else ""
        raise UserError(
            f"no weights in {folder}: neither model.safetensors nor model.safetensors.index.json is there{hint}"
        )
    try:
        with safe_open(single, framework="np") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{single}: broken safetensors file: {error}") from error


def load_params(
    tensors: Tensors, config: DecoderConfig, mesh: Mesh, *, head: Head, dtype: str, quantise: bool = False
) -> Tree:
    """Parameters placed on the mesh, read tensor by tensor: the host holds one tensor at a time, in the file's type.

    Args:
      head: "value" for a reward model or critic (`score.weight` in place of a language-model head).
      dtype: storage type; norms and the score are float32 whatever it is, since they are computed as that.
      quantise: store the layers' kernels as int8 (see quantised.py), each layer as soon as it is read.

    Raises:
      UserError: a missing, superfluous or unreadable tensor, or one of another shape; names the tensor.
    """
    wanted = _wanted(tensors, config, head)
    shardings: dict[Any, Any] = flatten_dict(forward.param_shardings(unflatten_dict(wanted), mesh))
    params = {}
    for path, shape in wanted.items():
        name = ".".join(path)
        entry, sharding = ENTRIES[name], shardings[path]
        stored = "float32" if name.endswith(FLOAT32) else dtype
        read = partial(_read, tensors, entry, config=config)
        if not entry.stacked:
            params[path] = jax.block_until_ready(
                _cast(_place(read(entry.name, shape.shape), sharding), stored, sharding)
            )
            continue
        kernel = KERNELS.get(path[-1]) if quantise else None
        stack = _empty_stack(path, shape.shape, stored, mesh, kernel)
        layer_sharding = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        for i in range(config.num_layers):
            # no name for the tensor and no read ahead of the device: either would keep a second one on the host
            stack = jax.block_until_ready(
                _set_layer(stack, _place(read(entry.name.format(i=i), shape.shape[1:]), layer_sharding), i, kernel)
            )
        params[path] = stack
    return unflatten_dict(params)


def _empty_stack(path: tuple[str, ...], shape: tuple[int, ...], dtype: str, mesh: Mesh, kernel: Kernel | None) -> Any:
    """Zeros for all layers of a parameter, or the two parts of a quantised kernel."""
    whole = jax.ShapeDtypeStruct(shape, dtype)
    parts: Any = whole if kernel is None else jax.eval_shape(partial(quantised.quantise, kernel, stacked=True), whole)
    tree: Tree = unflatten_dict({path: parts})
    zeros = jax.tree.map(lambda x, s: jnp.zeros(x.shape, x.dtype, device=s), tree, forward.param_shardings(tree, mesh))
    return reduce(getitem, path, zeros)


def check_tensors(tensors: Tensors, config: DecoderConfig, *, head: Head) -> None:
    """Checks that all files are whole and hold just the tensors of a model of these sizes; reads no weights.

    Raises:
      UserError: a missing or superfluous tensor, or a file that is cut off.
    """
    _wanted(tensors, config, head)
    tensors.check()


def _wanted(tensors: Tensors, config: DecoderConfig, head: Head) -> dict[tuple[str, ...], Any]:
    """The shapes of the model's parameters by path, once all of them are known to be there."""
    wanted: dict[tuple[str, ...], Any] = flatten_dict(forward.abstract_params(config, head=head))
    _check_names(tensors, {".".join(path) for path in wanted}, config)
    return wanted


def _check_names(tensors: Tensors, paths: set[str], config: DecoderConfig) -> None:
    """Every wanted tensor is there, and nothing that the architecture has no place for."""
    have = tensors.names()
    wanted = {name for path in paths for name in _names(ENTRIES[path], config)}
    if missing := sorted(wanted - have):
        others = f" and {len(missing) - 1} more are missing" if len(missing) > 1 else " is missing"
        hint = ""
        if "score.weight" in have and "lm_head.weight" in missing:
            hint = "; this is a reward model, not a language model"
        if "score.weight" in missing:
            hint = "; this is a language model, not a reward model"
        raise UserError(f"{tensors.where}: tensor {missing[0]}{others}; the folder holds {len(have)} others{hint}")
    # old exports hold the rotary frequencies, which config.json gives; a tied head is a second copy of the embedding
    extra = {name for name in have - wanted if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        extra.discard("lm_head.weight")
    if extra:
        more = f" and {len(extra) - 3} more tensors" if len(extra) > 3 else ""
        reason = "the weights and the configuration do not belong together"
        if "score.weight" in extra:
            reason = "this is a reward model, not a language model"
        raise UserError(
            f"{tensors.where}: a {config.family} model of {config.num_layers} layers has no place for "
            f"{', '.join(sorted(extra)[:3])}{more}: {reason}"
        )


def _names(entry: Entry, config: DecoderConfig) -> list[str]:
    return [entry.name.format(i=i) for i in range(config.num_layers)] if entry.stacked else [entry.name]


def _read(tensors: Tensors, entry: Entry, name: str, shape: tuple[int, ...], config: DecoderConfig) -> np.ndarray:
    """One tensor in our layout."""
    tensor, wanted = tensors.read(name), entry.their_shape(shape, config)
    if tensor.shape != wanted:
        raise UserError(
            f"{tensors.where}: tensor {name} has shape {tensor.shape}, but config.json asks for {wanted}: "
            "the weights and config.json do not belong together"
        )
    return entry.to_ours(tensor, config)


def _place(host: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array onto the mesh; every process hands its devices their parts of its own copy."""
    return jax.make_array_from_callback(host.shape, sharding, lambda index: np.ascontiguousarray(host[index]))


def _cast(x: jax.Array, dtype: str, sharding: NamedSharding) -> jax.Array:
    def cast_parameters(x: jax.Array) -> jax.Array:
        return x.astype(dtype)

    return x if x.dtype == dtype else jax.jit(cast_parameters, out_shardings=sharding)(x)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _set_layer(stack: Any, layer: jax.Array, i: int, kernel: Kernel | None) -> Any:
    parts = layer if kernel is None else quantised.quantise(kernel, layer)
    return jax.tree.map(
        lambda all_layers, new: jax.lax.dynamic_update_index_in_dim(all_layers, new.astype(all_layers.dtype), i, 0),
        stack, parts,
    )  # fmt: skip


def save_params(
    folder: Path, params: Tree, config: DecoderConfig, *, dtype: str = "float32", shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes safetensors files; `families.save_config` writes the config.json that makes them a model.

    One file is in memory at a time; above `shard_bytes` there are several, with an index. Of several processes, all
    must call this and the first one writes.
    """
    writes = jax.process_index() == 0
    sources = dict(_exports(flatten_dict(params), config, dtype))
    plan = split_state_dict_into_shards_factory(
        sources,  # type: ignore[arg-type]
        get_storage_size=lambda source: source.nbytes,  # type: ignore[union-attr]
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: sources[name].fetch() for name in names}
        if writes:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
        # else the others would wait for a slow disk in the collectives of the next file
        wait(f"process 0 writes {file}")
    if writes and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


@dataclass(frozen=True)
class _Export:
    """One tensor to be written: a parameter, or one layer of it."""

    entry: Entry
    value: Any
    layer: int | None
    config: DecoderConfig
    dtype: str

    @property
    def nbytes(self) -> int:
        shape = self.value.shape if self.layer is None else self.value.shape[1:]
        return int(np.prod(shape)) * jnp.dtype(self.dtype).itemsize

    def fetch(self) -> np.ndarray:
        """The tensor on the host, in Hugging Face's layout."""
        value = jnp.asarray(self.value) if self.layer is None else jnp.asarray(self.value)[self.layer]
        value = value.astype(self.dtype)
        host = np.asarray(value if value.is_fully_addressable else multihost_utils.process_allgather(value, tiled=True))
        if self.dtype == "float16" and np.isinf(host).any():
            raise UserError(f"{self.entry.name} has values beyond float16's 65504: save in bfloat16 or float32")
        return np.ascontiguousarray(self.entry.to_theirs(host, self.config))


def _exports(flat: Mapping[Any, Any], config: DecoderConfig, dtype: str) -> Iterator[tuple[str, _Export]]:
    for path, value in flat.items():
        entry = ENTRIES[".".join(path)]
        for i in range(config.num_layers) if entry.stacked else (None,):
            yield entry.name.format(i=i), _Export(entry, value, i, config, dtype)
