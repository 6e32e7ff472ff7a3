"""The sections `train` and `optim` of the stages that train, and what these stages measure on held-out rows."""

from typing import Literal

from pydantic import Field, model_validator

from mpo_jax.config.base import Section

TRAINED = ("sft", "reward", "dpo", "ppo")
"""The stages with a section `train`."""


EVAL = "eval/"
"""What the names of measures on held-out rows begin with; the rest is the training metric's own name."""

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
"""What each stage measures on held-out rows, so that a name that is none of them is known before any training."""

LOWER_IS_BETTER = ("rejected", "clipfrac")
"""Parts of metrics' names, and of the others those whose metrics are better where they are higher."""
HIGHER_IS_BETTER = ("accura", "margin", "score", "reward", "gap", "utility", "explained_variance", "logps")


class OptimConfig(Section, frozen=True):
    """AdamW with warm-up; DeepSpeed-Chat's constants where the paper is silent. Rates and decay differ by stage."""

    learning_rate: float = Field(default=5e-5, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0, description="null: a tenth of the updates, at most 500")
    weight_decay: float = Field(default=0.0, ge=0, description="not applied to norms and biases")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip_norm: float | None = Field(default=1.0, gt=0, description="global gradient norm; null: no clipping")


class TrainConfig(Section, frozen=True):
    """How long and in what portions a stage trains; `batch_size` is global: all devices and micro-batches."""

    epochs: float = Field(default=1.0, gt=0)
    steps: int | None = Field(default=None, gt=0, description="in place of epochs")
    # the paper's 64 to 512 would leave a set of a thousand rows with a handful of updates
    batch_size: int = Field(default=32, gt=0)
    accumulation: int = Field(default=1, gt=0, description="micro-batches an update")
    shuffle: bool = Field(default=True, description="false: rows in file order, again from the first after the last")
    log_every: int = Field(default=10, gt=0)
    checkpoint_every: int = Field(default=500, gt=0, description="updates; such a step is logged too, with state_hash")
    eval_every: int | None = Field(
        default=None, gt=0, description="updates between measures on held-out rows (and after the last); null: never"
    )
    eval_rows: int | None = Field(
        default=None, gt=0, description="the first held-out rows, or of ppo test prompts; null: 256, of ppo 64"
    )
    keep_checkpoints: int = Field(
        default=2, gt=0, description="the last ones kept while the stage trains; 1: none to fall back on"
    )
    best_metric: str | None = Field(
        default=None,
        description="logged metric: the state with its best value is exported, in place of the last; eval/NAME "
        "compares all states that eval_every measures, others those at checkpoints",
    )
    best_mode: Literal["min", "max"] | None = Field(
        default=None, description="null: max of accuracies, margins, scores, rewards and gaps, min of all else"
    )
    stop_after_skipped: int = Field(
        default=5, gt=0, description="updates in a row without a finite loss and gradient; each is skipped"
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
