"""What each host of a target needs to hold: offloaded arrays, a checkpoint being written, a model being read."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpo_jax.models import forward
from mpo_jax.pipeline.stages import stage_settings
from mpo_jax.runtime.offload import Offload
from mpo_jax.runtime.sharding import device_bytes
from mpo_jax.stages import ppo
from mpo_jax.stages.stage import Program
from mpo_jax.tools.plan.measure import Measured, Plan, gib
from mpo_jax.tools.plan.targets import GIB
from mpo_jax.types import TrainState

PROCESS_GIB = 8.0
"""Assumed: the process with its libraries, compiler and rows."""


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Bytes that a stage needs on each host.

    Attributes:
      stage: name of the stage.
      pinned: arrays that `runtime.offload_frozen` and `runtime.offload_moments` keep there.
      checkpoint: the copy of the training state that is written while training goes on.
      loading: the largest tensor of the base model in float32, the only one that is there while a model is read.
      available: memory of a host; None if it is not known.
    """

    stage: str
    pinned: float
    checkpoint: float
    loading: float
    available: float | None

    @property
    def needed(self) -> float:
        """Bytes at the largest moment: models are read before the first checkpoint."""
        return PROCESS_GIB * GIB + self.pinned + max(self.checkpoint, self.loading)

    @property
    def fits(self) -> bool:
        return self.available is None or self.needed <= self.available


def host_memory(measured: Sequence[Measured], plan: Plan) -> list[HostMemory]:
    """The needs of every stage among the measured programs."""
    stages = list(dict.fromkeys(one.program.stage for one in measured))
    return [_stage(stage, [m.program for m in measured if m.program.stage == stage], plan) for stage in stages]


def _stage(stage: str, programs: Sequence[Program], plan: Plan) -> HostMemory:
    states = {id(s): s for program in programs for s in _trained(program)}
    each, runtime, pinned = plan.target.devices_per_host, plan.config.runtime, 0
    if stage == "ppo":
        frozen, moments = ppo.offloaded(stage_settings("ppo", plan.config), plan.shapes("ppo"))
        offload = Offload(runtime.offload_frozen, runtime.offload_moments)
        pinned = offload.pinned_bytes(frozen=frozen, moments=moments, num_devices=each)
    params = jax.tree.leaves(forward.abstract_params(plan.decoder))
    layers = plan.decoder.num_layers
    # a stack of layers is read a layer at a time
    largest = max(leaf.size // (layers if leaf.ndim > 1 and leaf.shape[0] == layers else 1) for leaf in params)
    kind = plan.target.kind
    return HostMemory(
        stage=stage,
        pinned=pinned,
        checkpoint=each * sum(device_bytes(state) for state in states.values()),
        loading=largest * jnp.dtype(jnp.float32).itemsize,
        available=None if kind is None else kind.host_gib * each * GIB,
    )


def _trained(program: Program) -> list[TrainState]:
    """The training states that an update takes."""
    if program.accumulation is None:
        return []
    is_state = lambda node: isinstance(node, TrainState)  # noqa: E731
    arguments: Any = program.arguments({})
    return [node for node in jax.tree.leaves(arguments, is_leaf=is_state) if is_state(node)]


def short(hosts: Sequence[HostMemory]) -> list[str]:
    """Lines for each stage that needs more than a host has, and what to change."""
    lines = []
    for one in hosts:
        if one.fits:
            continue
        assert one.available is not None
        lines.append(
            f"{one.stage} needs {gib(one.needed):.3g} GiB of host memory, and a host is assumed to have "
            f"{gib(one.available):.3g} (host_gib in device_kinds.yaml). Change one of:"
        )
        if one.pinned:
            lines.append("  runtime.offload_frozen=false runtime.offload_moments=false: arrays stay on the devices")
        lines.append("  hosts with more memory, or more hosts along mesh.fsdp, which divides what each holds")
    return lines
