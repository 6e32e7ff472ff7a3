"""The method, top to bottom: SFT, reward model, selection, the experiment's steps, evaluation."""

import copy
import dataclasses
import os
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from mpo_jax.config.base import recipe_values
from mpo_jax.config.load import to_yaml
from mpo_jax.config.registry import Step
from mpo_jax.config.schema import Config
from mpo_jax.data import pair_table
from mpo_jax.errors import CheckpointsLost, UserError
from mpo_jax.pipeline.artifacts import Builder
from mpo_jax.pipeline.experiments import Variant, needs_reward, steps_until
from mpo_jax.pipeline.recipe import artifact_name, make_recipe
from mpo_jax.pipeline.run_folder import ENVIRONMENT, MADE
from mpo_jax.pipeline.stages import STAGES, stage_context, stage_settings, upcoming_programs
from mpo_jax.pipeline.unfinished import saved
from mpo_jax.runtime import compilation, machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_json
from mpo_jax.runtime.interrupts import STOPS
from mpo_jax.runtime.processes import is_main
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.stages import evaluate
from mpo_jax.stages.context import Inputs
from mpo_jax.types import Artifact

StageName = Literal["sft", "reward", "select", "dpo", "ppo", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its name, and its artifacts by role in the order they were made."""

    name: str
    artifacts: dict[str, Artifact]


class Pipeline:
    """Requests the stages of one configuration from a store, which makes them, reuses them, or only lists them."""

    def __init__(self, config: Config, store: Builder):
        self.config = config
        self.store = store
        self.inputs = Inputs(config)
        # fail on invalid stage settings or a missing source before anything is made
        for name in STAGES:
            stage_settings(name, config)
        # whether the run that is being made ends with an evaluation
        self._evaluates = False
        self._data = {"fingerprint": self.inputs.only({"data"}).fingerprints["data"]}

    @cached_property
    def mesh(self) -> Mesh:
        """Created on first use: a run that only reuses artifacts needs no mesh."""
        return make_mesh(self.config.mesh)

    def sft(self) -> Artifact:
        return self._build("sft", {})

    def reward(self, sft: Artifact) -> Artifact:
        return self._build("reward", {"sft": sft})

    def select(self, sft: Artifact, reward: Artifact | None) -> Artifact:
        """The scored pairs; `reward` may be None if the rows bring their scores."""
        parents = {"sft": sft}
        if self.config.select.scores_pairs:
            assert reward is not None
            parents["reward"] = reward
        return self._build("select", parents)

    def selected(self, steps: tuple[Step, ...], sft: Artifact, reward: Artifact | None) -> Artifact:
        """The selection, checked to be non-empty for every step.

        Raises:
          NothingSelected: if a step's subset is empty, before any step is trained.
        """
        artifact = self.select(sft, reward)
        if self.store.makes:
            pair_table.check_subsets(artifact.path, (step.subset for step in steps), self.config.select)
        return artifact

    def step(self, step: Step, init: Artifact, sft: Artifact, reward: Artifact | None) -> Artifact:
        """Runs one DPO or PPO step from the policy `init`."""
        parents = {"init": init, "reference": sft if step.reference == "sft" else init}
        if step.needs_selection:
            parents["pairs"] = self.select(sft, reward)
        if step.algorithm == "ppo":
            assert reward is not None
            parents["reward"] = reward
        return self._build(step.algorithm, parents, step)

    def evaluate(self, policy: Artifact, sft: Artifact, reward: Artifact) -> Artifact:
        return self._build("evaluate", {"policy": policy, "sft": sft, "reward": reward})

    def experiment(self, name: str, *, until: StageName = "evaluate") -> Run:
        """Makes everything the run `runs/<name>` needs, up to the last stage of kind `until`, and nothing else.

        Args:
          name: name of an experiment, optionally with its own split (`mpo_t2`).

        Raises:
          UserError: if there are no held-out prompts to evaluate on, before anything is trained: none are named, or
            the first stage that is made finds none among the rows.
        """
        if until == "evaluate" and not self.config.data.has_test_prompts:
            raise UserError(
                "there are no held-out prompts to evaluate on: name preference rows as data.test_path or prompts as "
                "data.test_prompt_path, raise data.validation_fraction above 0, or run "
                "single stages (mpo sft, reward, select, dpo, ppo)"
            )
        self._evaluates = until == "evaluate"
        variant = Variant.of(name)
        made: dict[str, Artifact] = {"sft": self.sft()}
        sft, reward = made["sft"], None
        if needs_reward(variant.experiment, until, self.config.select):
            reward = made["reward"] = self.reward(sft)
        if until == "select":
            made["select"] = self.select(sft, reward)
        split, policy = self._split_at(variant), sft
        steps = steps_until(variant.experiment, until)
        if any(step.needs_selection for step in steps):
            made["select"] = split.selected(steps, sft, reward)
        for number, step in enumerate(steps, 1):
            policy = made[f"{number}-{step.algorithm}"] = split.step(step, policy, sft, reward)
        if until == "evaluate":
            assert reward is not None
            made["evaluate"] = self.evaluate(policy, sft, reward)
        return Run(name, made)

    def _split_at(self, variant: Variant) -> "Pipeline":
        """The same pipeline with the variant's split of the pairs."""
        split = copy.copy(self)
        split.config = self.config.model_copy(update={"select": variant.select(self.config.select)})
        return split

    def _build(self, name: StageName, parents: Mapping[str, Artifact], *step: Step) -> Artifact:
        stage = STAGES[name]
        assert parents.keys() <= set(stage.parents), f"{name} declares no parent {parents.keys() - set(stage.parents)}"
        settings = stage_settings(name, self.config, *step)
        fingerprints = self.inputs.only(stage.inputs).fingerprints
        recipe = make_recipe(name, recipe_values(settings), fingerprints, parents)

        def run(folder: Path) -> Mapping[str, Any]:
            if self._evaluates and "data" in stage.inputs:
                # rows that hold out no prompt: better said now than after hours of training. The stage reads them again
                # from memory
                evaluate.check_prompts(self.inputs.corpus.test_prompts)
            mesh = self.mesh
            with jax.set_mesh(mesh), compilation.watched() as compilations:
                upcoming = upcoming_programs(name, self.config, mesh, settings, recipe["parents"], compilations)
                context = stage_context(self.config, stage, mesh, folder, self.inputs, recipe, upcoming, parents)
                left = partial(saved, folder, context.checkpointing.folder, parents, trains=stage.trains)
                with STOPS.leaving(f"{artifact_name(recipe)} of {self.config.workdir}", left):
                    try:
                        return stage.run(settings, parents, context)
                    except CheckpointsLost:
                        # the initial state has left memory for the checkpoint's
                        return stage.run(settings, parents, context)

        return self.store.build(recipe, run)

    def record(self, run: Run) -> None:
        """Writes `runs/<name>/`: the resolved configuration, the environment, and links to the artifacts.

        A run that was made up to some stage leaves the folder of a longer run with the same artifacts as it is.
        """
        if not is_main():
            return
        folder = Path(self.config.workdir) / "runs" / run.name
        folder.mkdir(parents=True, exist_ok=True)
        there = {link.name: link.resolve() for link in folder.iterdir() if link.is_symlink()}
        if "evaluate" not in run.artifacts:
            if all(there.get(role) == artifact.path.resolve() for role, artifact in run.artifacts.items()):
                return
            if "evaluate" in there:
                console.print(f"{folder} had a finished run, of other settings: mpo run makes what this one lacks")
        (folder / "config.yaml").write_text(to_yaml(self._split_at(Variant.of(run.name)).config), encoding="utf-8")
        write_json(folder / ENVIRONMENT, {**machine.environment(), "data": self._data, MADE: [*run.artifacts]})
        for role in there:
            (folder / role).unlink()
        for role, artifact in run.artifacts.items():
            (folder / role).symlink_to(os.path.relpath(artifact.path, folder), target_is_directory=True)
