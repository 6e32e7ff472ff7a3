"""Recommended compiler flags by device, each with its reason; `runtime.flags=recommended` sets them.

An unknown flag aborts the process, and names change between versions. So a flag is set only if the installed library
contains its name.
"""

import dataclasses
import importlib.util
import mmap
import os
import re
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Literal

Platform = Literal["gpu", "tpu", "cpu"]


@dataclasses.dataclass(frozen=True)
class Flag:
    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


RECOMMENDED: dict[Platform, tuple[Flag, ...]] = {
    "gpu": (
        Flag(
            "xla_gpu_enable_latency_hiding_scheduler",
            "true",
            "starts the gathering of a layer's weights and the scattering of its gradients early, beside other work",
        ),
        Flag(
            "xla_gpu_enable_pipelined_all_gather",
            "true",
            "in the scan over layers, gathers the next layer's weights while this one computes",
        ),
        Flag(
            "xla_gpu_enable_pipelined_reduce_scatter",
            "true",
            "in the scan over layers, scatters this layer's gradients while the next one computes",
        ),
    ),
    "tpu": (
        Flag("xla_enable_async_all_gather", "true", "gathers of weights run beside the arithmetic"),
        Flag("xla_tpu_enable_async_collective_fusion", "true", "puts them into the fusions they run beside"),
        Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "all-gathers among them: FSDP's most"),
        Flag(
            "xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "one gather may span several fusions: long"
        ),
        Flag("xla_tpu_overlap_compute_collective_tc", "true", "lets the tensor core work during a collective"),
        Flag(
            "xla_tpu_enable_data_parallel_all_reduce_opt",
            "true",
            "sums gradients over mesh.data, between slices too, while the backward pass goes on",
        ),
        Flag("xla_tpu_data_parallel_opt_different_sized_ops", "true", "the same for gradients of different sizes"),
    ),
    "cpu": (),
}

VARIABLE: dict[Platform, str] = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS", "cpu": "XLA_FLAGS"}
"""The environment variable from which each platform's compiler reads its flags."""


def detect(environment: Mapping[str, str], devices: Path = Path("/dev")) -> Platform:
    """The platform JAX will run on, without starting it: from JAX_PLATFORMS, or from device files and plugins."""
    named = environment.get("JAX_PLATFORMS", "").split(",")[0].strip()
    if named:
        return "gpu" if named in ("cuda", "gpu") else "tpu" if named == "tpu" else "cpu"
    there = hardware(devices)
    if "gpu" in there and _library("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"):
        return "gpu"
    return "tpu" if "tpu" in there and _library("libtpu") else "cpu"


def hardware(devices: Path = Path("/dev")) -> set[str]:
    """The kinds of accelerators with a device file: gpu, tpu."""
    found = {"gpu"} if (devices / "nvidiactl").exists() else set()
    if any(devices.glob("accel[0-9]*")) or any((devices / "vfio").glob("[0-9]*")):
        found.add("tpu")
    return found


def apply(platform: Platform, environment: MutableMapping[str, str]) -> tuple[list[Flag], list[Flag]]:
    """Sets the platform's flags, before JAX starts; flags that the user has set are kept.

    Returns:
      The flags set now, and those skipped because an installed library does not know them.
    """
    variable = VARIABLE[platform]
    given = environment.get(variable, "")
    mentioned = set(re.findall(r"--(\w+)", given))
    wanted = [flag for flag in RECOMMENDED[platform] if flag.name not in mentioned]
    names = known((flag.name for flag in wanted), libraries(platform))
    chosen = [flag for flag in wanted if flag.name in names]
    environment[variable] = " ".join(filter(None, [given, *map(str, chosen)]))
    return chosen, [flag for flag in wanted if flag.name not in names]


def libraries(platform: Platform) -> list[Path]:
    """The shared libraries that parse the platform's flags; each must know a flag."""
    if platform == "tpu":
        return _library("libtpu", pattern="libtpu.so")
    common = _library("jaxlib", pattern="libjax_common.so")
    if platform == "cpu":
        return common
    return common + _library("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13", pattern="xla_cuda_plugin.so")


def known(names: Iterable[str], files: Iterable[Path]) -> set[str]:
    """The names that every file contains as a whole word; none if there is no file."""
    wanted, paths = set(names), list(files)
    if not paths:
        return set()
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            wanted = {name for name in wanted if _holds(data, name.encode())}
    return wanted


def _holds(data: mmap.mmap, word: bytes) -> bool:
    """Whether the file contains the whole word. `find`, since a pattern takes seconds over a library's 400 MB."""
    place = data.find(word)
    while place >= 0:
        around = data[max(place - 1, 0) : place] + b" " + data[place + len(word) : place + len(word) + 1]
        if not re.search(rb"\w", around):
            return True
        place = data.find(word, place + 1)
    return False


def apply_here(platform: Platform | None = None) -> tuple[list[Flag], list[Flag]]:
    """`apply` for this process; the platform is detected unless given."""
    return apply(platform or detect(os.environ), os.environ)


def _library(*modules: str, pattern: str = "") -> list[Path]:
    """The folder of the first installed module, or the files in it that match the pattern."""
    for module in modules:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations)))
            return sorted(folder.glob(pattern)) if pattern else [folder]
    return []
