"""Devices to compile for without owning them: compilers come from wheels, devices are descriptions."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from mpo_jax.errors import UserError
from mpo_jax.runtime import flags
from mpo_jax.runtime.device_kinds import Kind
from mpo_jax.tools.plan.targets import GIB, Target

CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
CUDNN = (9, 8)
"""The oldest cuDNN that JAX's CUDA plugin accepts; no program here calls it."""

TPU_ENVIRONMENT = {
    # without these libtpu queries a cloud's metadata server, which does not exist here
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # libtpu's lock matters only for processes that use a TPU
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def prepare(target: Target, *, recommended_flags: bool = False) -> None:
    """Sets this process's devices and compiler flags. Call it before the first use of JAX.

    Raises:
      UserError: if the target's compiler is not installed.
    """
    if target.platform == "cuda":
        _find_cuda()
    elif target.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(_missing(target, "libtpu", "plan-tpu"))
        for name, value in TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    if recommended_flags:
        flags.apply_here("gpu" if target.platform == "cuda" else target.platform)
    # nothing is executed: a real accelerator would only be blocked for others
    jax.config.update("jax_platforms", "cpu")
    if target.kind is None:
        _simulate(target.num_devices)


def devices(target: Target) -> list[Any]:
    """The target's devices; accelerator devices can be compiled for but not used.

    Raises:
      UserError: if the compiler rejects the description.
    """
    if target.kind is None:
        return jax.devices("cpu")[: target.num_devices]
    try:
        if target.platform == "tpu":
            return topologies.get_topology_desc(platform="tpu", **_tpu_options(target)).devices
        return topologies.get_topology_desc(
            "mpo_plan",
            platform="cuda",
            topology=f"1x{target.groups}x{target.shape[0]}",
            target_config=gpu_description(target.kind),
        ).devices
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"--on {target.name}: the compiler rejects this target: {str(error).splitlines()[0]}"
        ) from error


def _tpu_options(target: Target) -> dict[str, Any]:
    assert target.kind is not None
    kind = target.name.partition(":")[0].rpartition("x")[2]
    options: dict[str, Any] = {"topology_name": f"{kind}:{'x'.join(map(str, target.shape))}"}
    if target.groups > 1:
        options["num_slices"] = target.groups
    if target.kind.chip_config is not None:
        options["chip_config_name"] = target.kind.chip_config
    if target.num_devices // target.groups < target.kind.devices_per_host:
        options["chips_per_host_bounds"] = (*target.shape, *[1] * (3 - len(target.shape)))
    return options


def gpu_description(kind: Kind) -> str:
    """XLA's GpuTargetConfig for a GPU, as protocol-buffer text."""
    facts = dict(kind.compiler)
    major, minor = facts.pop("capability")
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(kind.hbm_gbs * 1e9),
        "device_memory_size": int(kind.memory_gib * GIB),
        **facts,
    }
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return (
        "gpu_device_info {\n" + "\n".join(lines) + "\n}\n"
        'platform_name: "CUDA"\n'
        f"dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}\n"
        f'device_description_str: "{kind.name}"\n'
    )


def _find_cuda() -> None:
    plugin = next((name for name in CUDA_PLUGINS if importlib.util.find_spec(name)), None)
    if plugin is None:
        raise UserError(_missing(None, "JAX's CUDA plugin", "plan-gpu"))
    if not (_wheel_has_ptxas() or shutil.which("ptxas")):
        raise UserError(_missing(None, "NVIDIA's assembler ptxas", "plan-gpu"))


def _wheel_has_ptxas() -> bool:
    spec = importlib.util.find_spec("nvidia") if importlib.util.find_spec("nvidia") else None
    roots = list(spec.submodule_search_locations or ()) if spec else []
    return any(next(Path(root).glob("*/bin/ptxas"), None) for root in roots)


def _missing(target: Target | None, what: str, extra: str) -> str:
    where = f"--on {target.name}" if target else "a GPU target"
    return (
        f"{where} needs {what}, which is not installed: pip install 'mpo-jax[{extra}]' (in this folder: bash "
        f"launch/setup.sh {extra}); no accelerator is needed. --on cpu gives an upper bound without it"
    )


def _simulate(count: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if len(jax.devices("cpu")) < count:
            raise UserError(
                f"JAX has already started with {len(jax.devices('cpu'))} CPU devices, but {count} are needed: start a "
                "new process"
            ) from error
