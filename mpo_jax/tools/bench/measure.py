"""Time, rates and memory of a workload, and the matrix-product rate that bounds it."""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from mpo_jax.runtime.device_kinds import device_kind
from mpo_jax.runtime.timing import seconds, time_matmul
from mpo_jax.tools.bench.workloads import Workload

DEFINITIONS = (
    "tokens/s: real tokens, without padding. FLOPs: necessary ones only (a multiply-add is two): matrix products over "
    "real tokens, scores of visible keys, logits at response tokens, backward twice forward, no recomputation. of "
    "matmul: FLOP/s relative to one large matrix product on this machine. MFU: relative to the vendor's bfloat16 peak, "
    "known devices only."
)


CPU_SIZE = 2048
"""Side of the matrix product on a CPU: large enough to use all cores."""


@dataclasses.dataclass(frozen=True)
class Device:
    """The upper bounds of every workload on this machine.

    Attributes:
      kind: JAX's name for the device.
      matmul: measured FLOP/s of a large product of the arithmetic's type, over all devices of the mesh.
      peak, bandwidth: the vendor's FLOP/s in bfloat16 and bytes/s, over all devices; None if unknown.
    """

    kind: str
    matmul: float
    peak: float | None
    bandwidth: float | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """The results of one workload; rates are over the sum of all steps.

    Attributes:
      seconds: duration of each timed step, host-side input preparation included.
      compile_s: extra time of the first pass over the steps, compared with the timed pass.
      peak_bytes: peak memory of this process, on the first device or resident on CPU.
      parts: seconds of the parts of a step, if it has any.
    """

    name: str
    seconds: list[float]
    tokens: int
    padded: int
    flops: float
    bytes_read: float
    compile_s: float
    peak_bytes: int | None
    parts: dict[str, float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def rate(self, amount: float) -> float:
        """The amount per second, given its total over all steps."""
        return amount / sum(self.seconds)

    def to_dict(self, device: Device) -> dict[str, Any]:
        """All results by name, in seconds, bytes and FLOPs."""
        flops = self.rate(self.flops)
        return {
            "name": self.name,
            "steps": len(self.seconds),
            "step_s": {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)},
            "tokens_per_s": self.rate(self.tokens),
            "real_share_of_tokens": self.tokens / self.padded,
            "flop_per_s": flops,
            "share_of_matmul": flops / device.matmul,
            "mfu": flops / device.peak if device.peak else None,
            "share_of_bandwidth": self.rate(self.bytes_read) / device.bandwidth if device.bandwidth else None,
            "bytes_read_per_s": self.rate(self.bytes_read) or None,
            "peak_bytes": self.peak_bytes,
            "compile_s": self.compile_s,
            "parts_s": self.parts,
        }


def device(dtype: str, num_devices: int) -> Device:
    """The limits of this machine's devices; measures the matrix-product rate of the first one."""
    first = jax.devices()[0]
    kind = device_kind(first.device_kind)
    return Device(
        first.device_kind,
        time_matmul(dtype, cpu_size=CPU_SIZE).rate * (num_devices if first.platform != "cpu" else 1),
        kind and num_devices * kind.bf16_tflops * 1e12,
        kind and num_devices * kind.hbm_gbs * 1e9,
    )


def measure(workload: Workload, *, profile: str | None = None) -> Measured:
    """Runs all steps once to compile and once to time them, waiting for the devices after each step."""
    begin = time.perf_counter()
    for k in range(workload.steps):
        jax.block_until_ready(workload.run(k))
    first = time.perf_counter() - begin
    workload.parts.clear()
    if profile is not None:
        with jax.profiler.trace(profile):
            jax.block_until_ready(workload.run(0))
        workload.parts.clear()
    taken = [seconds(lambda k=k: workload.run(k)) for k in range(workload.steps)]
    return Measured(
        workload.name,
        taken,
        sum(workload.tokens),
        sum(workload.padded),
        sum(workload.flops),
        sum(workload.bytes_read),
        max(first - sum(taken), 0.0),
        peak_bytes(),
        {name: _mean(values) for name, values in workload.parts.items()},
    )


def peak_bytes() -> int | None:
    """Peak memory of the first device, or on CPU this process's peak resident memory."""
    first = jax.local_devices()[0]
    if first.platform == "cpu":
        # ru_maxrss is in kilobytes, on macOS in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (first.memory_stats() or {}).get("peak_bytes_in_use")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
