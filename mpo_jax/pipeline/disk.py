"""Disk space that the runs of a table will take in the workdir, from sizes alone: models, training state, rows."""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.pipeline import shared
from mpo_jax.pipeline.basis import Basis
from mpo_jax.pipeline.bucket import Bucket
from mpo_jax.pipeline.keeping import FOLDERS, Plan
from mpo_jax.pipeline.stages import STAGES, scores_text
from mpo_jax.pipeline.table import TableStage
from mpo_jax.runtime import machine
from mpo_jax.runtime.words import counted, size
from mpo_jax.stages.fitting import num_updates
from mpo_jax.stages.settings import TrainSettings, adapter_of
from mpo_jax.types import Head

STATE_BYTES = 3 * 4
"""Bytes of a trained parameter in a checkpoint: float32 master and two moments."""
TEXT_BYTES = 4
"""Bytes of a sampled token as text, about those of English in the tokenizers of today's models."""


@dataclasses.dataclass(frozen=True)
class StageSize:
    """Bytes of a stage on disk.

    Attributes:
      model: its policy or reward model.
      critic: PPO's critic.
      rows: tables, samples and scores.
      checkpoints: training state that stays, with runtime.keep_finished_checkpoints.
      state: training state while it is made, all checkpoints that exist at once.
    """

    model: int = 0
    critic: int = 0
    rows: int = 0
    checkpoints: int = 0
    state: int = 0

    @property
    def models(self) -> int:
        """Bytes that runtime.keep=last may free."""
        return self.model + self.critic

    @property
    def kept(self) -> int:
        return self.models + self.rows + self.checkpoints


@dataclasses.dataclass(frozen=True)
class DiskUse:
    """Bytes that a table takes in the workdir.

    Attributes:
      there: what its finished stages take now.
      total: when everything is made.
      peak: the most at any time, training state included.
      at: name of the stage during which that is.
      sizes: each stage's.
      free: on the workdir's disk now.
    """

    there: int
    total: int
    peak: int
    at: str
    sizes: Mapping[str, StageSize]
    free: int

    @property
    def lacking(self) -> int:
        """Bytes by which the disk is too small; 0 if it is large enough."""
        return max(self.peak - self.there - self.free, 0)


def disk_use(config: Config, stages: Sequence[TableStage], basis: Basis | None = None) -> DiskUse:
    """What the stages of a table will take, in the order in which they are made.

    Args:
      stages: those of `table_stages`.
      basis: that of the configuration, if the caller has one.
    """
    sizes_of, folders = Sizes(basis or Basis(config)), {stage.name: _folder(config, stage) for stage in stages}
    sizes = {stage.name: _measured(folders[stage.name]) for stage in stages if stage.is_there}
    now = there = sum(size.kept for size in sizes.values())
    sizes |= {stage.name: sizes_of.stage(stage) for stage in stages if not stage.is_there}
    plan, done, removed = Plan.of({stage.name: stage.recipe for stage in stages}), set(), set()
    peak, at = now, ""
    for stage in stages:
        size = sizes[stage.name]
        if not stage.is_there:
            # the model is written while the training state is still there
            most, now = now + size.kept - size.checkpoints + max(size.state, size.checkpoints), now + size.kept
            if most > peak:
                peak, at = most, stage.name
        done.add(stage.name)
        if config.runtime.keep == "last":
            gone = [name for name in plan.unneeded(done) if name not in removed]
            now -= sum(sizes[name].models for name in gone)
            removed |= set(gone)
    return DiskUse(there, now, peak, at, sizes, _free(Path(config.workdir)))


def check_models_fit(config: Config, recipes: Iterable[Mapping[str, Any]], decoder: DecoderConfig) -> None:
    """Compares the free space with the models alone that stages leave: a lower bound that needs no rows.

    Args:
      recipes: of the stages that are going to be made.
      decoder: the base model's sizes.

    Raises:
      UserError: if the disk is too small even for these.
    """
    if config.runtime.bucket is not None:
        return
    own_reward = config.reward.path is not None or config.reward.function is not None
    heads: dict[str, Head] = {"sft": "lm", "dpo": "lm", "ppo": "lm"}
    if not own_reward:
        heads["reward"] = "value"
    width = jnp.dtype(machine.save_dtype(config.runtime)).itemsize
    sizes = [
        width * forward.num_parameters(decoder, head=heads[recipe["stage"]])
        for recipe in recipes
        if recipe["stage"] in heads
    ]
    keeps_one = config.runtime.keep == "last"
    needed, free = max(sizes, default=0) if keeps_one else sum(sizes), _free(Path(config.workdir))
    if needed > free:
        more = "" if keeps_one else ", or runtime.keep=last, which keeps the models of the last stages alone"
        raise UserError(
            f"workdir={config.workdir}: its disk has {size(free)} free, and the models of the "
            f"{counted(len(sizes), 'stage')} to be made alone take {size(needed)}: free some, name another folder, or "
            f"set runtime.save_dtype=bfloat16{more}"
        )


class Sizes:
    """Sizes of stages that do not exist yet, under one configuration."""

    def __init__(self, basis: Basis):
        self._basis, self._config = basis, basis.config

    def stage(self, planned: TableStage) -> StageSize:
        """What a stage will take; rows are counted at their full length, an upper bound."""
        kind, config = planned.kind, self._config
        if kind == "select":
            # ids and text of two responses a row, and the prompt
            token = 4 + TEXT_BYTES
            rows = self._basis.amounts.selected * 2 * config.text.max_response_tokens * token
            return StageSize(rows=rows + _bytes(self._basis.corpus.sampled_prompts(config.select.num_prompts)))
        if kind == "evaluate":
            prompts = self._basis.corpus.test_prompts[: config.evaluate.num_prompts]
            return StageSize(rows=len(prompts) * config.text.max_response_tokens * TEXT_BYTES + _bytes(prompts))
        if kind == "reward":
            state = self._state(kind, "value") if config.reward.trains else 0
            model = 0 if config.reward.function is not None else self._model("value")
            return self._trained(planned, StageSize(model=model), state)
        if kind == "ppo":
            average = 4 * self._parameters("lm") if config.ppo.extras.ema_decay is not None else 0
            # scores from text leave the critic the policy's sizes, with a smaller head
            head: Head = "lm" if self._scores_text else "value"
            critic = self._model(head) if config.ppo.save_critic else 0
            state = self._state(kind, "lm") + self._state(kind, head) + average
            return self._trained(planned, StageSize(model=self._model("lm"), critic=critic), state)
        # with sft.skip the base model is written as it is, without training state
        state = 0 if kind == "sft" and config.sft.skip else self._state(kind, "lm")
        return self._trained(planned, StageSize(model=self._model("lm")), state)

    def _trained(self, planned: TableStage, size: StageSize, state: int) -> StageSize:
        """The size with the checkpoints of training, if they are on this disk."""
        config, bucket = self._config, Bucket.of(self._config)
        if bucket is not None and bucket.takes_checkpoints:
            return size
        train = getattr(config, planned.kind).train
        updates = num_updates(TrainSettings.of(train), self._examples(planned))
        kept = train.keep_checkpoints + (train.best_metric is not None)
        saved = (updates - 1) // train.checkpoint_every  # the last state is the model
        if train.best_metric is not None and train.eval_every is not None:
            saved += (updates - 1) // train.eval_every  # at most: those that are best so far
        # a new checkpoint is whole before an old one goes
        stays = state * min(saved, kept) if config.runtime.keep_finished_checkpoints else 0
        return dataclasses.replace(size, state=state * min(saved, kept + 1), checkpoints=stays)

    def _examples(self, planned: TableStage) -> int:
        amounts, recipe = self._basis.amounts, planned.recipe
        if planned.kind == "sft":
            return amounts.demonstrations
        if planned.kind == "reward":
            return amounts.reward_pairs
        whole = amounts.human_pairs if planned.kind == "dpo" else amounts.prompts
        if "pairs" in recipe["parents"]:
            whole = amounts.selected
        settings = STAGES[planned.kind].Settings.model_validate(recipe["settings"])
        return round(settings.split.expected_share * whole)  # type: ignore[attr-defined]

    def _model(self, head: Head) -> int:
        size = jnp.dtype(machine.save_dtype(self._config.runtime)).itemsize
        return self._parameters(head) * size + self._tokenizer

    def _state(self, stage: str, head: Head) -> int:
        """A checkpoint of what a stage trains: the whole model, or its adapters and its head."""
        adapter = adapter_of(stage, self._config)
        if adapter is None:
            return STATE_BYTES * self._parameters(head)
        decoder = self._decoder(head)
        model = Model(decoder, adapter=loading.make_adapter(adapter, decoder))
        trained = forward.abstract_split(model, head=head)["trainable"]
        return STATE_BYTES * sum(leaf.size for leaf in jax.tree.leaves(trained))

    def _parameters(self, head: Head) -> int:
        return forward.num_parameters(self._decoder(head), head=head)

    def _decoder(self, head: Head) -> DecoderConfig:
        reward = self._config.reward.path
        return loading.open_model(reward).decoder if head == "value" and reward is not None else self._basis.decoder

    @cached_property
    def _scores_text(self) -> bool:
        return scores_text(self._config, fetch=False)

    @cached_property
    def _tokenizer(self) -> int:
        """Bytes of the tokenizer's files, which every model has."""
        with tempfile.TemporaryDirectory() as folder:
            self._basis.codec.save(Path(folder))
            return _size(Path(folder))


def _folder(config: Config, stage: TableStage) -> Path:
    return shared.place_of(Path(config.workdir) / f"seed-{stage.seed}" / "stages" / stage.name)


def _measured(folder: Path) -> StageSize:
    """What a finished stage takes in this workdir; nothing if it is in a bucket alone."""
    parts = {part: _size(folder / part) for part in (*FOLDERS, "checkpoints")}
    return StageSize(rows=_size(folder) - sum(parts.values()), **parts)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def _free(workdir: Path) -> int:
    """Free bytes on the disk that holds the workdir, or will."""
    place = workdir.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
