"""Offload to host memory between the phases that need an array: frozen models and optimisers' moments.

An array keeps its layout over the mesh and its bits; only the memory kind of its sharding changes, so that a device's
part goes to that device's host.
"""

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from mpo_jax.config.schema import RuntimeConfig
from mpo_jax.errors import UserError
from mpo_jax.runtime.sharding import device_bytes
from mpo_jax.types import Params, TrainState

Tree = TypeVar("Tree")

GIB = 2**30
POOL_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""The environment variable that limits XLA's pool of pinned memory, in GiB a process (jaxlib 0.10)."""
POOL_TAKEN = "XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE"
"""The one by which XLA takes the whole pool at its start."""
POOL_GIB = 64
"""The limit where it is not set."""
HOST = "pinned_host"
"""Page-locked memory, from which accelerators copy without the processor."""


@dataclasses.dataclass(frozen=True)
class Offload:
    """Which arrays are offloaded between the phases that use them; the others stay on the devices."""

    frozen: bool
    moments: bool

    @classmethod
    def of(cls, runtime: RuntimeConfig, mesh: Mesh) -> "Offload":
        """The configuration's choice.

        Raises:
          UserError: if the mesh's devices have no pinned host memory.
        """
        for key in ("offload_frozen", "offload_moments"):
            if getattr(runtime, key):
                _check(mesh, f"runtime.{key}=true")
        return cls(runtime.offload_frozen, runtime.offload_moments)

    def frozen_params(self, params: Params) -> Params:
        """A frozen model's parameters, offloaded if so configured; `to_devices` brings them back."""
        return to_host(params) if self.frozen else params

    def state(self, state: TrainState) -> TrainState:
        """The state, with its optimiser's moments offloaded if so configured."""
        return dataclasses.replace(state, opt_state=to_host(state.opt_state)) if self.moments else state

    def update(self, update: Callable[..., tuple[TrainState, Any]]) -> Callable[..., tuple[TrainState, Any]]:
        """The same update for a state whose moments are offloaded before and after it."""

        def run(state: TrainState, *rest: Any) -> tuple[TrainState, Any]:
            state, metrics = update(to_devices(state), *rest)
            return self.state(state), metrics

        return run if self.moments else update

    def pinned_bytes(self, *, frozen: Any, moments: Any, num_devices: int) -> int:
        """The most pinned memory that one host needs, in bytes.

        Moments count twice: the new ones arrive while the old ones are still referenced.

        Args:
          frozen: shapes with shardings of all frozen models.
          moments: shapes with shardings of all models' moments.
          num_devices: devices of the host.
        """
        each = (device_bytes(frozen) if self.frozen else 0) + 2 * (device_bytes(moments) if self.moments else 0)
        return each * num_devices


def to_host(tree: Tree) -> Tree:
    """The tree in host memory. The source leaves the devices with its last reference."""
    return jax.tree.map(lambda leaf: _moved(leaf, HOST), tree)


def to_devices(tree: Tree) -> Tree:
    """The tree in device memory; leaves that are there already are returned unchanged."""
    return jax.tree.map(lambda leaf: _moved(leaf, next(iter(leaf.devices())).default_memory().kind), tree)


def widen_pool(runtime: RuntimeConfig, platform: str, memory: int, environment: MutableMapping[str, str]) -> int | None:
    """Lets XLA's pool of pinned memory grow to the host's memory, if a configuration offloads on GPUs.

    XLA's own limit is 64 GiB a process, and one host's share of a 7B model's moments is more. The pool takes memory as
    it needs it, so a high limit costs nothing; how much is needed is known and checked only when the devices are. A
    limit that the user has set is kept. Call it before JAX starts.

    Args:
      memory: bytes of the host.

    Returns:
      The new limit in GiB; None where it stays.
    """
    wanted = runtime.offload_frozen or runtime.offload_moments
    limit = memory // GIB
    # a pool that takes all of its memory at once must not be as large as the host
    if not wanted or platform != "gpu" or {POOL_LIMIT, POOL_TAKEN} & environment.keys() or limit <= POOL_GIB:
        return None
    environment[POOL_LIMIT] = str(limit)
    return limit


def check_pinned(needed: int, memory: int, platform: str, environment: Mapping[str, str]) -> None:
    """Raises UserError if a host has less memory than offloading needs, or XLA's pool on GPUs allows less.

    Args:
      needed: `Offload.pinned_bytes`.
      memory: bytes of the host.
    """
    need = f"{needed / GIB:.1f} GiB of host memory are needed"
    if needed > memory:
        raise UserError(
            f"{need}, but this host has {memory / GIB:.1f} GiB: set it to false, or use more hosts with mesh.fsdp"
        )
    if platform != "gpu":
        return
    text = environment.get(POOL_LIMIT, str(POOL_GIB))
    limit = int(text) if text.isdecimal() else POOL_GIB
    if needed > limit * GIB:
        raise UserError(
            f"{need}, but XLA pins at most {limit} GiB: unset {POOL_LIMIT}, or set it to {-(-needed // GIB)} or more "
            "before the process starts"
        )


def _moved(leaf: jax.Array, kind: str) -> jax.Array:
    if leaf.sharding.memory_kind == kind:
        return leaf
    # a copy even if device and host share memory: steps donate their arguments
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind), may_alias=False)


def _check(mesh: Mesh, setting: str) -> None:
    for device in mesh.local_devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            raise UserError(
                f"{setting} needs memory of the kind {HOST}, but {device.device_kind} has {', '.join(kinds)} alone: "
                "set it to false"
            )
