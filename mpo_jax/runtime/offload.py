"""Offload to host memory between the phases that need an array: frozen models and optimisers' moments.

An array keeps its layout over the mesh and its bits; only the memory kind of its sharding changes, so that a device's
part goes to that device's host.
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


def to_host(tree: Tree) -> Tree:
    """The tree in host memory. The source leaves the devices with its last reference."""
    return jax.tree.map(lambda leaf: _moved(leaf, HOST), tree)


def to_devices(tree: Tree) -> Tree:
    """The tree in device memory; leaves that are there already are returned unchanged."""
    return jax.tree.map(lambda leaf: _moved(leaf, next(iter(leaf.devices())).default_memory().kind), tree)


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
