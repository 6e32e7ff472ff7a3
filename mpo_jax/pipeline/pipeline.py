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

from mpo_jax.config.load import to_yaml
from mpo_jax.config.schema import EVAL, Config
from mpo_jax.data import corpus, pair_table
from mpo_jax.errors import UserError
from mpo_jax.pipeline.artifacts import Builder
from mpo_jax.pipeline.experiments import EXPERIMENTS, Step, Variant
from mpo_jax.runtime import machine
from mpo_jax.runtime.files import write_json
from mpo_jax.runtime.processes import is_main
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.stages import dpo, evaluate, ppo, reward, select, sft
from mpo_jax.types import Artifact

BOOKKEEPING = (
    "log_every", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_rows", "best_metric", "best_mode",
    "stop_after_skipped",
)  # fmt: skip
"""Keys of a train section that change no result: how often to log, what to save, when to give up."""

CHOICE = ("best_metric", "best_mode")
"""Those that do where a best state is exported, with those that say which states are compared, and by what."""

StageName = Literal["sft", "reward", "select", "dpo", "ppo", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished experiment, under its run's name: its artifacts by role, in the order they were made."""

    name: str
    artifacts: dict[str, Artifact]


class Pipeline:
    """Asks a store for the stages of one configuration, which makes them, has them, or only lists them."""

    def __init__(self, config: Config, store: Builder):
        self.config = config
        self.store = store
        self._data = {"fingerprint": corpus.fingerprint(config.data)}

    @cached_property
    def mesh(self) -> Mesh:
        """Made on first use: a run that only reuses artifacts needs none."""
        return make_mesh(self.config.mesh)

    def sft(self) -> Artifact:
        return self._build("sft", sft.run, {}, {"text", "sft"}, self._base())

    def reward(self, sft: Artifact) -> Artifact:
        path = self.config.reward.path
        finished = {"reward_model": corpus.fingerprint_model(path)} if path else {}
        return self._build("reward", reward.run, {"sft": sft}, {"text", "reward"}, {**self._base(), **finished})

    def select(self, sft: Artifact, reward: Artifact) -> Artifact:
        settings = self.config.select.model_dump(mode="json", exclude={"threshold", "easy_fraction"})
        return self._build(
            "select", select.run, {"sft": sft, "reward": reward}, {"text"}, {"select": settings, **self._data}
        )

    def selected(self, steps: tuple[Step, ...], sft: Artifact, reward: Artifact) -> Artifact:
        """The selection, from which every one of the steps has something to learn.

        Raises:
          NothingSelected: before any of the steps is trained, if a step's subset is empty.
        """
        artifact = self.select(sft, reward)
        if self.store.makes:
            pair_table.check_subsets(artifact.path, (step.subset for step in steps), self.config.select)
        return artifact

    def step(self, step: Step, init: Artifact, sft: Artifact, reward: Artifact) -> Artifact:
        """One DPO or PPO step from the policy `init`."""
        parents = {"init": init, "reference": sft if step.reference == "sft" else init}
        if step.needs_selection:
            parents["pairs"] = self.select(sft, reward)
        extra: dict[str, Any] = {"subset": step.subset, **self._data}
        if step.subset != "all":
            extra |= self.config.select.model_dump(mode="json", include={"threshold", "easy_fraction"})
        if not step.needs_selection:
            # what sampling is limited to is the data of every experiment
            extra["num_prompts"] = self.config.select.num_prompts
        if step.algorithm == "ppo":
            parents["reward"] = reward
        run = partial(dpo.run if step.algorithm == "dpo" else ppo.run, subset=step.subset)
        return self._build(step.algorithm, run, parents, {"text", step.algorithm}, extra)

    def evaluate(self, policy: Artifact, sft: Artifact, reward: Artifact) -> Artifact:
        parents = {"policy": policy, "sft": sft, "reward": reward}
        settings = self.config.evaluate.model_dump(mode="json", exclude={"num_samples_shown", "bootstrap_resamples"})
        return self._build("evaluate", evaluate.run, parents, {"text"}, {"evaluate": settings, **self._data})

    def experiment(self, name: str, *, until: StageName = "evaluate") -> Run:
        """Everything that a run of `runs/<name>` needs, up to the last stage of the kind `until`.

        Args:
          name: of an experiment, or of one at a split of its own (`mpo_t2`).

        Raises:
          UserError: before anything is trained, if there is nothing to evaluate on.
        """
        if until == "evaluate" and not self.config.data.has_test_prompts:
            raise UserError(
                "there are no held-out prompts to evaluate on: name preference rows as data.test_path or prompts as "
                "data.test_prompt_path, raise data.validation_fraction above 0, or run "
                "single stages (mpo sft, reward, select, dpo, ppo)"
            )
        variant = Variant.of(name)
        made: dict[str, Artifact] = {"sft": self.sft()}
        if until != "sft":
            made["reward"] = self.reward(made["sft"])
        if until == "select":
            made["select"] = self.select(made["sft"], made["reward"])
        if until in ("sft", "reward", "select"):
            return Run(name, made)
        split = self._split_at(variant)
        policy = made["sft"]
        steps = EXPERIMENTS[variant.experiment]
        if any(step.needs_selection for step in steps):
            made["select"] = split.selected(steps, made["sft"], made["reward"])
        for number, step in enumerate(steps):
            policy = made[f"{number + 1}-{step.algorithm}"] = split.step(step, policy, made["sft"], made["reward"])
            if until == step.algorithm and all(later.algorithm != until for later in steps[number + 1 :]):
                return Run(name, made)
        made["evaluate"] = self.evaluate(policy, made["sft"], made["reward"])
        return Run(name, made)

    def _split_at(self, variant: Variant) -> "Pipeline":
        """The same pipeline where the pairs are split as the variant says."""
        split = copy.copy(self)
        split.config = self.config.model_copy(update={"select": variant.select(self.config.select)})
        return split

    def _base(self) -> dict[str, Any]:
        """What SFT and reward depend on besides their own sections."""
        model = self.config.model
        base: dict[str, Any] = {"path": corpus.fingerprint_model(model.path)} if model.path else {}
        return {"base": base or model.architecture.model_dump(mode="json"), **self._data}

    def _build(
        self,
        stage: StageName,
        run: Any,
        parents: Mapping[str, Artifact],
        sections: set[str],
        extra: Mapping[str, Any],
    ) -> Artifact:
        settings = {
            **_without_bookkeeping(self.config.model_dump(mode="json", include={*sections, "seed"})),
            **extra,
            # arithmetic changes results; the mesh and the machine do so to rounding only
            "model": {"attention": machine.attention(self.config.model)},
            "dtype": [machine.compute_dtype(self.config.model), machine.frozen_dtype(self.config.model)],
        }

        def in_mesh(folder: Path) -> Mapping[str, Any]:
            mesh = self.mesh
            with jax.set_mesh(mesh):
                return run(self.config, mesh, folder, **parents)

        return self.store.build(stage, settings, parents, in_mesh)

    def record(self, run: Run) -> None:
        """`runs/<name>/`: the resolved configuration, the environment, and links to the artifacts."""
        if not is_main():
            return
        folder = Path(self.config.workdir) / "runs" / run.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(self._split_at(Variant.of(run.name)).config), encoding="utf-8")
        write_json(folder / "env.json", {**machine.environment(), "data": self._data})
        for link in folder.iterdir():
            if link.is_symlink():
                link.unlink()
        for role, artifact in run.artifacts.items():
            (folder / role).symlink_to(os.path.relpath(artifact.path, folder), target_is_directory=True)


def _without_bookkeeping(settings: Any) -> Any:
    """The settings without what changes no result."""
    if not isinstance(settings, dict):
        return settings
    dropped = set(BOOKKEEPING)
    if metric := settings.get("best_metric"):
        # a metric of training is an average since the line logged before
        compared = ("eval_every", "eval_rows") if metric.startswith(EVAL) else ("checkpoint_every", "log_every")
        dropped -= {*CHOICE, *compared}
    return {key: _without_bookkeeping(value) for key, value in settings.items() if key not in dropped}
