"""Plans `mpo table` without running a stage: the order, the stages that already exist, and the time for the rest."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from mpo_jax.config.schema import Config
from mpo_jax.pipeline import shared
from mpo_jax.pipeline.basis import Basis
from mpo_jax.pipeline.bucket import Bucket, stage_place
from mpo_jax.pipeline.experiments import table_variants
from mpo_jax.pipeline.pipeline import Pipeline
from mpo_jax.pipeline.recipe import MANIFEST, artifact_name, read_made
from mpo_jax.pipeline.stages import STAGES, stage_shapes, text_rewards
from mpo_jax.runtime import machine
from mpo_jax.runtime.progress import Expected
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.runtime.timing import time_matmul
from mpo_jax.types import REMOVED, Artifact

SHARE_OF_PEAK = 0.3
"""Fraction of a large matrix product's speed that a stage reaches; off by a factor of two to three for most sizes."""
FIXED_SECONDS = 4.0
"""Time to read, compile and write a stage of any size."""
DECODING_COST = 4.0
"""Slowdown of an operation when tokens are sampled one at a time."""


@dataclasses.dataclass
class TableStage:
    """One stage of the table.

    Attributes:
      seed: first seed that uses the stage; others share it at most by sft.seed and reward.seed.
      name: folder name of the stage.
      recipe: recipe of the stage.
      role: run and role in which the stage first appears; the same stage of another seed has the same role.
      runs: all runs of that seed that use the stage.
      seeds: all seeds that use it.
      seconds: time it took to make; None if it does not exist yet.
    """

    seed: int
    name: str
    recipe: Mapping[str, Any]
    role: tuple[str, str]
    runs: list[str]
    seconds: float | None
    seeds: list[int] = dataclasses.field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.recipe["stage"]

    @property
    def is_there(self) -> bool:
        return self.seconds is not None


class Listing:
    """A store that makes nothing: it opens existing stages and names the missing ones."""

    makes = False

    def __init__(self, workdir: Path, bucket: Bucket | None = None):
        self.folder, self._bucket = workdir / "stages", bucket

    def build(self, recipe: Mapping[str, Any], run: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        path = shared.place_of(self.folder / artifact_name(recipe))
        if (self._bucket is None or (path / MANIFEST).is_file()) and (found := read_made(path, recipe)) is not None:
            return Artifact(path, found)
        there = None if self._bucket is None else self._bucket.read(f"{stage_place(path)}/manifest.json")
        return Artifact(path, there or dict(recipe))


def seed_config(config: Config, seed: int) -> Config:
    """The configuration of one seed of a table, in `<workdir>/seed-N`; every seed has its own toy world."""
    toy = config.data.toy.model_copy(update={"seed": config.data.toy.seed + seed})
    data = config.data.model_copy(update={"toy": toy})
    workdir, machine = str(Path(config.workdir) / f"seed-{seed}"), config.runtime
    if machine.bucket is not None:
        machine = machine.model_copy(update={"bucket": f"{machine.bucket.rstrip('/')}/seed-{seed}"})
    return config.model_copy(update={"seed": seed, "workdir": workdir, "data": data, "runtime": machine})


def table_stages(config: Config) -> list[TableStage]:
    """Every stage of the table once, in the order they are made: seed by seed, run by run."""
    found: dict[str, TableStage] = {}
    for seed in config.table.seeds:
        own = seed_config(config, seed)
        pipeline = Pipeline(own, Listing(Path(own.workdir), Bucket.of(own)))
        for variant in table_variants(config.table, config.select):
            for role, artifact in pipeline.experiment(variant.name).artifacts.items():
                recipe, first = artifact.manifest, (variant.name, role)
                one = found.setdefault(
                    artifact.id, TableStage(seed, artifact.id, recipe, first, [], recipe.get("seconds"))
                )
                if seed not in one.seeds:
                    one.seeds.append(seed)
                if one.seed == seed:
                    one.runs.append(variant.name)
    for stage in reversed(found.values()):
        for parent in () if stage.is_there else stage.recipe["parents"].values():
            if REMOVED in found[parent].recipe:
                found[parent].seconds = None  # made again for its model
    return [*found.values()]


def estimates(config: Config, stages: list[TableStage], basis: Basis | None = None) -> list[Expected]:
    """Expected time of each missing stage: that of the same stage of another seed, else an estimate from its FLOPs.

    Args:
      basis: that of the configuration, if the caller has one.
    """
    measured = {stage.role: stage.seconds for stage in stages if stage.seconds is not None}
    missing = [stage for stage in stages if not stage.is_there]
    cost = None if all(stage.role in measured for stage in missing) else Cost(basis or Basis(config))
    guesses: dict[str, float] = {}
    expected = []
    for stage in missing:
        seconds, known = measured.get(stage.role), stage.role in measured
        if cost is not None and not known:
            # neither seed nor weights change the work, and describing a stage's programs takes a fraction of a second
            same = {**stage.recipe, "settings": {**stage.recipe["settings"], "seed": 0}, "inputs": None}
            key = json.dumps({**same, "parents": sorted(stage.recipe["parents"])}, sort_keys=True)
            seconds = guesses[key] if key in guesses else guesses.setdefault(key, cost.seconds(stage))
        expected.append(Expected(stage.name, stage.kind, seconds, known))
    return expected


@dataclasses.dataclass
class Cost:
    """Rough seconds of stages never timed, from their programs' work and a matrix product timed on this machine."""

    basis: Basis

    @cached_property
    def _flops_per_s(self) -> float:
        return (
            SHARE_OF_PEAK
            * self.basis.config.mesh.num_devices
            * time_matmul(machine.compute_dtype(self.basis.config.model)).rate
        )

    def seconds(self, planned: TableStage) -> float:
        """The estimate in seconds; expect it to be off by up to a factor of three."""
        basis, recipe, mesh = self.basis, planned.recipe, make_mesh(self.basis.config.mesh)
        stage = STAGES[recipe["stage"]]
        settings = stage.Settings.model_validate(recipe["settings"])
        shapes = stage_shapes(
            stage.name, basis.config, basis.decoder, mesh, amounts=basis.amounts, parents=recipe["parents"],
            text_rewards=text_rewards(basis.config, mesh, fetch=False),
        )  # fmt: skip
        total = 0.0
        with jax.set_mesh(mesh):
            for program in stage.programs(settings, shapes):
                assert program.runs is not None
                # sampling one token at a time takes several times as long as the same products in one call
                slower = DECODING_COST if program.work.decode_reads else 1.0
                total += slower * program.runs * program.mean_work.flops
        return FIXED_SECONDS + total / self._flops_per_s
