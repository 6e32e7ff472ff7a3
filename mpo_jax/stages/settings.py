"""The parts that stages' settings are made of: what a result depends on, apart from what changes none."""

import dataclasses
from typing import Literal

from mpo_jax.config.registry import Subset
from mpo_jax.config.schema import EVAL, ModelConfig, OptimConfig, Section, SelectConfig, TrainConfig
from mpo_jax.runtime import machine


class Numerics(Section, frozen=True):
    """The arithmetic of every model: its type, the type in which frozen models are stored, how it attends."""

    compute_dtype: str
    frozen_dtype: str
    attention: str

    @classmethod
    def of(cls, config: ModelConfig) -> "Numerics":
        """`auto` resolved on this machine."""
        return cls(
            compute_dtype=machine.compute_dtype(config),
            frozen_dtype=machine.frozen_dtype(config),
            attention=machine.attention(config),
        )


class Choice(Section, frozen=True):
    """Which state is exported where it is not the last: by which metric, and which states are compared.

    Attributes:
      every: updates between states that are compared.
      over: held-out rows that they are measured on, or updates that a training metric is averaged over.
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
    """How long and in what portions a stage trains, by which optimiser, and which of its states it exports.

    Attributes:
      epochs: None where `steps` says how long.
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
    """Which of a selection's pairs a step learns from.

    Attributes:
      threshold, easy_fraction: where easy ends and hard begins; both None for all pairs.
      num_prompts: of a step without a selection, the first training prompts that it learns from; None: all.
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
            # what sampling is limited to is the data of every experiment
            return cls(num_prompts=None if selected else select.num_prompts)
        return cls(subset=subset, threshold=select.threshold, easy_fraction=select.easy_fraction)

    @property
    def expected_share(self) -> float:
        """Of all pairs, about how many are in the subset: half at a threshold, which the pairs' gaps decide."""
        easy = 0.5 if self.easy_fraction is None else self.easy_fraction
        return {"all": 1.0, "easy": easy, "hard": 1.0 - easy}[self.subset]


@dataclasses.dataclass(frozen=True)
class Watch:
    """How a training stage is watched and saved; nothing here changes its last state."""

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
"""Of a stage that does not train, or whose watching does not matter."""
