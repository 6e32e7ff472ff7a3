"""Checkpoints to parameters and back, both ways through one table, one tensor at a time. No torch, no pickle."""

import json
import math
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

from mpo_jax.errors import UserError
from mpo_jax.models import forward, quantised
from mpo_jax.models.decoder import FLOAT32
from mpo_jax.models.hf.safetensors_folder import is_finite, save_tensors
from mpo_jax.models.hf.table import Entry, entries
from mpo_jax.models.kernels import KERNELS, Kernel
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime.processes import wait
from mpo_jax.types import Head, Tree

SHARD_BYTES = 2 * 2**30
"""Size of an exported file, and so about the host memory that an export takes."""
LARGE = 2**28
"""Numbers of a tensor above which its shape in the files is not worked out before the tensor is known to fit."""
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
    _check_shapes(tensors, wanted, config)
    return wanted


def _check_shapes(tensors: Tensors, wanted: Mapping[str, Any], config: DecoderConfig) -> None:
    """Every wanted tensor has the shape that the sizes ask for: seen in the files' headers, before memory is taken."""
    for entry in _in_use(wanted, config):
        shapes = [wanted[path].shape for path in entry.paths]
        held = [shape[1:] if entry.stacked else shape for shape in shapes]
        numbers = sum(map(math.prod, held))
        for name in _names(entry, config):
            if math.prod(shape := tensors.shape(name)) != numbers and numbers > LARGE:
                # an array of the wanted shape, by which it is found in the files' layout, might not fit into memory
                raise UserError(
                    f"{tensors.where}: tensor {name} has shape {shape}, but config.json asks for {numbers} numbers: "
                    "the weights and config.json do not belong together"
                )
        asked = entry.their_shape(held, config)
        for name in _names(entry, config):
            _check_shape(tensors.where, name, tensors.shape(name), asked)


def _check_shape(where: str, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise UserError(
            f"{where}: tensor {name} has shape {shape}, but config.json asks for {wanted}: "
            "the weights and config.json do not belong together"
        )


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
    _check_shape(tensors.where, name, tensor.shape, wanted)
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
            save_tensors(tensors, folder / file)
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
        before, value = value, value.astype(self.dtype)
        host = np.asarray(value if value.is_fully_addressable else multihost_utils.process_allgather(value, tiled=True))
        if not is_finite(host):
            name = self.entry.name.format(i=self.layer)
            # what is read from a folder is finite there, and may be in this type already
            overflows = before.dtype == jnp.float16 or bool(jnp.isfinite(before).all())
            if self.dtype == "float16" and overflows and not np.isnan(host).any():
                raise UserError(f"{name} has values beyond float16's 65504: save in bfloat16 or float32")
            raise UserError(
                f"{name} holds NaN or infinity, so the model means nothing and is not written: its training failed, or "
                "the weights that it began with are damaged"
            )
        return host


def _exports(flat: Mapping[Any, Any], config: DecoderConfig, dtype: str) -> Iterator[tuple[str, _Export]]:
    leaves = {".".join(path): value for path, value in flat.items()}
    for entry in _in_use(leaves, config):
        values = tuple(leaves[path] for path in entry.paths)
        for i in range(config.num_layers) if entry.stacked else (None,):
            yield entry.name.format(i=i), _Export(entry, values, i, config, dtype)
