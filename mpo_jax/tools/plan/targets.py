"""Targets of a plan: kind and number of devices, parsed from names like `a100x8`, `2xa100x8`, `v5p:2x2x2`, `cpu`."""

import difflib
import math
import re
from typing import Literal

from mpo_jax.errors import UserError
from mpo_jax.runtime import machine
from mpo_jax.runtime.device_kinds import Facts, Kind, known

GIB = 2**30
CPU = "cpu"
EXAMPLES = (
    "a100x8, a100-40x8, h100x8, h200x1, rtx4090x1, l4x1, a10gx1, 2xa100x8 (two hosts), v5e:2x4, v5p:2x2x2, v4:2x2x2, "
    "2xv5p:2x2x2 (two slices), "
    "cpu:80 (GiB)"
)


class Target(Facts, frozen=True):
    """Devices to compile for.

    Attributes:
      name: name given on the command line.
      kind: kind of device; None for this machine's CPU.
      groups: number of GPU hosts or TPU slices.
      shape: devices of a group: one number for GPUs, the torus for TPUs.
      capacity: usable bytes per device.
    """

    name: str
    kind: Kind | None
    groups: int
    shape: tuple[int, ...]
    capacity: float

    @property
    def platform(self) -> Literal["cuda", "tpu", "cpu"]:
        return "cpu" if self.kind is None else self.kind.platform

    @property
    def num_devices(self) -> int:
        return self.groups * math.prod(self.shape)

    @property
    def devices_per_host(self) -> int:
        """GPUs: those of a group; TPUs: as the kind has them, unless the slice is smaller."""
        devices = math.prod(self.shape)
        return min(self.kind.devices_per_host, devices) if self.kind and self.kind.devices_per_host else devices

    @property
    def spans_network(self) -> bool:
        """Whether collectives over all devices use the network between hosts or slices."""
        return self.groups > 1


def parse(name: str, *, cpu_devices: int) -> Target:
    """Parses a target name.

    `cpu` is this machine, with its memory shared by the simulated devices; `cpu:80` gives each device 80 GiB.

    Args:
      cpu_devices: number of simulated devices for `cpu`.

    Raises:
      UserError: if the name is not a target; the message lists valid names.
    """
    if cpu := re.fullmatch(rf"{CPU}(?::(\d+(?:\.\d+)?))?", name):
        each = float(cpu[1]) * GIB if cpu[1] else host_memory() / cpu_devices
        return Target(name=name, kind=None, groups=1, shape=(cpu_devices,), capacity=each)
    kinds, _ = known()
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][\w-]*?)(?:x(\d+)|:(\d+(?:x\d+)*))", name)
    if match is None:
        raise UserError(f"--on {name} is not a target. Targets are cpu, and devices with their number: {EXAMPLES}")
    groups, kind_name, count, torus = match.groups()
    kind = kinds.get(kind_name)
    if kind is None:
        close = difflib.get_close_matches(kind_name, kinds, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"--on {name}: unknown device {kind_name}{hint} (known: {', '.join(kinds)}, cpu)")
    shape = tuple(int(part) for part in (count or torus).split("x"))
    _check_shape(name, kind_name, kind, shape, is_torus=torus is not None)
    if min(*shape, int(groups or 1)) < 1:
        raise UserError(f"--on {name}: device counts start at 1")
    capacity = kind.memory_gib * kind.usable * GIB
    return Target(name=name, kind=kind, groups=int(groups or 1), shape=shape, capacity=capacity)


def host_memory() -> int:
    """Total memory of this machine in bytes."""
    return machine.host_memory()


def _check_shape(name: str, kind_name: str, kind: Kind, shape: tuple[int, ...], *, is_torus: bool) -> None:
    if kind.platform == "cuda" and is_torus:
        raise UserError(f"--on {name}: GPUs are counted, as in {kind_name}x{math.prod(shape)}")
    if kind.platform == "tpu" and (not is_torus or len(shape) != kind.dimensions):
        example = "x".join(["2"] * (kind.dimensions - 1) + ["4" if kind.dimensions == 2 else "2"])
        raise UserError(f"--on {name}: a {kind_name} slice is named by its topology, as in {kind_name}:{example}")
