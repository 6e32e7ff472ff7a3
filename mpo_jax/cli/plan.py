"""`mpo plan`: does a configuration fit devices that are not here? Compiled, not guessed."""

from pathlib import Path

from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError
from mpo_jax.pipeline.stages import STAGES
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_json
from mpo_jax.stages.stage import Program
from mpo_jax.tools.plan import compilers, fit, measure, report, targets


def plan(config: Config, on: str, *, stages: tuple[str, ...], json_file: Path | None, search: bool) -> bool:
    """Prints the tables; True where everything fits.

    Args:
      stages: which stages' programs; all of them if empty.

    Raises:
      UserError: for a stage, target or mesh that is none, or a compiler that is not installed.
    """
    if unknown := set(stages) - set(STAGES):
        raise UserError(f"--stage {', '.join(sorted(unknown))}: no such stage; there are {', '.join(STAGES)}")
    target = targets.parse(on, cpu_devices=config.mesh.num_devices)
    compilers.prepare(target, recommended_flags=config.runtime.flags == "recommended")
    if search:
        return _fit(config, target)
    planned = measure.prepare(config, target)

    def begin(program: Program) -> None:
        console.print(f"  compiling {program.name}: ", end="")

    def end(one: measure.Measured) -> None:
        peak, usable = measure.gib(one.peak), measure.gib(one.capacity)
        console.print(f"{peak:.3g} of {usable:.3g} GiB, {one.compile_s:.0f} s")

    measured = planned.measure(planned.programs(stages or tuple(STAGES)), begin=begin, end=end)
    console.print(report.memory_table(measured, planned))
    console.print(report.work_table(measured, planned))
    for line in (*report.notes(planned), report.DEFINITIONS, *report.unfit(planned.config, measured)):
        console.print(line, soft_wrap=True, markup=False)
    if json_file is not None:
        write_json(json_file, report.to_json(measured, planned))
        console.print(f"wrote {json_file}", soft_wrap=True)
    return all(one.fits for one in measured)


def _fit(config: Config, target: targets.Target) -> bool:
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
