"""`mpo doctor`: what a machine has, what will fail on it, and the remedy. It only inspects and measures."""

import dataclasses
import http.client
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from mpo_jax.config.schema import Config, MeshConfig, WandbConfig
from mpo_jax.data.corpus import check_first_rows
from mpo_jax.errors import UserError
from mpo_jax.pipeline import preflight
from mpo_jax.pipeline.bucket import Bucket
from mpo_jax.runtime import flags, machine
from mpo_jax.runtime.device_kinds import similar_kind
from mpo_jax.runtime.machine import PACKAGES
from mpo_jax.runtime.processes import wait
from mpo_jax.runtime.sharding import mesh_of, replicated
from mpo_jax.runtime.timing import fastest, time_matmul
from mpo_jax.runtime.words import counted
from mpo_jax.training import wandb_log

Verdict = Literal["ok", "warn", "fail"]
GIB = 2**30
DISK_MIB = 256
BUCKET_MIB = 16
SLOW_DISK_MBS = 100
LITTLE_SPACE_GIB = 20
HUB_TIMEOUT_S = 3.0
CLOCK_SPREAD_S = 1.0
UNREACHED = urllib.error.URLError, http.client.HTTPException, OSError, ValueError
"""What a request of an address raises, a broken one included."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
      found: what was found.
      advice: what will go wrong and what to do; empty if nothing is wrong.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def examine(config: Config) -> Iterator[Check]:
    """All checks, cheap ones first. JAX starts with the check of the devices."""
    yield versions()
    yield from compilers()
    yield devices(jax.devices(), flags.hardware())
    yield mesh(config.mesh, len(jax.devices()))
    yield memory()
    yield interconnect()
    yield disk(Path(config.workdir))
    if config.runtime.bucket is not None:
        yield bucket(config.runtime.bucket)
    yield from inputs(config)
    yield cache(config.runtime.compilation_cache)
    yield hub(os.environ)
    if config.runtime.wandb is not None:
        yield wandb(config.runtime.wandb)
    yield clocks()
    yield matmul()
    yield collective()


def versions() -> Check:
    """Versions of the libraries; JAX's parts must have the same one."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    parts = ("jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")
    installed = {name: _version(name) for name in parts}
    other = {name: version for name, version in installed.items() if version and version != found["jax"]}
    text = f"Python {platform.python_version()}, " + ", ".join(f"{name} {version}" for name, version in found.items())
    if other:
        named = ", ".join(f"{name} {version}" for name, version in other.items())
        return Check(
            "versions", "fail", text, f"{named} beside jax {found['jax']}: JAX refuses or crashes; run launch/setup.sh"
        )
    return Check("versions", "ok", text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def compilers() -> Iterator[Check]:
    """Compilers for this machine and `mpo plan`, and the compiler flags that are set."""
    have = {
        "GPU (CUDA plugin)": _spec("jax_cuda12_plugin") or _spec("jax_cuda13_plugin"),
        "TPU (libtpu)": _spec("libtpu"),
    }
    names = [name for name, there in have.items() if there]
    yield Check("compilers", "ok", f"CPU{''.join(f', {name}' for name in names)}")
    given = {name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if os.environ.get(name)}
    yield Check("compiler flags", "ok", "; ".join(f"{k}={v}" for k, v in given.items()) or "none set")


def _spec(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def devices(found: list[Any], hardware: set[str]) -> Check:
    """JAX's devices, compared with the machine's accelerators."""
    first = found[0]
    kind = first.platform if first.device_kind == first.platform else f"{first.device_kind} ({first.platform})"
    text = f"{counted(len(found), 'device')}: {kind}; {counted(jax.process_count(), 'process', 'processes')}"
    unused = hardware - {first.platform}
    if unused and first.platform == "cpu":
        kind = unused.pop()
        extra = "tpu" if kind == "tpu" else "cuda12"
        return Check(
            "devices", "fail", text,
            f"there is a {kind.upper()}, but JAX runs on the CPU, hundreds of times slower: launch/setup.sh {extra}, "
            "and no JAX_PLATFORMS=cpu",
        )  # fmt: skip
    return Check("devices", "ok", text)


def mesh(config: MeshConfig, there: int) -> Check:
    """The configuration's mesh, compared with the devices."""
    text = f"data {config.data} x fsdp {config.fsdp} x tensor {config.tensor}"
    if config.num_devices > there:
        return Check(
            "mesh", "fail", text, f"{counted(config.num_devices, 'device')} needed, {there} there: lower the mesh"
        )
    if config.num_devices < there:
        return Check(
            "mesh", "warn", text, f"idle: {counted(there - config.num_devices, 'device')}; mesh.fsdp={there} uses all"
        )
    return Check("mesh", "ok", text)


def memory() -> Check:
    """Memory of the host and of a device."""
    host = machine.host_memory()
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    text = f"host {host / GIB:.0f} GiB" + (f", device {limit / GIB:.1f} GiB for JAX" if limit else "")
    fraction = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    if jax.default_backend() == "gpu" and fraction is None:
        return Check(
            "memory", "warn", text,
            "JAX takes 75% of a GPU's memory by default, and plans count on 92%: XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
        )  # fmt: skip
    return Check("memory", "ok", text)


def interconnect() -> Check:
    """How the devices are connected, as far as the driver reports it."""
    if jax.default_backend() == "tpu":
        last = getattr(jax.devices()[-1], "coords", None)
        return Check("interconnect", "ok", f"ICI, last device at {last}")
    if jax.default_backend() != "gpu":
        return Check("interconnect", "ok", "none: the CPU's devices are simulated")
    tool = shutil.which("nvidia-smi")
    topology = _output([tool, "topo", "-m"]) if tool else None
    if topology is None:
        return Check("interconnect", "warn", "unknown", "nvidia-smi is not there or fails: the wiring cannot be seen")
    return wiring(topology, len(jax.local_devices()))


def wiring(topology: str, count: int) -> Check:
    """Reads `nvidia-smi topo -m`: NV# between two GPUs is NVLink."""
    rows = [line.split() for line in topology.splitlines() if line.startswith("GPU")]
    links = [cell for row in rows for cell in row[1 : len(rows) + 1] if cell != "X"]
    slow = sorted({cell for cell in links if not cell.startswith("NV")})
    if count > 1 and slow:
        return Check(
            "interconnect", "warn", f"{count} GPUs, some joined by {', '.join(slow)} and not by NVLink",
            "fsdp gathers every layer's weights over this: prefer mesh.data where the model fits, or expect slow steps",
        )  # fmt: skip
    return Check("interconnect", "ok", f"{count} GPUs, " + ("NVLink" if links else "no link needed"))


def disk(workdir: Path) -> Check:
    """Free space and speed of the disk for artifacts."""
    folder = next(path for path in (workdir, *workdir.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    try:
        written, read = _disk_speed(folder, min(DISK_MIB, free // 2**21))
    except OSError as error:
        return Check("disk", "fail", f"{folder}", f"cannot be written ({error.strerror}): choose another workdir=DIR")
    text = f"{folder}: {free / GIB:.0f} GiB free, {written:.0f} MB/s written, {read:.0f} MB/s read"
    if free < LITTLE_SPACE_GIB * GIB:
        return Check(
            "disk", "warn", text,
            "checkpoints hold 12 bytes a parameter and two are kept (160 GB for 7B): point workdir at a larger disk",
        )  # fmt: skip
    if written < SLOW_DISK_MBS:
        return Check("disk", "warn", text, "checkpoints of large models will hold up training: raise checkpoint_every")
    return Check("disk", "ok", text)


def bucket(url: str) -> Check:
    """Whether a file can be written to the bucket, read back and deleted, and how fast."""
    with tempfile.TemporaryDirectory() as folder:
        sent, back, name = Path(folder) / "sent", Path(folder) / "back", f".mpo-doctor-{os.getpid()}"
        sent.mkdir()
        (sent / "bytes").write_bytes(np.random.default_rng(0).bytes(BUCKET_MIB * 2**20))
        try:
            store = Bucket(url)
            begin = time.perf_counter()
            store.send(sent, name)
            between = time.perf_counter()
            store.fetch(name, back)
            end = time.perf_counter()
            store.remove(name)
        except UserError as error:
            return Check("bucket", "fail", url, str(error))
    size = BUCKET_MIB * 2**20 / 1e6
    text = f"{url}: {size / (between - begin):.0f} MB/s sent, {size / (end - between):.0f} MB/s fetched"
    if not store.takes_checkpoints:
        return Check("bucket", "warn", text, "checkpoints stay in workdir, since Orbax does not write to s3://: "
                     "a machine that is lost takes those of the stage at hand with it")  # fmt: skip
    return Check("bucket", "ok", text)


def _disk_speed(folder: Path, mebibytes: int) -> tuple[float, float]:
    """MB/s of writing, synced to disk, and of reading (mostly from the page cache)."""
    block = np.random.default_rng(0).bytes(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".mpo-doctor-") as file:
        begin = time.perf_counter()
        for _ in range(mebibytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        between = time.perf_counter()
        file.seek(0)
        while file.read(2**20):
            pass
        end = time.perf_counter()
    size = mebibytes * 2**20 / 1e6
    return size / (between - begin), size / (end - between)


def inputs(config: Config) -> Iterator[Check]:
    """What the configuration names, as every run checks it before its first stage: models and rows."""
    base, given, data = config.model.path, config.reward.path or config.reward.function, config.data
    try:
        codec, decoder = preflight.check_base(config)
        yield Check("model", "ok", f"{base or 'from scratch'}: {decoder.family}, {codec.vocab_size} token ids")
    except UserError as error:
        yield Check("model", "fail", base or "from scratch", str(error))
        return
    row = None
    try:
        row = check_first_rows(config)
        yield Check("data", "ok", "toy world" if data.kind == "toy" else f"{data.kind}: {', '.join(data.path)}")
    except UserError as error:
        yield Check("data", "fail", data.kind, str(error))
    if given is None:
        return
    what = "reward model" if config.reward.function is None else "reward function"
    try:
        preflight.check_reward(config, codec, row)
        yield Check(what, "ok", given)
    except UserError as error:
        yield Check(what, "fail", given, str(error))


def cache(folder: str | None) -> Check:
    """The compilation cache, without which every start compiles again."""
    if folder is None:
        return Check("compilation cache", "warn", "off", "every start compiles all programs again: minutes for 7B")
    path = Path(folder).expanduser()
    above = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(above, os.W_OK):
        return Check("compilation cache", "warn", str(path), "cannot be written: set runtime.compilation_cache=DIR")
    return Check("compilation cache", "ok", str(path))


def hub(environment: Any) -> Check:
    """Whether models and data sets can be downloaded by name."""
    if environment.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return Check("hub", "ok", "HF_HUB_OFFLINE is set: only what is downloaded already")
    endpoint = environment.get("HF_ENDPOINT", "https://huggingface.co")
    token = "HF_TOKEN is set" if environment.get("HF_TOKEN") else "no HF_TOKEN"
    if not endpoint.startswith(("https://", "http://")):
        return Check("hub", "warn", endpoint, "HF_ENDPOINT is no address: unset it")
    try:
        with _open(f"{endpoint}/api/models?limit=1"):
            return Check("hub", "ok", f"reached; {token}")
    except UNREACHED as error:
        reason = type(getattr(error, "reason", error)).__name__
        return Check(
            "hub", "warn", f"not reached in {HUB_TIMEOUT_S:g} s ({reason}); {token}",
            "hub ids and hub: data fail here: download elsewhere (`hf download`), name folders, set HF_HUB_OFFLINE=1",
        )  # fmt: skip


def wandb(config: WandbConfig) -> Check:
    """Whether runs can be logged to Weights & Biases: package, credentials, server."""
    try:
        mode = wandb_log.check(config)
    except UserError as error:
        return Check("wandb", "fail", config.mode or "online", str(error))
    if mode is None:
        return Check("wandb", "ok", "disabled")
    text = f"{_version('wandb')}, {mode}, project {config.project}"
    if mode == "offline":
        return Check("wandb", "ok", f"{text}: runs stay in workdir/wandb")
    server = wandb_log.server()
    try:
        with _open(server):
            return Check("wandb", "ok", f"{text}: {server} reached")
    except urllib.error.HTTPError:
        return Check("wandb", "ok", f"{text}: {server} reached")
    except UNREACHED as error:
        reason = type(getattr(error, "reason", error)).__name__
        return Check(
            "wandb", "warn", f"{text}: {server} not reached in {HUB_TIMEOUT_S:g} s ({reason})",
            "runs will stay in workdir/wandb: set runtime.wandb.mode=offline and upload them with `wandb sync`",
        )  # fmt: skip


def _open(address: str) -> Any:
    """A request of an address, without the user and password in it, which urllib would take for a port."""
    scheme, colon, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return urllib.request.urlopen(f"{scheme}{colon}{host.rpartition('@')[2]}{slash}{path}", timeout=HUB_TIMEOUT_S)


def clocks() -> Check:
    """How far the processes' clocks differ, read right after a barrier."""
    if jax.process_count() == 1:
        return Check("clocks", "ok", "one process")
    # the checks before take longer on some hosts; the barrier on the devices is the one that ends at one moment
    wait("mpo doctor checks the clocks")
    multihost_utils.sync_global_devices("mpo doctor clocks")
    # whole seconds and microseconds apart: float32 would round a time of day to minutes
    now = time.time()
    every = np.asarray(multihost_utils.process_allgather(np.asarray([int(now), int(now % 1 * 1e6)], np.int32)))
    return clock_spread(every[:, 0] + every[:, 1] / 1e6)


def clock_spread(seconds: np.ndarray) -> Check:
    spread = float(np.max(seconds) - np.min(seconds))
    text = f"{counted(len(seconds), 'process', 'processes')}, {spread * 1e3:.0f} ms apart"
    if spread > CLOCK_SPREAD_S:
        return Check(
            "clocks", "warn", text, "log lines and file times of hosts do not compare: run a time service (chrony)"
        )
    return Check("clocks", "ok", text)


def matmul() -> Check:
    """Rate of a matrix product on one device."""
    kind = jax.local_devices()[0].device_kind
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with jax.default_device(jax.local_devices()[0]):
        product = time_matmul(dtype)
    rate = product.rate / 1e12
    if not product.is_right:
        return Check("matmul", "fail", f"{kind}: wrong result", "the device computes wrongly: take it out of service")
    text = f"{kind}: {rate:.3g} TFLOP/s ({product.size} x {product.size} {dtype})"
    known = similar_kind(kind)
    if known is not None and rate < 0.4 * known.bf16_tflops:
        return Check(
            "matmul", "warn", text,
            f"{known.bf16_tflops:g} are its peak: another process uses the device, or it is throttled (power, heat)",
        )  # fmt: skip
    return Check("matmul", "ok", text)


def collective() -> Check:
    """Rate of an all-gather over all devices, as in FSDP, and whether the result is right."""
    count = jax.device_count()
    if count == 1:
        return Check("collective", "ok", "one device")
    over = mesh_of(MeshConfig(fsdp=count), jax.devices())
    rows = (1 if jax.default_backend() == "cpu" else 32) * count
    divided = NamedSharding(over, PartitionSpec("fsdp"))
    x = jax.jit(
        lambda: jnp.broadcast_to(jnp.arange(rows, dtype=jnp.float32)[:, None], (rows, 2**18)), out_shardings=divided
    )()
    gather = jax.jit(lambda x: x, out_shardings=replicated(over))
    rate = x.nbytes * (count - 1) / count / fastest(lambda: gather(x)) / 1e9
    if not np.array_equal(np.asarray(gather(x).addressable_data(0))[:, -1], np.arange(rows)):
        return Check(
            "collective", "fail", f"{count} devices: wrong result", "links or drivers are broken: NCCL_DEBUG=INFO"
        )
    return Check("collective", "ok", f"{count} devices: all-gather at {rate:.3g} GB/s a device")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
