"""Compiles programs for a target and reads their memory and collectives from the compiler."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh

from mpo_jax.config.registry import Step
from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError
from mpo_jax.models.flops import Work
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.pipeline.stages import PLANNED, STAGES, stage_settings, stage_shapes, text_rewards
from mpo_jax.runtime import machine
from mpo_jax.runtime.device_kinds import known
from mpo_jax.runtime.sharding import device_bytes, mesh_of
from mpo_jax.stages.shapes import Amounts, Shapes, TextRewards
from mpo_jax.stages.stage import Program
from mpo_jax.tools.plan import compilers
from mpo_jax.tools.plan.collectives import Traffic, traffic
from mpo_jax.tools.plan.sizes import decoder_sizes
from mpo_jax.tools.plan.targets import GIB, Target

_USED = re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)i?B?\) exceeds")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory on one device, in bytes.

    Attributes:
      arguments: the program's arguments; donated ones are reused for its results.
      temporaries: scratch memory while the program runs.
      results: results that do not reuse donated arguments.
      code: the program itself, if it is stored in device memory.
      held: other arrays that the stage keeps on the device.
    """

    arguments: int
    temporaries: int
    results: int
    code: int
    held: int

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.results + self.code + self.held


@dataclasses.dataclass(frozen=True)
class Measured:
    """One program, compiled for a target.

    Attributes:
      memory: memory of the program; None if the compiler ran out of memory.
      refused: bytes per device that the program needs if the compiler ran out of memory; else None.
      seconds: estimate of one call at the assumed utilisations; None on the CPU.
    """

    program: Program
    memory: Memory | None
    refused: int | None
    capacity: float
    traffic: tuple[Traffic, ...]
    compile_s: float
    seconds: float | None

    @property
    def peak(self) -> int:
        """Bytes that each device needs."""
        if self.memory is not None:
            return self.memory.peak
        assert self.refused is not None
        return self.refused + device_bytes(self.program.held)

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.peak <= self.capacity


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration with its mesh over a target's devices, ready to compile."""

    config: Config
    target: Target
    mesh: Mesh
    decoder: DecoderConfig
    sizes_from: str

    def shapes(self, stage: str, amounts: Amounts | None = None) -> Shapes:
        """The shapes that a stage's programs are compiled with."""
        return stage_shapes(
            stage, self.config, self.decoder, self.mesh, amounts=amounts, text_rewards=self.text_rewards
        )

    def changed(self, changes: dict[str, Any]) -> "Plan":
        """The plan with some values of the configuration replaced, but not those of the mesh or the model's sizes.

        Raises:
          ValidationError: if the values do not go together.
        """
        return dataclasses.replace(self, config=Config.model_validate(_merged(self.config.model_dump(), changes)))

    @cached_property
    def text_rewards(self) -> TextRewards | None:
        """What scores responses as text; None also where a model is on the hub and not here."""
        return text_rewards(self.config, self.mesh, fetch=False)

    def programs(
        self, stages: Sequence[str] = tuple(STAGES), *, amounts: Amounts | None = None, step: Step = PLANNED
    ) -> Iterator[Program]:
        """The programs of the given stages; the settings of other stages are not read.

        Args:
          amounts: numbers and lengths of rows, for how often programs run; they change no shape.
          step: which pairs or prompts DPO and PPO learn from.
        """
        for name in (name for name in STAGES if name in stages):
            yield from STAGES[name].programs(stage_settings(name, self.config, step), self.shapes(name, amounts))

    def measure(
        self,
        programs: Iterable[Program] | None = None,
        *,
        begin: Callable[[Program], None] = lambda _: None,
        end: Callable[[Measured], None] = lambda _: None,
    ) -> list[Measured]:
        """Compiles the programs in order, all of them by default; `begin` and `end` are called for each."""
        compiled: dict[str, Any] = {}
        measured = []
        for program in self.programs() if programs is None else programs:
            begin(program)
            one = compile_one(program, self.mesh, self.target, compiled)
            end(one)
            measured.append(one)
        return measured


def _merged(values: Any, changes: Any) -> Any:
    if not isinstance(changes, dict):
        return changes
    return {**values, **{key: _merged(values[key], change) for key, change in changes.items()}}


def prepare(config: Config, target: Target) -> Plan:
    """The plan of a configuration; call `compilers.prepare` first.

    Raises:
      UserError: if the mesh does not match the target, a batch does not divide over it, or the model's sizes are
        unknown.
    """
    if config.mesh.num_devices != target.num_devices:
        mesh = config.mesh
        raise UserError(
            f"mesh.data={mesh.data} x mesh.fsdp={mesh.fsdp} x mesh.tensor={mesh.tensor} is {mesh.num_devices} devices, "
            f"but {target.name} has {target.num_devices}: add {_suggest_mesh(target)}"
        )
    if target.kind is not None:
        # `auto` would resolve for this machine's CPU, not for the target
        resolved: dict[str, str] = {"attention": machine.attention(config.model, target.platform)}
        if config.model.compute_dtype == "auto":
            resolved["compute_dtype"] = "bfloat16"
        config = config.model_copy(update={"model": config.model.model_copy(update=resolved)})
    decoder, source = decoder_sizes(config)
    mesh = mesh_of(config.mesh, compilers.devices(target))
    return Plan(config, target, mesh, decoder, source)


def _suggest_mesh(target: Target) -> str:
    if target.spans_network:
        return f"mesh.data={target.groups} mesh.fsdp={target.num_devices // target.groups}"
    return f"mesh.fsdp={target.num_devices}"


def compile_one(program: Program, mesh: Mesh, target: Target, compiled: dict[str, Any]) -> Measured:
    """Compiles one program and adds it to `compiled` under its name."""
    arguments = program.arguments(compiled)
    kept = sum(compiled[name].memory_analysis().output_size_in_bytes for name in program.keeps if name in compiled)
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*arguments)
        begin = time.perf_counter()
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            used = used_bytes(str(error), device_bytes(arguments))
            if used is None:
                raise
            elapsed = time.perf_counter() - begin
            return Measured(program, None, used + kept, target.capacity, (), elapsed, None)
        elapsed = time.perf_counter() - begin
    compiled[program.name] = executable
    group = target.num_devices // target.groups if target.spans_network else None
    found = tuple(traffic(executable.as_text(), loop_trips=program.loop_trips, group=group))
    return Measured(
        program=program,
        memory=_memory(executable.memory_analysis(), device_bytes(program.held) + kept),
        refused=None,
        capacity=target.capacity,
        traffic=found,
        compile_s=elapsed,
        seconds=seconds(program.work, found, target),
    )


def _memory(stats: Any, held: int) -> Memory:
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        results=max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0),
        code=stats.generated_code_size_in_bytes,
        held=held,
    )


def used_bytes(message: str, arguments: int) -> int | None:
    """The memory that a program needs, from a compiler's out-of-memory error; None for other errors.

    Args:
      arguments: bytes of the program's arguments, since one of the errors counts temporaries alone.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, besides in ((_USED, 0), (_TEMPORARIES, arguments)):
        if found := pattern.search(message):
            return int(float(found[1]) * _UNITS[found[2]]) + besides
    return None


def seconds(work: Work, found: Sequence[Traffic], target: Target) -> float | None:
    """The longest of arithmetic, reading (in a decode loop) and communication, as if the three overlapped."""
    parts = time_parts(work, found, target)
    return None if parts is None else max(parts.values())


def time_parts(work: Work, found: Sequence[Traffic], target: Target) -> Mapping[str, float] | None:
    """Seconds of each part alone, at the utilisations in device_kinds.yaml; None on the CPU.

    Collectives within a group use its links, those over several groups the network.
    """
    if target.kind is None:
        return None
    kind, (_, share) = target.kind, known()
    moved = 0.0
    for one in found:
        linked = (one.total_bytes - one.network_bytes) / kind.link_gbs
        # an all-reduce is a reduce-scatter and an all-gather
        twice = 2 if one.kind == "all-reduce" else 1
        moved += twice * (linked + one.network_bytes / kind.network_gbs) / (1e9 * share.link)
    return {
        "arithmetic": (work.flops + work.recomputed) / (target.num_devices * kind.bf16_tflops * 1e12 * share.matmul),
        "reading": work.decode_reads / (target.num_devices * kind.hbm_gbs * 1e9 * share.bandwidth),
        "communication": moved,
    }


def gib(size: float) -> float:
    return size / GIB
