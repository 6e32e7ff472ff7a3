"""The speed of the stages' own programs on this machine, with its upper bounds."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError
from mpo_jax.runtime import machine
from mpo_jax.runtime.sharding import check_batch, make_mesh
from mpo_jax.tools.bench import workloads
from mpo_jax.tools.bench.measure import Device, Measured, device, measure

SIZES = {
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_layers": 6,
    "num_heads": 6,
    "num_kv_heads": 6,
    "head_dim": 48,
    "tie_embeddings": False,
}
"""The benchmark's own model if the configuration names none: 8.3M parameters with a vocabulary of 4096."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """The results of a benchmark.

    Attributes:
      dtype: type of the arithmetic.
      batch: number of rows, pairs or prompts per step.
      rows: prompt and response lengths of synthetic rows; None for the configuration's own rows.
    """

    device: Device
    dtype: str
    batch: int
    rows: tuple[int, int] | None
    workloads: list[Measured]

    def to_dict(self) -> dict[str, Any]:
        """All results, with the machine they were measured on."""
        bound = self.device
        return {
            "environment": machine.environment(),
            "device": {"kind": bound.kind, "matmul_flop_per_s": bound.matmul, "peak_flop_per_s": bound.peak},
            "dtype": self.dtype,
            "batch": self.batch,
            "rows": self.rows and {"prompt": self.rows[0], "response": self.rows[1]},
            "workloads": [one.to_dict(bound) for one in self.workloads],
        }


def measure_all(
    config: Config,
    names: tuple[str, ...],
    *,
    batch: int,
    steps: int,
    rows: tuple[int, int] | None,
    vocab_size: int,
    profile: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Speed:
    """Times workloads one after another.

    Args:
      names: workloads to time; if empty, all of them.
      batch: number of rows, pairs or prompts per step.
      steps: number of timed steps per workload.
      rows: prompt and response lengths of synthetic rows; None for the configuration's own rows.
      vocab_size: vocabulary of the benchmark's own model.
      profile: folder for a trace of one step of each workload.
      log: callback for a line before each measurement.

    Raises:
      UserError: for an unknown name, or a batch that does not divide over the mesh.
    """
    wanted = workloads.check_names(names)
    config = _sized(config, rows)
    machine.start(config.runtime)
    mesh = make_mesh(config.mesh)
    check_batch(batch, mesh, "--batch")
    build = workloads.Bench(config, mesh, batch, steps, rows, vocab_size)
    with jax.set_mesh(mesh):
        dtype = machine.compute_dtype(config.model)
        bound = device(dtype, mesh.size)
        log(f"{bound.kind}: {bound.matmul / 1e9:.4g} GFLOP/s in a large {dtype} matrix product")
        found = []
        for name in wanted:
            log(f"  {name}: {workloads.ABOUT[name]}")
            trace = None if profile is None else str(profile / name)
            found.append(measure(build(name), profile=trace))
    return Speed(bound, dtype, batch, rows, found)


def _sized(config: Config, rows: tuple[int, int] | None) -> Config:
    """The configuration with length limits for synthetic rows, and the benchmark's own model if it names none."""
    if rows is None:
        if config.data.kind == "toy" and config.model.path is not None:
            raise UserError("mpo bench --rows data needs data.kind and data.path besides model.path")
        return config
    text = config.text.model_copy(update={"max_prompt_tokens": rows[0], "max_response_tokens": rows[1]})
    update: dict[str, Any] = {"text": text}
    if config.model.path is None and not config.model.architecture.model_fields_set:
        sizes = config.model.architecture.model_copy(update={**SIZES, "max_positions": sum(rows)})
        update["model"] = config.model.model_copy(update={"architecture": sizes})
    return config.model_copy(update=update)
