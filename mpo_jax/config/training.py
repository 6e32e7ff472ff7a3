"""The sections `train` and `optim` of the stages that train, and what these stages measure on held-out rows."""

from typing import Literal

from pydantic import Field, model_validator

from mpo_jax.config.base import Section

EVAL = "eval/"
"""Prefix of metrics on held-out rows; the rest of the name is the training metric's own."""

MEASURES = {
    "sft": ("loss",),
    "reward": ("loss", "accuracy", "score/chosen", "score/rejected", "gap"),
    "dpo": (
        "loss", "loss/nll", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "logps/chosen", "logps/rejected",
    ),
    "ppo": (
        "objective/kl", "objective/kl_k2", "objective/kl_k3", "objective/entropy", "objective/scores",
        "objective/score_clipfrac", "objective/non_score_reward",
        "objective/rlhf_reward", "policy/entropy_avg", "response_length/mean", "response_length/clip_ratio",
    ),
}  # fmt: skip
"""What each stage measures on held-out rows, so that a misspelt `best_metric` is found before any training."""

LOWER_IS_BETTER = ("rejected", "clipfrac")
"""Metrics with one of these in their name are better when lower, whatever else the name contains."""

HIGHER_IS_BETTER = ("accura", "margin", "score", "reward", "gap", "utility", "explained_variance", "logps")
"""Of the other metrics, those with one of these in their name are better when higher."""


class OptimConfig(Section, frozen=True):
    """AdamW with linear warm-up. Defaults are those of the paper, or of DeepSpeed-Chat where the paper gives none."""

    learning_rate: float = Field(
        default=5e-5, ge=0, description="peak learning rate; defaults from the paper's Table 9 for HH-RLHF"
    )
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="learning rate after the warm-up; cosine: to 0 at the last update"
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="updates of linear warm-up; null: a tenth of all updates, at most 500"
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="decoupled weight decay, not applied to norms and biases; defaults from the paper's Table 9",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of AdamW's first moment")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of AdamW's second moment")
    eps: float = Field(default=1e-8, gt=0, description="epsilon of AdamW")
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="largest global gradient norm; larger ones are scaled down; null: no clipping"
    )


class TrainConfig(Section, frozen=True):
    """How long a stage trains, on what batches, what it logs and saves. A step is an update, in PPO an iteration."""

    epochs: float = Field(default=1.0, gt=0, description="passes over the training rows, in PPO over the prompts")
    steps: int | None = Field(default=None, gt=0, description="steps to train; set, it takes precedence over epochs")
    # the paper's 64 to 512 would leave a set of a thousand rows with a handful of updates
    batch_size: int = Field(
        default=32,
        gt=0,
        description="rows per step over all devices and micro-batches: demonstrations, pairs, or PPO's prompts; "
        "the paper has 64 to 512",
    )
    accumulation: int = Field(
        default=1,
        gt=0,
        description="micro-batches per update; the gradient is that of the whole batch. Packed micro-batches have no "
        "more columns than batch_size / accumulation padded rows, and no more than keep a device busy, so that small "
        "values may change nothing",
    )
    shuffle: bool = Field(
        default=True, description="shuffle the rows every epoch; false: rows in file order, epoch after epoch"
    )
    log_every: int = Field(default=10, gt=0, description="steps between logged lines, which average over them")
    checkpoint_every: int = Field(
        default=500, gt=0, description="steps between checkpoints; these steps are logged too, with a state_hash"
    )
    eval_every: int | None = Field(
        default=None,
        gt=0,
        description="steps between evaluations on held-out rows, with one after the last step; null: none",
    )
    eval_rows: int | None = Field(
        default=None,
        gt=0,
        description="held-out rows to evaluate on (in PPO: test prompts), the first ones; null: 256, in PPO 64",
    )
    keep_checkpoints: int = Field(
        default=2,
        gt=0,
        description="newest checkpoints to keep during training; with 1, a damaged one means starting again",
    )
    best_metric: str | None = Field(
        default=None,
        description="export the state with the best value of this metric, not the last state; eval/NAME compares the "
        "states at every evaluation, other metrics those at checkpoints; null: the last state",
    )
    best_mode: Literal["min", "max"] | None = Field(
        default=None,
        description="which values of best_metric are best; null: max for accuracies, margins, scores, rewards and "
        "gaps, else min",
    )
    stop_after_skipped: int = Field(
        default=5,
        gt=0,
        description="stop after this many updates in a row with a loss or gradient that is not finite; each is skipped",
    )
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig())

    @property
    def better(self) -> Literal["min", "max"]:
        """Which values of `best_metric` are better."""
        if self.best_mode is not None:
            return self.best_mode
        metric = self.best_metric or ""
        lower = any(word in metric for word in LOWER_IS_BETTER)
        return "max" if not lower and any(word in metric for word in HIGHER_IS_BETTER) else "min"

    @model_validator(mode="after")
    def _divides(self) -> "TrainConfig":
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide into accumulation={self.accumulation} micro-batches"
            )
        return self
