"""`mpo plan`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpo_jax.cli.arguments import ConfigPath, Overrides, expanded, read_config
from mpo_jax.cli.exits import DOES_NOT_FIT
from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console

if TYPE_CHECKING:
    from mpo_jax.config.schema import Config
    from mpo_jax.stages.stage import Program
    from mpo_jax.tools.plan.measure import Measured
    from mpo_jax.tools.plan.targets import Target


def plan(
    config: ConfigPath,
    on: Annotated[
        str, typer.Option(metavar="TARGET", help="a100x8, 2xa100x8, h100x8, v5p:2x2x2, v5e:2x4, cpu, cpu:80, ...")
    ],
    overrides: Overrides = None,
    stage: Annotated[str, typer.Option(help="comma-separated stages (sft, reward, ...); default: all")] = "",
    json: Annotated[
        Path | None, typer.Option(parser=expanded, metavar="FILE", help="file to write the numbers to")
    ] = None,
    hours: Annotated[
        bool, typer.Option("--hours", help="fetch rows and tokenizer from the hub, for hours by stage")
    ] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="search micro-batches and remat for the fastest that fits")
    ] = False,
) -> None:
    """Compile every program for devices that need not be here; status 3 where one does not fit their memory."""
    # JAX reads it when it is imported: without it the compilers report every driver that is missing
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from mpo_jax.pipeline.stages import STAGES
    from mpo_jax.runtime.outputs import check_output_file
    from mpo_jax.tools.plan import compilers, targets

    if json is not None:
        check_output_file("--json", json)
    resolved = read_config(config, overrides)
    stages = tuple(name.strip() for name in stage.split(",") if name.strip())
    if unknown := set(stages) - set(STAGES):
        raise UserError(f"--stage {', '.join(sorted(unknown))}: no such stage; there are {', '.join(STAGES)}")
    target = targets.parse(on, cpu_devices=resolved.mesh.num_devices)
    compilers.prepare(target, recommended_flags=resolved.runtime.flags == "recommended")
    fits = _fit(resolved, target) if fit else _measure(resolved, target, stages or tuple(STAGES), json, hours)
    if not fits:
        raise typer.Exit(DOES_NOT_FIT)


def _measure(config: "Config", target: "Target", stages: tuple[str, ...], json: Path | None, fetch: bool) -> bool:
    """Prints the tables; whether every program fits."""
    from mpo_jax.runtime.files import write_json
    from mpo_jax.tools.plan import host, hours, measure, report

    def begin(program: "Program") -> None:
        console.print(f"  compiling {program.name}: ", end="")

    def end(one: "Measured") -> None:
        peak, usable = measure.gib(one.peak), measure.gib(one.capacity)
        console.print(f"{peak:.3g} of {usable:.3g} GiB, {one.compile_s:.0f} s")

    planned = measure.prepare(config, target)
    measured = planned.measure(planned.programs(stages), begin=begin, end=end)
    console.print(report.memory_table(measured, planned))
    console.print(report.work_table(measured, planned))
    hosts, times, basis = host.host_memory(measured, planned), [], ""
    console.print(report.host_table(hosts, planned))
    if target.kind is not None:
        amounts, basis = hours.read_amounts(planned.config, fetch=fetch)
        if amounts is not None and (times := hours.stage_times(measured, planned, amounts)):
            console.print(report.hours_table(times, planned))
        basis = f"hours: {basis}"
    lines = (*report.notes(planned), basis, report.DEFINITIONS, *report.unfit(measured, planned))
    for line in (*filter(None, lines), *host.short(hosts)):
        console.print(line, soft_wrap=True, markup=False)
    if json is not None:
        write_json(json, report.to_json(measured, planned, hosts, times, basis))
        console.print(f"wrote {json}", soft_wrap=True)
    return all(one.fits for one in measured)


def _fit(config: "Config", target: "Target") -> bool:
    """Prints the settings that fit, the fastest first; whether any do."""
    from mpo_jax.tools.plan import fit

    choices = fit.search(config, target, note=lambda line: console.print(f"  {line}"))
    for choice in choices:
        if choice.fits:
            estimate = f"one update of each stage is estimated at {choice.seconds:.3g} s: " if choice.seconds else ""
            console.print(f"{estimate}{' '.join(choice.overrides)}", soft_wrap=True)
    if choices[0].fits:
        return True
    missing = next(stage for stage in fit.STAGES if stage not in choices[0].accumulation)
    console.print(
        f"nothing fits: {missing} needs more than {target.name} has even with the smallest micro-batches. "
        "More devices, mesh.tensor, or fewer tokens (text.max_prompt_tokens, text.max_response_tokens)",
        soft_wrap=True,
    )
    return False
