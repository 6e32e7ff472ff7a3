"""A stage as a value: its settings, its parents, the function that runs it, and the programs that it compiles."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from mpo_jax.config.schema import Section
from mpo_jax.models.flops import Work
from mpo_jax.stages.context import Context
from mpo_jax.stages.shapes import Shapes
from mpo_jax.types import Artifact


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the method.

    Attributes:
      name: sft, reward, select, dpo, ppo or evaluate.
      Settings: frozen model of exactly what the result depends on, besides parents and inputs. `run` receives it and
        the artifact's name hashes it, so a stage cannot read a key that is missing from its name.
      parents: roles of the artifacts that the stage may read.
      inputs: names of the non-artifact inputs that the stage may read: data, base (the base model), reward_model (a
        finished one), reward_function. Reading another raises an error.
      run: function (settings, parents by role, context) -> summary for the manifest; it writes into `context.folder`.
      programs: function (settings, shapes) -> every program with a model that `run` compiles, except those
        that make parameters. Memory plans compile them, benchmarks time them, and a table adds up their work.
      check: function (settings, mesh) that raises UserError if a batch does not divide over the mesh; all stages are
        checked before the first one runs.
      trains: whether the stage has checkpoints and a `train` section.
    """

    name: str
    Settings: type[Section]
    parents: tuple[str, ...]
    inputs: frozenset[str]
    run: Callable[[Any, Mapping[str, Artifact], Context], dict[str, Any]]
    programs: "Callable[[Any, Shapes], Iterator[Program]]"
    check: Callable[[Any, Mesh], None]
    trains: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a stage.

    Attributes:
      stage: name of the stage.
      name: name of the program, unique within its stage.
      batch_key: configuration key that sets its number of rows.
      function: jitted function that the stage calls.
      arguments: function from the already compiled programs, by name, to shapes with shardings.
      work: analytic work of one call at its full width, over all devices.
      own_widths: whether its rows are not those of the stage's batches.
      packed: whether it reads packed rows, and so has one shape whatever the widths of a batch.
      expected: mean work of a call with the data's lengths, if they are known; else None.
      runs: number of calls in the stage; None if the amounts of data are unknown.
      accumulation: number of micro-batches of an update; None for a program that does not train.
      held: arrays that the stage keeps in memory besides the arguments.
      keeps: names of already compiled programs whose results stay in memory.
      loop_trips: iterations of loops whose count the compiler cannot know, from the outermost on.
    """

    stage: str
    name: str
    batch_key: str
    function: Any
    arguments: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    work: Work
    runs: float | None = None
    accumulation: int | None = None
    held: tuple[Any, ...] = ()
    keeps: tuple[str, ...] = ()
    loop_trips: int | tuple[int, ...] = 1
    expected: Work | None = None
    own_widths: bool = False
    packed: bool = False

    @property
    def in_loop(self) -> bool:
        """Whether it runs at the widths of the training batches; others have widths of their own."""
        return (self.accumulation is not None or self.stage == "ppo") and not self.own_widths

    @property
    def mean_work(self) -> Work:
        """What a call is expected to do: `expected`, or `work` at full width if lengths are unknown."""
        return self.work if self.expected is None else self.expected
