"""Several processes, one per host: joining them, and which one writes.

All processes run the same command on the same files (a shared file system), and arrays span them. Only process 0 writes
artifacts, metrics and the terminal; every process writes its own errors.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpo_jax.config.schema import ProcessesConfig
from mpo_jax.errors import UserError
from mpo_jax.runtime import fatal, offload
from mpo_jax.runtime.coordination import POLLS_S, coordination

T = TypeVar("T")

REPORTED = "process 0 writes the report"
"""What the other processes wait for before they end."""


def join(config: ProcessesConfig) -> None:
    """Joins the other processes, if the configuration or a launcher names any. Call it before any device is used.

    Raises:
      UserError: if the others cannot be reached in time, or if only some of the settings are given.
    """
    given = {name: getattr(config, name) for name in ("coordinator", "count", "index")}
    explicit = any(value is not None for value in given.values())
    if missing := [name for name, value in given.items() if value is None] if explicit else []:
        raise UserError(
            f"runtime.processes.{missing[0]} is missing: coordinator (host:port of process 0), count and index "
            "go together"
        )
    if not explicit and not detected(os.environ):
        return
    global _name
    _name = f" in process {config.index} of {config.count}" if explicit else f" on {socket.gethostname()}"
    fatal.explain_aborts(_name)
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator,
            num_processes=config.count,
            process_id=config.index,
            initialization_timeout=config.timeout_s,
            heartbeat_timeout_seconds=config.timeout_s,
            shutdown_timeout_seconds=config.timeout_s,
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the processes did not find each other within runtime.processes.timeout_s={config.timeout_s} s: {reason}. "
            "Check that all of them run, with the same coordinator and count and different indices"
        ) from error


def detected(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that jax.distributed understands has started several processes: SLURM, Open MPI, TPU pods, or
    Kubernetes with jobs of several pods.
    """
    several = any(int(environment.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    in_step = "SLURM_PROCID" in environment or "OMPI_COMM_WORLD_RANK" in environment
    pod = any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    kubernetes = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    return (several and in_step) or pod or kubernetes


def is_main() -> bool:
    """Whether this process writes the shared files."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Returns once all processes have reached this call, however long that takes; no device is held meanwhile.

    Args:
      name: what is waited for, the same in all processes.
    """
    if (together := coordination()) is not None:
        together.wait(name)


def agree(value: T, name: str = "process 0's decision") -> T:
    """Process 0's value, for all processes: a file that one sees may not have reached another's disk.

    Args:
      value: anything that JSON holds; only process 0's is used.
      name: what is waited for, the same in all processes.
    """
    together = coordination()
    return value if together is None else together.agree(value, name)


def share(data: bytes) -> bytes:
    """Process 0's bytes, for all processes, which may not see its disk."""
    if jax.process_count() == 1:
        return data
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    mine = np.frombuffer(data, np.uint8) if is_main() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8).tobytes()


_name = ""


def name() -> str:
    """This process's name for error messages, empty if it is the only one. It does not call JAX, which may hang."""
    return _name


def leave_last() -> None:
    """Gives the other processes time to end by themselves: without process 0's coordination service JAX aborts them."""
    if is_main():
        time.sleep(2 * POLLS_S[1])


def exit_now(status: int) -> NoReturn:
    """Ends this process at once: a normal exit would wait for the others, which wait for this one in a collective.

    They lose its heartbeat and stop within `runtime.processes.timeout_s`.
    """
    sys.stdout.flush()
    fatal.finish()
    os._exit(status)


def is_lost_process(error: Exception) -> bool:
    """Whether the error is that of a computation over several processes, one of which has died."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(name())


def to_host(x: Any) -> np.ndarray:
    """A whole array on every host, wherever its parts are."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        # a gather runs on the devices, wherever the array is
        return np.asarray(multihost_utils.process_allgather(offload.to_devices(x), tiled=True))
    return np.asarray(x)
