"""The process: devices, compilation cache, precision."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from mpo_jax.config.schema import ModelConfig, RuntimeConfig
from mpo_jax.credentials import hide
from mpo_jax.errors import UserError
from mpo_jax.runtime import flags, offload, processes, program_cache
from mpo_jax.runtime.console import console

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")
CONTAINER_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Files below /sys/fs/cgroup that hold a container's limit: of cgroups version 2 and 1."""

WORTH_CACHING_S = 0.3
"""Programs that compile faster are not kept in the compilation cache."""


def start(config: RuntimeConfig) -> None:
    """Applies the runtime section to JAX.

    Raises:
      UserError: if JAX has already started, as in a notebook, with fewer devices than configured.
    """
    accelerator = "cpu" if config.cpu_devices is not None else flags.detect(os.environ)
    if config.flags == "recommended":
        flags.apply_here(accelerator)
    pool_gib = offload.widen_pool(config, accelerator, host_memory(), os.environ)
    if config.cpu_devices is not None:
        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", config.cpu_devices)
        except RuntimeError as error:
            if len(jax.devices("cpu")) < config.cpu_devices:
                raise UserError(
                    f"runtime.cpu_devices={config.cpu_devices} comes too late: JAX has already started with "
                    f"{len(jax.devices('cpu'))}; start a new process"
                ) from error
    processes.join(config.processes)
    if config.compilation_cache is not None:
        program_cache.use(config.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_CACHING_S)
    if pool_gib is not None and processes.is_main():
        console.print(
            f"[dim]{offload.POOL_LIMIT}={pool_gib}: XLA may pin all of the host's memory, for runtime.offload_*[/dim]",
            soft_wrap=True,
        )


def host_memory() -> int:
    """Bytes of memory of this host, or of the container that this process is in."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (_number(Path("/sys/fs/cgroup") / name) for name in CONTAINER_LIMITS)
    return min([physical, *(limit for limit in limits if limit is not None)])


def _number(path: Path) -> int | None:
    """The number in a file; None if it is absent or holds no number, as that of no limit."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def compute_dtype(config: ModelConfig) -> str:
    """The arithmetic's type: the configured one, or by default float32 on CPU and bfloat16 elsewhere."""
    if config.compute_dtype != "auto":
        return config.compute_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def frozen_dtype(config: ModelConfig) -> str:
    """The storage type of frozen models."""
    return compute_dtype(config) if config.frozen_dtype == "auto" else config.frozen_dtype


def save_dtype(config: RuntimeConfig) -> str:
    """The type in which stages save models: the configured one, or by default float32 on CPU and bfloat16 elsewhere."""
    if config.save_dtype != "auto":
        return config.save_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def attention(config: ModelConfig, platform: str | None = None) -> str:
    """The implementation of attention over whole rows; `auto` depends on the platform.

    TPU: the Pallas kernel, or blocked attention where it cannot hold the rows. The kernel takes a quarter of blocked
    attention's scratch memory and hands no scores through memory, as compiled programs show; it is not timed yet. CPU:
    blocked attention, which was faster than XLA's at every size measured. GPU: blocked too, until the kernel is timed
    on one.

    Args:
      platform: of the target, where that is not this machine.
    """
    if config.attention != "auto":
        return config.attention
    return "pallas_or_blocked" if (platform or jax.default_backend()) == "tpu" else "blocked"


def environment() -> dict[str, Any]:
    """Versions and devices, for env.json."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": [str(device) for device in jax.devices()],
        "command": [hide(word) for word in sys.argv],  # of the user's own programs too
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The source tree's commit, marked dirty if files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None
