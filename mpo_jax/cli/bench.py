"""`mpo bench`: how fast each stage's own functions run here, beside what bounds them."""

from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError
from mpo_jax.runtime import machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_json
from mpo_jax.runtime.sharding import check_batch, make_mesh
from mpo_jax.tools.bench import workloads
from mpo_jax.tools.bench.measure import DEFINITIONS, Device, Measured, device, measure

SIZES = {
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_layers": 6,
    "num_heads": 6,
    "num_kv_heads": 6,
    "head_dim": 48,
    "tie_embeddings": False,
}
"""Of the model that is made up where none is named: 8.3M parameters with a vocabulary of 4096."""


def bench(
    config: Config,
    names: tuple[str, ...],
    *,
    batch: int,
    steps: int,
    rows: tuple[int, int] | None,
    vocab_size: int,
    json_file: Path | None,
    profile: Path | None,
) -> None:
    """Prints a table, and writes its figures where asked.

    Args:
      names: of workloads; all of them if empty.
      rows: prompt and response lengths of made-up rows; None for the configuration's own.
      profile: folder for a trace of one step of each workload.

    Raises:
      UserError: for a name that is none, or a batch that does not divide over the mesh.
    """
    wanted = workloads.check_names(names)
    check_batch(batch, config.mesh, "--batch")
    config = _sized(config, rows)
    machine.start(config.runtime)
    mesh = make_mesh(config.mesh)
    build = workloads.Bench(config, mesh, batch, steps, rows, vocab_size)
    with jax.set_mesh(mesh):
        dtype = machine.compute_dtype(config.model)
        bound = device(dtype, mesh.size)
        console.print(f"{bound.kind}: {bound.matmul / 1e9:.4g} GFLOP/s in a large {dtype} matrix product")
        found = []
        for name in wanted:
            console.print(f"  {name}: {workloads.ABOUT[name]}", soft_wrap=True)
            trace = None if profile is None else str(profile / name)
            found.append(measure(build(name), profile=trace))
    console.print(_table(found, bound))
    for one in found:
        if one.parts:
            console.print(_explained(one), soft_wrap=True)
    console.print(DEFINITIONS, soft_wrap=True)
    if json_file is not None:
        figures = [one.to_dict(bound) for one in found]
        write_json(
            json_file,
            {
                "environment": machine.environment(),
                "device": {"kind": bound.kind, "matmul_flop_per_s": bound.matmul, "peak_flop_per_s": bound.peak},
                "dtype": dtype,
                "batch": batch,
                "rows": rows and {"prompt": rows[0], "response": rows[1]},
                "workloads": figures,
            },
        )
        console.print(f"wrote {json_file}", soft_wrap=True)


def _sized(config: Config, rows: tuple[int, int] | None) -> Config:
    """With room for made-up rows, and the benchmark's model where the configuration names none."""
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


def _table(found: list[Measured], bound: Device) -> Table:
    table = Table(title="Speed", title_style="bold")
    table.add_column("workload")
    for column in ("step, ms (min, max)", "tokens/s", "real", "GFLOP/s", "of matmul", "MFU", "read GB/s", "peak GiB",
                   "compile s"):  # fmt: skip
        table.add_column(column, justify="right")
    for one in found:
        row = one.to_dict(bound)
        step = row["step_s"]
        table.add_row(
            one.name,
            f"{1e3 * step['median']:.4g} ({1e3 * step['min']:.4g}, {1e3 * step['max']:.4g})",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['real_share_of_tokens']:.0%}",
            f"{row['flop_per_s'] / 1e9:,.4g}",
            f"{row['share_of_matmul']:.0%}",
            "-" if row["mfu"] is None else f"{row['mfu']:.0%}",
            _bandwidth(row),
            "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.2f}",
            f"{one.compile_s:.1f}",
        )
    return table


def _bandwidth(row: dict[str, Any]) -> str:
    if row["bytes_read_per_s"] is None:
        return "-"
    share = row["share_of_bandwidth"]
    return f"{row['bytes_read_per_s'] / 1e9:.3g}" + ("" if share is None else f" ({share:.0%})")


def _explained(one: Measured) -> str:
    """How a step's time divides over its parts."""
    mean = sum(one.seconds) / len(one.seconds)
    parts = ", ".join(f"{name} {1e3 * s:.4g} ms ({s / mean:.0%})" for name, s in one.parts.items())
    return f"{one.name}: {parts}; {sum(one.parts.values()) / mean:.0%} of a step is in its parts"
