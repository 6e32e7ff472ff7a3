"""`mpo bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpo_jax.cli.arguments import expanded
from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console

if TYPE_CHECKING:
    from rich.table import Table

    from mpo_jax.tools.bench.measure import Device, Measured


def bench(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORKLOAD | CONFIG.yaml | KEY=VALUE]...", help="default: all workloads"),
    ] = None,
    rows: Annotated[
        str, typer.Option(help="PROMPT+RESPONSE tokens of made-up rows, or: data, the configuration's own rows")
    ] = "128+128",
    batch: Annotated[int, typer.Option(min=1, help="rows, pairs or prompts a step")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="timed steps")] = 5,
    vocab: Annotated[int, typer.Option(min=2, help="of the model made up where model.path names none")] = 4096,
    json_file: Annotated[Path | None, typer.Option("--json", parser=expanded, metavar="FILE")] = None,
    profile: Annotated[
        Path | None, typer.Option(parser=expanded, metavar="DIR", help="a trace of one step of each workload")
    ] = None,
) -> None:
    """Time the stages' own functions on this machine: tokens/s, FLOP/s, MFU, memory."""
    from mpo_jax.config.load import load_config
    from mpo_jax.runtime.files import write_json
    from mpo_jax.runtime.outputs import check_output_file, check_output_folder
    from mpo_jax.tools.bench import speed
    from mpo_jax.tools.bench.measure import DEFINITIONS

    if json_file is not None:
        check_output_file("--json", json_file)
    if profile is not None:
        check_output_folder("--profile", profile)
    given = arguments or []
    names = tuple(word for word in given if "=" not in word and not word.endswith((".yaml", ".yml")))
    overrides = tuple(word for word in given if word not in names)
    found = speed.measure_all(
        load_config(None, overrides),
        names,
        batch=batch,
        steps=steps,
        rows=_lengths(rows),
        vocab_size=vocab,
        profile=profile,
        log=lambda line: console.print(line, soft_wrap=True),
    )
    console.print(_table(found.workloads, found.device))
    for one in found.workloads:
        if one.parts:
            console.print(_parts(one), soft_wrap=True)
    console.print(DEFINITIONS, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, found.to_dict())
        console.print(f"wrote {json_file}", soft_wrap=True)


def _lengths(rows: str) -> tuple[int, int] | None:
    """Tokens of a prompt and of a response; None for the configuration's own rows."""
    if rows == "data":
        return None
    prompt, _, response = rows.partition("+")
    if not (prompt.isdigit() and response.isdigit() and int(prompt) and int(response)):
        raise UserError(f"--rows wants PROMPT+RESPONSE tokens, such as 128+128, or data, not {rows!r}")
    return int(prompt), int(response)


def _table(found: "list[Measured]", bound: "Device") -> "Table":
    from rich.table import Table

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


def _parts(one: "Measured") -> str:
    """How a step's time divides over its parts."""
    mean = sum(one.seconds) / len(one.seconds)
    parts = ", ".join(f"{name} {1e3 * s:.4g} ms ({s / mean:.0%})" for name, s in one.parts.items())
    return f"{one.name}: {parts}; {sum(one.parts.values()) / mean:.0%} of a step is in its parts"
