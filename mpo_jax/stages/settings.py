"""Building blocks of the stages' settings: what a result depends on, and apart from it what cannot change a result."""

import dataclasses
from typing import Annotated, Literal, TypeAlias

from mpo_jax.config.base import InRecipe
from mpo_jax.config.registry import Subset
from mpo_jax.config.schema import (
    EVAL,
    TRAINED,
    AdapterConfig,
    Config,
    ModelConfig,
    OptimConfig,
    Section,
    SelectConfig,
    TrainConfig,
)
from mpo_jax.runtime import machine


class Numerics(Section, frozen=True):
    """The arithmetic of every model: compute type, storage type of frozen models, attention implementation."""

    compute_dtype: str
    frozen_dtype: str
    attention: str

    @classmethod
    def of(cls, config: ModelConfig) -> "Numerics":
        """The model section's numerics, with `auto` resolved for this machine."""
        return cls(
            compute_dtype=machine.compute_dtype(config),
            frozen_dtype=machine.frozen_dtype(config),
            attention=machine.attention(config),
        )


Adapting: TypeAlias = Annotated[AdapterConfig | None, InRecipe.UNLESS_DEFAULT]
"""The adapters that a stage trains; None, which is left out of a stage's name: whole models."""


def adapter_of(stage: str, config: Config) -> AdapterConfig | None:
    """The adapters that a stage trains under a configuration; None if it trains a whole model, or nothing."""
    scratch = config.model.path is None and (stage == "sft" or (stage == "reward" and config.reward.init == "base"))
    finished = stage == "reward" and not config.reward.trains
    return None if scratch or finished or stage not in TRAINED else config.model.adapter


class Choice(Section, frozen=True):
    """Which state is exported if not the last: the metric to compare by, and the states compared.

    Attributes:
      every: number of updates between compared states.
      over: number of held-out rows they are measured on, or of updates that a training metric is averaged over.
    """

    metric: str
    mode: Literal["min", "max"]
    every: int | None
    over: int | None

    @classmethod
    def of(cls, train: TrainConfig) -> "Choice | None":
        if train.best_metric is None:
            return None
        held_out = train.best_metric.startswith(EVAL)
        every, over = (train.eval_every, train.eval_rows) if held_out else (train.checkpoint_every, train.log_every)
        return cls(metric=train.best_metric, mode=train.better, every=every, over=over)


class TrainSettings(Section, frozen=True):
    """A stage's training: its length, batches and optimiser, and which state it exports.

    Attributes:
      epochs: passes over the rows; None if `steps` is set.
    """

    epochs: float | None
    steps: int | None
    batch_size: int
    accumulation: int
    shuffle: bool
    optim: OptimConfig
    choice: Choice | None

    @classmethod
    def of(cls, train: TrainConfig) -> "TrainSettings":
        return cls(
            epochs=None if train.steps is not None else train.epochs,
            steps=train.steps,
            batch_size=train.batch_size,
            accumulation=train.accumulation,
            shuffle=train.shuffle,
            optim=train.optim,
            choice=Choice.of(train),
        )


class Split(Section, frozen=True):
    """The part of a selection's pairs that a step learns from.

    Attributes:
      threshold, easy_fraction: split between easy and hard pairs; both None for all pairs.
      num_prompts: for a step without a selection, number of leading training prompts it learns from; None: all.
    """

    subset: Subset = "all"
    threshold: float | None = None
    easy_fraction: float | None = None
    num_prompts: int | None = None

    @classmethod
    def of(cls, subset: Subset, select: SelectConfig, *, selected: bool) -> "Split":
        """
        Args:
          selected: whether the step reads a selection.
        """
        if subset == "all":
            # the limit on sampled prompts defines the data of every experiment
            return cls(num_prompts=None if selected else select.num_prompts)
        return cls(subset=subset, threshold=select.threshold, easy_fraction=select.easy_fraction)

    @property
    def expected_share(self) -> float:
        """Approximate fraction of the pairs in the subset; 0.5 at a threshold, since it depends on the gaps."""
        easy = 0.5 if self.easy_fraction is None else self.easy_fraction
        return {"all": 1.0, "easy": easy, "hard": 1.0 - easy}[self.subset]


@dataclasses.dataclass(frozen=True)
class Watch:
    """Logging, checkpointing and held-out evaluation of a training stage; none of it changes the final state."""

    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    eval_every: int | None = None
    eval_rows: int | None = None
    stop_after_skipped: int = 5

    @classmethod
    def of(cls, train: TrainConfig) -> "Watch":
        return cls(**{field.name: getattr(train, field.name) for field in dataclasses.fields(cls)})


NOT_WATCHED = Watch()
"""Defaults for a stage that does not train, or where logging and checkpointing do not matter."""
