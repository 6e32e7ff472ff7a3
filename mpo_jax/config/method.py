"""The sections of the method: `sft`, `reward`, `select`, `dpo`, `ppo`, `evaluate`, `table`."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mpo_jax.config.base import Section
from mpo_jax.config.training import OptimConfig, TrainConfig

ExperimentName = Literal[
    "sft", "dpo_base", "dpo", "ppo", "mpo", "mpo_sft_kl", "mpo_reverse", "mpo_reverse_sft",
    "dpo_easy", "dpo_hard", "ppo_easy", "ppo_hard",
]  # fmt: skip


def _stage_defaults(defaults: dict[str, Any]) -> BeforeValidator:
    """Fills what a stage's section leaves out with the stage's own defaults, at any depth."""

    def merge(given: Any, defaults: dict[str, Any] = defaults) -> Any:
        if not isinstance(given, dict):
            return given
        filled = {key: merge(given[key], value) if isinstance(value, dict) and key in given else given.get(key, value)
                  for key, value in defaults.items()}  # fmt: skip
        return {**given, **filled}

    return BeforeValidator(merge)


# Rates and weight decays by stage: Table 9 of the paper, its HH-RLHF column; SFT's are those of OptimConfig.
_REWARD_OPTIM = {"learning_rate": 5e-6, "weight_decay": 0.1}
_DPO_OPTIM = {"learning_rate": 5e-6, "weight_decay": 0.1}
_ACTOR_OPTIM = {"learning_rate": 3e-6, "weight_decay": 0.1}
_CRITIC_OPTIM = {"learning_rate": 5e-6, "weight_decay": 0.1}


class SftConfig(Section, frozen=True):
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())


class RewardConfig(Section, frozen=True):
    train: Annotated[TrainConfig, _stage_defaults({"optim": _REWARD_OPTIM})] = Field(
        default_factory=lambda: TrainConfig(optim=OptimConfig.model_validate(_REWARD_OPTIM))
    )
    path: str | None = Field(
        default=None,
        description="a finished reward model (as model.path) with the policy's tokenizer: nothing is trained",
    )
    init: Literal["sft", "base"] = "sft"
    loss: Literal["last_token", "ds_span"] = "last_token"


class SelectConfig(Section, frozen=True):
    """`threshold` and `easy_fraction` are two ways to name one split: give one."""

    threshold: float | None = 1.0
    easy_fraction: float | None = Field(default=None, ge=0, le=1)
    pair_source: Literal["sampled", "human"] = "sampled"
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    num_prompts: int | None = Field(
        default=None, gt=0, description="sample for the first training prompts only; null: all"
    )
    batch_size: int = Field(default=64, gt=0, description="prompts a call, each with two samples")

    @model_validator(mode="before")
    @classmethod
    def _one_split(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if values.get("easy_fraction") is not None and values.get("threshold") is None:
                return {**values, "threshold": None}
            if values.get("easy_fraction") is not None:
                raise ValueError("select.threshold and select.easy_fraction are both given: set one of them to null")
        return values

    @model_validator(mode="after")
    def _has_split(self) -> "SelectConfig":
        if self.threshold is None and self.easy_fraction is None:
            raise ValueError("one of select.threshold and select.easy_fraction must be given")
        return self


class DpoConfig(Section, frozen=True):
    train: Annotated[TrainConfig, _stage_defaults({"optim": _DPO_OPTIM})] = Field(
        default_factory=lambda: TrainConfig(optim=OptimConfig.model_validate(_DPO_OPTIM))
    )
    beta: float = Field(default=0.1, gt=0)
    loss: Literal["dpo", "cdpo", "ipo"] = "dpo"
    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5, description="of loss=cdpo")
    length_normalised: bool = Field(default=False, description="log-probabilities divided by the response's tokens")
    nll_coef: float = Field(default=0.0, ge=0, description="weight of the chosen response's NLL per token")


class KlConfig(Section, frozen=True):
    """The penalty that keeps PPO near its reference, and what changes or stops it."""

    coef: float = Field(default=0.4, ge=0, description="the paper: 0.4 for HH-RLHF, 0.1 for TL;DR")
    adaptive: bool = False
    target: float = Field(default=6.0, gt=0, description="nats a response, of adaptive")
    horizon: float = Field(default=10000.0, gt=0, description="responses, of adaptive")
    stop: float | None = Field(
        default=None, gt=0, description="approximate KL from the old policy that ends an iteration"
    )


class PpoExtrasConfig(Section, frozen=True):
    """Departures from plain PPO, each off by default."""

    whiten_advantages: bool = False
    whiten_rewards: bool = False
    missing_eos: Literal["none", "replace", "subtract"] = "none"
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    ptx_coef: float = Field(default=0.0, ge=0, description="weight of the SFT loss on demonstrations")
    ema_decay: float | None = Field(default=None, gt=0, lt=1, description="export this average of the actor instead")
    critic_warmup: int = Field(
        default=0, ge=0, description="iterations that train the critic alone; the actor's schedule starts after them"
    )


class PpoConfig(Section, frozen=True):
    """`train.batch_size` is prompts an iteration; each iteration samples, scores and updates on them."""

    train: Annotated[TrainConfig, _stage_defaults({"optim": _ACTOR_OPTIM})] = Field(
        default_factory=lambda: TrainConfig(optim=OptimConfig.model_validate(_ACTOR_OPTIM))
    )
    critic_optim: Annotated[OptimConfig, _stage_defaults(_CRITIC_OPTIM)] = Field(
        default_factory=lambda: OptimConfig.model_validate(_CRITIC_OPTIM)
    )
    epochs: int = Field(default=1, gt=0, description="passes over an iteration's rollouts")
    minibatches: int = Field(default=1, gt=0, description="updates a pass")
    kl: KlConfig = Field(default_factory=lambda: KlConfig())
    gamma: float = Field(default=1.0, ge=0, le=1)
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    clip_eps: float = Field(default=0.2, gt=0)
    value_clip_eps: float = Field(default=0.2, gt=0)
    score: Literal["raw", "normalised"] = Field(
        default="raw", description="normalised: less the running mean, over the running standard deviation"
    )
    score_clip: float = Field(default=5.0, gt=0, description="of the score that the reward takes: to +-score_clip")
    reward_at: Literal["last_valid", "ds_chat"] = "last_valid"
    greedy: bool = False
    temperature: float = Field(default=1.0, gt=0)
    one_pass: bool = Field(
        default=False,
        description="an iteration's only update differentiates the forward pass that scores its rollouts; no effect "
        "with several updates an iteration, critic_warmup, ptx_coef, score=normalised, or whitening with accumulation",
    )
    extras: PpoExtrasConfig = Field(default_factory=lambda: PpoExtrasConfig())

    @model_validator(mode="after")
    def _divides(self) -> "PpoConfig":
        if self.train.batch_size % (self.minibatches * self.train.accumulation):
            raise ValueError(
                f"train.batch_size={self.train.batch_size} does not divide into minibatches={self.minibatches} x "
                f"train.accumulation={self.train.accumulation}"
            )
        return self


class EvaluateConfig(Section, frozen=True):
    num_prompts: int | None = Field(default=None, gt=0, description="the first test prompts only; null: all")
    batch_size: int = Field(default=64, gt=0)
    greedy: bool = False
    temperature: float = Field(default=1.0, gt=0)
    num_samples_shown: int = Field(
        default=100, ge=0, description="prompts side by side in the report: half for their differences, half the first"
    )
    bootstrap_resamples: int = Field(default=2000, gt=0)


class TableConfig(Section, frozen=True):
    """What `mpo table` runs, once a seed: the experiments, and MPO and Figure 4 also at further splits.

    A split that is also the one of the section `select` is run once, as `mpo`.
    """

    seeds: tuple[int, ...] = (0,)
    experiment: tuple[ExperimentName, ...] = get_args(ExperimentName)
    thresholds: tuple[float, ...] = Field(default=(1.0, 2.0), description="the paper's two")
    easy_fractions: tuple[float, ...] = ()

    @field_validator("seeds", "experiment", "thresholds", "easy_fractions", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(","))
        return (value,) if isinstance(value, int | float) else value

    @field_validator("seeds")
    @classmethod
    def _some_and_different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("must be different whole numbers from 0 up, such as 0,1,2")
        return value

    @field_validator("easy_fractions")
    @classmethod
    def _fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.0 <= fraction <= 1.0 for fraction in value):
            raise ValueError("each must lie in [0, 1]")
        return value
