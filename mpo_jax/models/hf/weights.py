"""Checkpoints to parameters and back, both ways through one table, one tensor at a time. No torch, no pickle."""

import json
from collections.abc import Iterable, Iterator, Mapping
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
from mpo_jax.models.hf.table import TABLE, Entry, entries
from mpo_jax.models.kernels import KERNELS, Kernel
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime.processes import wait
from mpo_jax.types import Head, Tree

SHARD_BYTES = 2 * 2**30
"""Size of an exported file, and so about the host memory that an export takes."""
EMBEDDINGS = tuple(entry.name for entry in TABLE if "embedding" in entry.paths)
"""The embedding's names, of which a folder has one."""
WRITTEN = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types that are written here, by their names in safetensors files."""
BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Endings of tensors in old exports that hold no parameters: rotary frequencies, which config.json gives, and masks."""


class Tensors(Protocol):
    """Where tensors come from: their Hugging Face names, and one tensor at a time in Hugging Face's layout."""

    where: str

    def names(self) -> set[str]: ...

    def check(self) -> None:
        """Raises UserError if a file is broken or cut off."""
        ...

    def read(self, name: str) -> np.ndarray: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        ...

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
                tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._files[name]}: cannot read tensor {name}: {error}") from error
        if tensor.dtype.kind in "biuc":
            raise UserError(f"{self._files[name]}: tensor {name} has type {tensor.dtype}, not floating-point numbers")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            with safe_open(self._files[name], framework="np") as file:
                return tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._files[name]}: cannot read tensor {name}: {error}") from error

    @property
    def dtype(self) -> str:
        """The embedding's, from the file's header: config.json may say another; float32 for types that are not written.

        Raises:
          UserError: if there is no embedding, or its file cannot be read.
        """
        name = next((name for name in EMBEDDINGS if name in self._files), None)
        if name is None:
            raise UserError(f"{self.where}: there is no tensor {' or '.join(EMBEDDINGS)}")
        path = self._files[name]
        try:
            with safe_open(path, framework="np") as file:
                return WRITTEN.get(file.get_slice(name).get_dtype(), "float32")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot read tensor {name}: {error}") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / file for name, file in weight_map.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: broken index: {error}") from error
        if outside := sorted(str(file) for file in files.values() if file.parent != folder):
            raise UserError(f"{index} names {outside[0]}, which is outside the folder")
        if single.is_file() and single not in files.values():
            raise UserError(
                f"{folder} holds two sets of weights, {single.name} and the files that {index.name} names: remove the "
                "one that is not meant"
            )
        if absent := sorted({file.name for file in files.values() if not file.is_file()}):
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            raise UserError(f"{index} names {absent[0]}{more}, which is not there: fetch the model's files again")
        return files
    if not single.is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        hint = f" ({pickled[0]} is pickled and is not read: convert it to safetensors)" if pickled else ""
        if consolidated := sorted(file.name for file in folder.glob("consolidated*.safetensors")):
            hint = f" ({consolidated[0]} is in its author's own layout and is not read: fetch the Hugging Face one)"
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
    shapes = _wanted(tensors, config, head)
    shardings: dict[Any, Any] = flatten_dict(forward.param_shardings(unflatten_dict(shapes, sep="."), mesh), sep=".")
    params = {}
    for entry in _in_use(shapes, config):
        held = {path: shapes[path].shape for path in entry.paths}
        params |= _load(tensors, entry, held, shardings, config, mesh, dtype, quantise=quantise)
    return unflatten_dict(params, sep=".")


def _load(
    tensors: Tensors,
    entry: Entry,
    shapes: Mapping[str, tuple[int, ...]],
    shardings: Mapping[str, NamedSharding],
    config: DecoderConfig,
    mesh: Mesh,
    dtype: str,
    *,
    quantise: bool,
) -> Tree:
    """The parameters of one entry by path."""
    stored = {path: "float32" if path.endswith(FLOAT32) else dtype for path in shapes}
    if not entry.stacked:
        parts = _read(tensors, entry, entry.name, shapes, shardings, config)
        return {path: jax.block_until_ready(_cast(x, stored[path], shardings[path])) for path, x in parts.items()}
    kernels = {path: KERNELS.get(path.split(".")[-1]) if quantise else None for path in shapes}
    stacks = {path: _empty_stack(path, shape, stored[path], mesh, kernels[path]) for path, shape in shapes.items()}
    a_layer = {path: shape[1:] for path, shape in shapes.items()}
    places = {path: NamedSharding(shardings[path].mesh, PartitionSpec(*shardings[path].spec[1:])) for path in shapes}
    for i in range(config.num_layers):
        # no name for the parts and no read ahead of the device: either would keep a second tensor on the host
        _set_layers(stacks, _read(tensors, entry, entry.name.format(i=i), a_layer, places, config), i, kernels)
    return stacks


def _set_layers(stacks: Tree, layer: Mapping[str, jax.Array], i: int, kernels: Mapping[str, Kernel | None]) -> None:
    for path, part in layer.items():
        stacks[path] = jax.block_until_ready(_set_layer(stacks[path], part, i, kernels[path]))


def _empty_stack(path: str, shape: tuple[int, ...], dtype: str, mesh: Mesh, kernel: Kernel | None) -> Any:
    """Zeros for all layers of a parameter, or the two parts of a quantised kernel."""
    whole = jax.ShapeDtypeStruct(shape, dtype)
    parts: Any = whole if kernel is None else jax.eval_shape(partial(quantised.quantise, kernel, stacked=True), whole)
    tree: Tree = unflatten_dict({path: parts}, sep=".")
    zeros = jax.tree.map(lambda x, s: jnp.zeros(x.shape, x.dtype, device=s), tree, forward.param_shardings(tree, mesh))
    return reduce(getitem, path.split("."), zeros)


def check_tensors(tensors: Tensors, config: DecoderConfig, *, head: Head) -> None:
    """Checks that all files are whole and hold just the tensors of a model of these sizes; reads no weights.

    Raises:
      UserError: a missing or superfluous tensor, or a file that is cut off.
    """
    _wanted(tensors, config, head)
    tensors.check()


def _wanted(tensors: Tensors, config: DecoderConfig, head: Head) -> dict[str, Any]:
    """The shapes of the model's parameters by path, once all of them are known to be there."""
    wanted: dict[str, Any] = flatten_dict(forward.abstract_params(config, head=head), sep=".")
    _check_names(tensors, wanted, config)
    return wanted


def _in_use(paths: Iterable[str], config: DecoderConfig) -> list[Entry]:
    """The entries of these parameters, each once."""
    table = entries(config.family)
    return list({table[path].name: table[path] for path in paths}.values())


def _check_names(tensors: Tensors, paths: Iterable[str], config: DecoderConfig) -> None:
    """Every wanted tensor is there, and nothing that the architecture has no place for."""
    have, head = tensors.names(), entries(config.family)["head"].name
    wanted = {name for entry in _in_use(paths, config) for name in _names(entry, config)}
    if missing := sorted(wanted - have):
        others = f" and {len(missing) - 1} more are missing" if len(missing) > 1 else " is missing"
        hint = ""
        if "score.weight" in have and head in missing:
            hint = "; this is a reward model, not a language model"
        if "score.weight" in missing:
            hint = "; this is a language model, not a reward model"
        raise UserError(f"{tensors.where}: tensor {missing[0]}{others}; the folder holds {len(have)} others{hint}")
    # a tied head is a second copy of the embedding
    extra = {name for name in have - wanted if not name.endswith(BUFFERS)}
    if config.tie_embeddings:
        extra.discard(head)
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


def _read(
    tensors: Tensors,
    entry: Entry,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    shardings: Mapping[str, NamedSharding],
    config: DecoderConfig,
) -> dict[str, jax.Array]:
    """The parameters that one tensor holds, by path, on the mesh."""
    tensor, wanted = tensors.read(name), entry.their_shape(list(shapes.values()), config)
    if tensor.shape != wanted:
        raise UserError(
            f"{tensors.where}: tensor {name} has shape {tensor.shape}, but config.json asks for {wanted}: "
            "the weights and config.json do not belong together"
        )
    return {
        path: _place(part, shardings[path]) for path, part in zip(shapes, entry.to_ours(tensor, config), strict=True)
    }


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
    """One tensor to be written: the parameters that it holds, or one layer of them."""

    entry: Entry
    values: tuple[Any, ...]
    layer: int | None
    config: DecoderConfig
    dtype: str

    @property
    def nbytes(self) -> int:
        shapes = [value.shape if self.layer is None else value.shape[1:] for value in self.values]
        return sum(int(np.prod(shape)) for shape in shapes) * jnp.dtype(self.dtype).itemsize

    def fetch(self) -> np.ndarray:
        """The tensor on the host, in Hugging Face's layout."""
        arrays = (jnp.asarray(value) for value in self.values)
        parts = tuple(self._on_host(x if self.layer is None else x[self.layer]) for x in arrays)
        return np.ascontiguousarray(self.entry.to_theirs(parts, self.config))

    def _on_host(self, value: jax.Array) -> np.ndarray:
        value = value.astype(self.dtype)
        host = np.asarray(value if value.is_fully_addressable else multihost_utils.process_allgather(value, tiled=True))
        if self.dtype == "float16" and np.isinf(host).any():
            raise UserError(f"{self.entry.name} has values beyond float16's 65504: save in bfloat16 or float32")
        return host


def _exports(flat: Mapping[Any, Any], config: DecoderConfig, dtype: str) -> Iterator[tuple[str, _Export]]:
    leaves = {".".join(path): value for path, value in flat.items()}
    for entry in _in_use(leaves, config):
        values = tuple(leaves[path] for path in entry.paths)
        for i in range(config.num_layers) if entry.stacked else (None,):
            yield entry.name.format(i=i), _Export(entry, values, i, config, dtype)
