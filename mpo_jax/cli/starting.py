"""What a command that makes stages does first and last: it says what it starts, and then imports what takes seconds."""

import contextlib
import gc
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mpo_jax.runtime.console import console
from mpo_jax.runtime.interrupts import STOPS
from mpo_jax.runtime.version import __version__

if TYPE_CHECKING:
    from mpo_jax.config.schema import Config

RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "JOB_COMPLETION_INDEX")
"""Variables in which launchers give a process its number. JAX, which knows better, is not there yet."""


@contextlib.contextmanager
def starting(command: str, source: Path | None, config: "Config") -> Iterator[None]:
    """Prints what is started, by the YAML file `source` if there is one; the block imports the libraries. From here on
    the message about a stop names the workdir.

    An import makes a million objects that stay. The garbage collector would look through them again and again, an
    eighth of the time.
    """
    STOPS.workdir = config.workdir
    if _first(config, os.environ):
        console.print(announcement(command, source, config), soft_wrap=True, markup=False)
    if "jax" in sys.modules or not gc.isenabled():
        # not a process of its own: there may be garbage that should go
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        # later collections leave out what is there now
        gc.freeze()


def announcement(command: str, source: Path | None, config: "Config") -> str:
    """`mpo 0.1.0 run configs/quickstart.yaml: sft, dpo, ppo, mpo in runs/quickstart (Python 3.12.3, jax 0.10.2)`."""
    names = config.table.experiment if command == "table" else config.experiment
    versions = f"Python {platform.python_version()}, jax {importlib.metadata.version('jax')}"
    what = command if source is None else f"{command} {source}"
    return f"mpo {__version__} {what}: {', '.join(names)} in {config.workdir} ({versions})"


def print_tensorboard(config: "Config") -> None:
    """Says how to look at the curves of the workdir's stages, where TensorBoard's files are written."""
    if config.runtime.tensorboard:
        console.print(shlex.join(["tensorboard", "--logdir", config.workdir]), soft_wrap=True, markup=False)


def _first(config: "Config", environment: Mapping[str, str]) -> bool:
    """Whether this is the only process or, as far as can be known before they meet, the first of several."""
    index = config.runtime.processes.index
    if index is not None:
        return index == 0
    return all(environment.get(name, "0") == "0" for name in RANKS)
