"""The programs that a stage is about to compile: how many, and for large models all at once in threads."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from mpo_jax.data.batches import Widths
from mpo_jax.data.packing import Packing
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.runtime.compilation import Compilations
from mpo_jax.runtime.console import console
from mpo_jax.runtime.words import counted
from mpo_jax.stages.shapes import Shapes

if TYPE_CHECKING:
    from mpo_jax.stages.stage import Program

LARGE = 3e8
"""Parameters from which programs take so long to compile that threads pay: smaller ones are compiled when called."""
THREADS = 4


@dataclasses.dataclass(frozen=True)
class Upcoming:
    """What a stage will compile.

    Attributes:
      programs: function from the stage's shapes to its programs.
      shapes: function from a model to the stage's shapes.
      compilations: what is told of them.
      threads: programs compiled at the same time before the first step; None: by the model's size.
    """

    programs: "Callable[[Shapes], Iterator[Program]]"
    shapes: Callable[[Model], Shapes]
    compilations: Compilations
    threads: int | None = None

    def announce(self, model: Model, num_widths: int) -> None:
        """Says how many programs will be compiled, of batches with at most `num_widths` widths if they are padded."""
        self._say(list(self.programs(self.shapes(model))), num_widths)

    def begin(
        self,
        model: Model,
        widths: Sequence[Widths],
        *,
        responses: bool,
        eos_id: int | tuple[int, ...] | None = None,
        packing: Packing | None = None,
    ) -> None:
        """Says what training on these widths will compile, and compiles a large model's programs.

        Args:
          responses: whether the widths' responses are those of the batches; False for prompts to sample from.
          eos_id: id or ids that end a sample, if the stage samples.
          packing: the shape of packed rows, if there are any.
        """
        shapes = dataclasses.replace(self.shapes(model), eos_id=eos_id, packing=packing)
        each = [
            [
                program
                for program in self.programs(
                    dataclasses.replace(shapes, prompt=w.prompt, response=w.response if responses else None)
                )
                if program.in_loop and (not program.packed or w is widths[-1])
            ]
            for w in widths
        ]
        self._say(list(self.programs(shapes)), len(widths))
        threads = self.threads or (THREADS if forward.num_parameters(model.decoder) >= LARGE else 1)
        if threads > 1:
            console.print(f"  compiling {sum(map(len, each))} of them in {threads} threads before the first step")
            compile_all([programs for programs in each if programs], shapes.mesh, threads)

    def _say(self, programs: "Sequence[Program]", num_widths: int) -> None:
        names: dict[str, list[str]] = defaultdict(list)
        for program in programs:
            names[function_name(program)].append(program.name)
        padded = sum(not program.packed for program in programs)
        self.compilations.expect(names, len(programs) + padded * (num_widths - 1))
        which = f", {padded} of them" if padded < len(programs) else ""
        at = f"{which} at up to {num_widths} widths" if num_widths > 1 and padded else ""
        console.print(f"  compiles {counted(len(programs), 'program')}{at}")


def function_name(program: "Program") -> str:
    return str(getattr(program.function, "__name__", ""))


class _Compiled(Mapping[str, Any]):
    """The programs of one width by name; reading one waits until it is compiled."""

    def __init__(self) -> None:
        self.futures: dict[str, Future[Any]] = {}

    def __getitem__(self, name: str) -> Any:
        return self.futures[name].result()

    def __contains__(self, name: object) -> bool:
        return name in self.futures

    def __iter__(self) -> Iterator[str]:
        return iter(self.futures)

    def __len__(self) -> int:
        return len(self.futures)


def compile_all(each: "Sequence[Sequence[Program]]", mesh: Mesh, threads: int) -> list[Any]:
    """Compiles the programs of every width, in threads; the later calls of their functions find them.

    The compiler releases Python's lock, so that it runs in several threads; tracing and lowering do not.
    """

    def compile_one(program: "Program", compiled: Mapping[str, Any]) -> Any:
        with jax.set_mesh(mesh):
            return program.function.lower(*program.arguments(compiled)).compile()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
    try:
        made = [_Compiled() for _ in each]
        # program by program: a program waits for earlier ones alone, which have begun by then
        for number in range(max(map(len, each), default=0)):
            for programs, compiled in zip(each, made, strict=True):
                if number < len(programs):
                    program = programs[number]
                    compiled.futures[program.name] = pool.submit(compile_one, program, compiled)
        return [one[name] for one in made for name in one]
    finally:
        # without waiting, so that an interrupt ends at once
        pool.shutdown(wait=False, cancel_futures=True)
