"""What a stage is: a value with settings, parents, a function that runs it, and the programs that it compiles."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
      Settings: a frozen model of exactly what the result depends on, besides parents and inputs. `run` receives it and
        the artifact's name hashes it, so a stage cannot read a key that its name does not hold.
      parents: roles of the artifacts that it may read.
      inputs: what it reads by content: data, base (the base model), reward_model (a finished one). The context refuses
        all others.
      run: (settings, parents by role, context) -> summary for the manifest; writes into `context.folder`.
      programs: (settings, shapes) -> every program with a model in it that `run` compiles, but for the making of
        parameters. Memory plans compile them, benchmarks time them, a table's estimate adds up their work.
      trains: whether it has checkpoints and a section `train`.
    """

    name: str
    Settings: type[Section]
    parents: tuple[str, ...]
    inputs: frozenset[str]
    run: Callable[[Any, Mapping[str, Artifact], Context], dict[str, Any]]
    programs: "Callable[[Any, Shapes], Iterator[Program]]"
    trains: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a stage.

    Attributes:
      stage: whose it is.
      name: unique within a stage.
      batch_key: the configuration key that decides its rows.
      function: jitted, as the stage calls it.
      arguments: from the programs compiled before, by name, to shapes with shardings.
      work: of one call, analytic, over all devices.
      runs: how often the stage calls it; None where the amounts of data are not known.
      accumulation: micro-batches of an update; None for a program that trains nothing.
      held: what the stage keeps in memory besides the arguments.
      keeps: names of programs compiled before whose results it keeps too.
      loop_trips: turns of a loop whose number the compiler cannot know.
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
    loop_trips: int = 1
