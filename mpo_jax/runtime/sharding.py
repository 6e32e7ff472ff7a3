"""The device mesh, the one table from logical axes to mesh axes, and placement of parameters and batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mpo_jax.config.schema import MeshConfig
from mpo_jax.errors import UserError
from mpo_jax.runtime.words import counted
from mpo_jax.types import Packed

BATCH_AXES = ("data", "fsdp")

Platform: TypeAlias = Literal["cpu", "tpu", "cuda"]
"""What a program is compiled for."""

RULES: dict[str, Any] = {
    "batch": BATCH_AXES,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "act_heads": "tensor",
}
"""Logical axis -> mesh axis. A logical axis without a rule is replicated."""


def simulated(devices: Sequence[Any] | None = None) -> bool:
    """Whether these devices, this process's if None, are several and CPUs.

    They share a pool of threads, and a collective keeps its thread until all devices have come to it. Programs that are
    under way at the same time can fill the pool, so that all wait for ever: there must be one at a time.
    """
    devices = jax.local_devices() if devices is None else devices
    return len(devices) > 1 and devices[0].platform == "cpu"


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh with axes data, fsdp and tensor over the first devices.

    Raises:
      UserError: if the mesh needs more devices than there are.
    """
    devices = jax.devices()
    if jax.process_count() > 1 and config.num_devices != len(devices):
        raise UserError(
            f"mesh.data={config.data} x mesh.fsdp={config.fsdp} x mesh.tensor={config.tensor} is "
            f"{counted(config.num_devices, 'device')}, but {counted(jax.process_count(), 'process', 'processes')} "
            f"have {len(devices)}: use them all"
        )
    if config.num_devices > len(devices):
        raise UserError(
            f"mesh.data={config.data} x mesh.fsdp={config.fsdp} x mesh.tensor={config.tensor} needs "
            f"{counted(config.num_devices, 'device')}, but there are {len(devices)} ({devices[0].platform}): lower "
            f"the mesh, or simulate CPU devices with runtime.cpu_devices={config.num_devices}"
        )
    return mesh_of(config, devices[: config.num_devices])


def mesh_of(config: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh over exactly these devices, which may be elsewhere: a plan compiles for devices that it does not have.

    Raises:
      UserError: if several TPU slices cannot be divided along `data`, which alone may cross the network between them.
    """
    # GPU hosts count as slices too, but JAX orders those by host itself
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices > 1:
        return _over_slices(config, devices, slices)
    return jax.make_mesh(
        (config.data, config.fsdp, config.tensor),
        ("data", "fsdp", "tensor"),
        # make_mesh defaults to Explicit axes, under which every array's type carries its sharding
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )


def _over_slices(config: MeshConfig, devices: Sequence[Any], slices: int) -> Mesh:
    if config.data % slices:
        raise UserError(
            f"{slices} TPU slices, but mesh.data={config.data}: make it a multiple of {slices}, so that fsdp and "
            "tensor stay inside a slice and only sums of gradients cross the network"
        )
    inside = (config.data // slices, config.fsdp, config.tensor)
    placed = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
    return Mesh(placed, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def num_groups(mesh: Mesh) -> int:
    """Device groups that a batch's rows are divided over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, mesh: Mesh, key: str, *, minibatches: int = 1, accumulation: int = 1) -> None:
    """Raises UserError where a global batch, or a part of it, does not divide over the mesh's batch axes.

    Args:
      key: names the batch in the message.
      minibatches: parts of the batch.
      accumulation: micro-batches of each part.
    """
    data, fsdp = (mesh.shape[axis] for axis in BATCH_AXES)
    devices, parts = data * fsdp, minibatches * accumulation
    if batch_size % (devices * parts) == 0:
        return
    said, verb = f"{key}={batch_size}", "does"
    if parts > 1:
        counts = {"minibatches": minibatches, "micro-batches": accumulation}
        named = [f"{count} {name}" for name, count in counts.items() if count > 1]
        smallest = "micro-batches" if accumulation > 1 else "minibatches"
        said, verb = f"{said} in {' of '.join(named)} gives {smallest} of {batch_size // parts}, which", "do"
    raise UserError(
        f"{said} {verb} not divide over mesh.data={data} x mesh.fsdp={fsdp} = {counted(devices, 'device')}: "
        f"make it a multiple of {devices * parts}, or change the mesh"
    )


def spec_for(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh_shape: dict[str, int], *, without: str | None = None
) -> PartitionSpec:
    """The rules' spec for an array with these logical axes; an axis that does not divide is replicated.

    Args:
      without: a mesh axis to replicate over, despite the rules.
    """
    return PartitionSpec(
        *(_mesh_axis(axis, size, mesh_shape, without) for axis, size in zip(axes, shape, strict=True)),
    )


def _mesh_axis(axis: str | None, size: int, mesh_shape: dict[str, int], without: str | None) -> Any:
    rule = RULES.get(axis) if axis else None
    if rule is None or rule == without:
        return None
    names = (rule,) if isinstance(rule, str) else rule
    parts = int(np.prod([mesh_shape.get(name, 1) for name in names]))
    return rule if parts > 1 and size % parts == 0 else None


def constrain(x: jax.Array, *axes: str | None, without: str | None = None) -> jax.Array:
    """Constrains an array's layout over the current mesh by the rules; does nothing outside a mesh.

    Inside `by_group` arrays have a group's rows alone, and the batch axes do not divide them further.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    free = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}
    return jax.lax.with_sharding_constraint(x, spec_for(axes, x.shape, free, without=without))


def by_group(function: Callable[[Any, Any, Any], Any], mesh: Mesh) -> Callable[[Any, Any, Any], Any]:
    """A function (shared, rows, shared) -> rows that every data-parallel group runs on its own rows.

    A group is the devices that differ along `tensor` alone. What the groups share is whole along the batch axes. Loops
    end for each group by itself, and nothing inside waits for another group. Collectives over `tensor` come from
    the partitioner as usual. They must be of kinds that name their groups: a collective-permute waits for all devices
    (XLA's CPU backend), and so for groups that have ended.
    """
    if all(mesh.shape[axis] == 1 for axis in BATCH_AXES):
        return function
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, PartitionSpec()),
        out_specs=rows,
        axis_names=set(BATCH_AXES),
        # the types would have to say of every constant in a loop that it differs from group to group
        check_vma=False,
    )


def by_device(function: Callable[..., Any], axes: tuple[Any, ...], out_axes: Any) -> Callable[..., Any]:
    """The function run by every device of the current mesh on its own part, for what the compiler cannot divide.

    Arguments and results are divided by the rules. Outside a mesh it is the function itself, and inside `by_group` the
    axes that are left are divided.

    Args:
      axes: for each argument, a tuple of logical axes, or a NamedTuple of such tuples.
      out_axes: so for the result. An axis is divided where all its sizes allow.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}
    if mesh.empty or mesh.size == 1 or not free:
        return function
    is_axes = lambda x: type(x) is tuple and all(a is None or isinstance(a, str) for a in x)  # noqa: E731

    def divided(*arguments: Any) -> Any:
        sizes: dict[str | None, int] = {}

        def measure(names: tuple[str | None, ...], x: jax.Array) -> None:
            sizes.update(
                {name: math.gcd(size, sizes.get(name, size)) for name, size in zip(names, x.shape, strict=True)}
            )

        def spec(names: tuple[str | None, ...]) -> PartitionSpec:
            return spec_for(names, tuple(sizes[name] for name in names), free)

        jax.tree.map(measure, axes, arguments, is_leaf=is_axes)
        in_specs, out_specs = (jax.tree.map(spec, tree, is_leaf=is_axes) for tree in (axes, out_axes))
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(free), check_vma=False)(
            *arguments
        )

    return divided


def mesh_axis_size(name: str) -> int:
    """Devices along an axis of the current mesh that the compiler divides over; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or name in mesh.manual_axes else mesh.shape[name]


def platform() -> Platform:
    """The platform of the current mesh, else of the device that JAX computes on.

    A plan's mesh is of devices that this machine need not have.
    """
    chosen: Any = jax.sharding.get_abstract_mesh().abstract_device or jax.config.values["jax_default_device"]
    name = chosen if isinstance(chosen, str) else (chosen or jax.devices()[0]).platform
    return "tpu" if name == "tpu" else "cuda" if name in ("cuda", "gpu") else "cpu"


def shardings_for(axes_tree: Any, shapes_tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of arrays (or shapes) from a like tree of tuples of logical axes."""
    return jax.tree.map(
        lambda axes, leaf: NamedSharding(mesh, spec_for(axes, leaf.shape, dict(mesh.shape))),
        axes_tree,
        shapes_tree,
        is_leaf=lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over the mesh's batch axes, the others replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def packed_sharding(mesh: Mesh) -> Packed:
    """The sharding of each array of a packed batch: its tokens are [M R T], of which R are rows."""
    leading, rows = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    return Packed(rows, rows, rows, rows, replicated(mesh), leading, leading, leading)  # type: ignore[arg-type]


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """A sharding for each array of a batch: the rows of a `Packed` over the batch axes, and all other leading axes."""

    def of(node: Any) -> Any:
        return packed_sharding(mesh) if isinstance(node, Packed) else batch_sharding(mesh)

    return jax.tree.map(of, batch, is_leaf=lambda node: isinstance(node, Packed))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a host batch (a pytree of whole NumPy arrays) on the mesh; each process places its devices' rows."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, batch, batch_shardings(batch, mesh))


def device_bytes(tree: Any) -> int:
    """Bytes per device of a tree of arrays, or of shapes with shardings."""

    def one(leaf: Any) -> int:
        sharding = leaf.sharding
        shape = sharding.shard_shape(leaf.shape) if isinstance(sharding, NamedSharding) else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))
