"""Arrays that rest in the hosts' memory while the devices do not need them: frozen models and optimisers' moments.

An array keeps its layout over the mesh and its bits; only the memory kind of its sharding changes, so that a device's
part rests on that device's host.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from mpo_jax.config.schema import RuntimeConfig
from mpo_jax.errors import UserError
from mpo_jax.types import Params, TrainState

Tree = TypeVar("Tree")

HOST = "pinned_host"
"""Page-locked memory, from which accelerators copy without the processor."""


@dataclasses.dataclass(frozen=True)
class Offload:
    """What rests between the phases in which it is used; what does not is left where it is."""

    frozen: bool
    moments: bool

    @classmethod
    def of(cls, runtime: RuntimeConfig, mesh: Mesh) -> "Offload":
        """As the configuration says.

        Raises:
          UserError: where the mesh's devices have no such memory of their host.
        """
        for key in ("offload_frozen", "offload_moments"):
            if getattr(runtime, key):
                _check(mesh, f"runtime.{key}=true")
        return cls(runtime.offload_frozen, runtime.offload_moments)

    def rested(self, params: Params) -> Params:
        """A frozen model's parameters, where they rest; `to_devices` brings them back."""
        return to_host(params) if self.frozen else params

    def state(self, state: TrainState) -> TrainState:
        """The state with its optimiser's moments where they rest."""
        return dataclasses.replace(state, opt_state=to_host(state.opt_state)) if self.moments else state

    def update(self, update: Callable[..., tuple[TrainState, Any]]) -> Callable[..., tuple[TrainState, Any]]:
        """The update of a state whose moments rest before and after it."""

        def run(state: TrainState, *rest: Any) -> tuple[TrainState, Any]:
            state, metrics = update(to_devices(state), *rest)
            return self.state(state), metrics

        return run if self.moments else update


def to_host(tree: Tree) -> Tree:
    """The tree in the hosts' memory. What it was copied from leaves the devices with its last reference."""
    return jax.tree.map(lambda leaf: _moved(leaf, HOST), tree)


def to_devices(tree: Tree) -> Tree:
    """The tree in the devices' own memory; a leaf that is there already is returned as it is."""
    return jax.tree.map(lambda leaf: _moved(leaf, next(iter(leaf.devices())).default_memory().kind), tree)


def _moved(leaf: jax.Array, kind: str) -> jax.Array:
    if leaf.sharding.memory_kind == kind:
        return leaf
    # a copy even where device and host are one: steps donate what they are given
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind), may_alias=False)


def _check(mesh: Mesh, setting: str) -> None:
    for device in mesh.local_devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            raise UserError(
                f"{setting} needs memory of the kind {HOST}, but {device.device_kind} has {', '.join(kinds)} alone: "
                "set it to false"
            )
