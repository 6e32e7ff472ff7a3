"""The sections of the method: `sft`, `reward`, `select`, `dpo`, `ppo`, `evaluate`, `table`."""

import re
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mpo_jax.config.base import NumbersByName, Section
from mpo_jax.config.registry import EXPERIMENTS, PREFERENCE_LOSSES
from mpo_jax.config.training import OptimConfig, TrainConfig

# types made of the registries' names, so that a name is added in one place
ExperimentName: TypeAlias = Literal[tuple(EXPERIMENTS)]  # type: ignore[valid-type]
LossName: TypeAlias = Literal[tuple(PREFERENCE_LOSSES)]  # type: ignore[valid-type]


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


def _as_text(given: Any) -> Any:
    """A number is what YAML makes of a label's number."""
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


class SftConfig(Section, frozen=True):
    """Supervised fine-tuning on the demonstrations."""

    skip: bool = Field(
        default=False,
        description="train nothing: model.path, as it is, takes the SFT model's place as first policy and reference",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="seed of this stage alone; with one, the seeds of mpo table share an SFT model; null: the key seed",
    )
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())


class RewardConfig(Section, frozen=True):
    """The reward model: trained on the labelled pairs, a finished one, or a Python function in its place."""

    train: Annotated[TrainConfig, _stage_defaults({"optim": _REWARD_OPTIM})] = Field(
        default_factory=lambda: TrainConfig(optim=OptimConfig.model_validate(_REWARD_OPTIM))
    )
    path: str | None = Field(
        default=None,
        description="finished reward model to use, given as in model.path; one with another tokenizer or chat "
        "template than the policy's reads the responses as text; null: train one",
    )
    function: str | None = Field(
        default=None,
        description="module:name of a Python function to use as reward, from the current folder or the Python path. It "
        "gets a list of prompts and a list of responses, and returns a finite number for each; it must be "
        "deterministic; null: a reward model",
    )
    label: Annotated[str | None, BeforeValidator(_as_text)] = Field(
        default=None,
        description="of a finished classifier of several labels, the name or number of the one whose logit is the "
        "score; null: the only label, or of two the second's logit less the first's",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="seed of this stage alone; with it and sft.seed, the seeds of mpo table share a reward model; "
        "null: the key seed",
    )
    init: Literal["sft", "base"] = Field(
        default="sft", description="what the reward model is trained from: the SFT model, or the base model"
    )
    loss: Literal["last_token", "ds_span"] = Field(
        default="last_token",
        description="Bradley-Terry loss on the scores of the last tokens, or DeepSpeed-Chat's mean over the tokens "
        "from where the responses differ",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "RewardConfig":
        if self.path is not None and self.function is not None:
            raise ValueError("reward.path and reward.function are both given: set one of them to null")
        if self.function is not None and not re.fullmatch(r"[\w.]+:[\w.]+", self.function):
            raise ValueError(f"reward.function={self.function}: give module:name, such as rewards:brevity")
        return self

    @property
    def trains(self) -> bool:
        """Whether a reward model is trained."""
        return self.path is None and self.function is None


def named_once(experiments: tuple[str, ...]) -> tuple[str, ...]:
    """The names, of which there must be one, and none twice."""
    if not experiments:
        raise ValueError("names no run: name one or more, such as mpo")
    if twice := [name for name in dict.fromkeys(experiments) if experiments.count(name) > 1]:
        raise ValueError(f"names {', '.join(twice)} more than once: a run is made once")
    return experiments


class SelectConfig(Section, frozen=True):
    """Data selection: easy pairs go to DPO, hard ones to PPO. Set `threshold` or `easy_fraction`, not both."""

    threshold: float | None = Field(
        default=1.0,
        description="reward gap above which a pair is easy, the paper's gamma, 1 or 2; null if easy_fraction is set",
    )
    easy_fraction: float | None = Field(
        default=None, ge=0, le=1, description="share of the pairs, those with the largest gaps, that is easy"
    )
    pair_source: Literal["sampled", "human", "scored"] = Field(
        default="sampled",
        description="sampled: two samples of the SFT model per prompt, ordered by the reward model; human: the "
        "labelled pairs, and a pair that the reward model orders otherwise is hard; scored: rows that bring their "
        "scores (data.kind=scored), without sampling and without a reward model",
    )
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="nucleus sampling: total probability of the kept tokens; 1: all tokens"
    )
    num_prompts: int | None = Field(
        default=None, gt=0, description="use the first training prompts only, in every DPO and PPO run too; null: all"
    )
    batch_size: int = Field(default=64, gt=0, description="prompts per batch, each with two samples")

    @model_validator(mode="before")
    @classmethod
    def _one_split(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if values.get("easy_fraction") is not None and values.get("threshold") is None:
                return {**values, "threshold": None}
            if values.get("easy_fraction") is not None:
                raise ValueError("select.threshold and select.easy_fraction are both given: set one of them to null")
        return values

    @property
    def scores_pairs(self) -> bool:
        """Whether the reward model scores the pairs, instead of their rows."""
        return self.pair_source != "scored"

    @model_validator(mode="after")
    def _has_split(self) -> "SelectConfig":
        if self.threshold is None and self.easy_fraction is None:
            raise ValueError("one of select.threshold and select.easy_fraction must be given")
        if self.threshold is not None and self.threshold < 0 and self.pair_source == "sampled":
            raise ValueError(
                f"select.threshold={self.threshold:g} makes every pair easy: the gaps of sampled pairs are never below "
                "0. Give a threshold from 0 up; select.pair_source=human has gaps with a sign"
            )
        return self


class DpoConfig(Section, frozen=True):
    """Direct Preference Optimization. The reference is the policy it starts from, unless the experiment says SFT."""

    train: Annotated[TrainConfig, _stage_defaults({"optim": _DPO_OPTIM})] = Field(
        default_factory=lambda: TrainConfig(optim=OptimConfig.model_validate(_DPO_OPTIM))
    )
    beta: float = Field(default=0.1, gt=0, description="strength of the pull towards the reference; the paper: 0.1")
    loss: LossName = Field(
        default="dpo",
        description="dpo: arXiv:2305.18290; cdpo: the same with label_smoothing; ipo: squared loss, arXiv:2310.12036; "
        "simpo: no reference, log-probabilities per token, arXiv:2405.14734, with beta 2 to 10",
    )
    loss_options: NumbersByName = Field(
        default=(), description="options of the loss by name; of simpo: target_margin (its gamma), 1.0"
    )
    label_smoothing: float = Field(
        default=0.1, ge=0, lt=0.5, description="probability that a label is wrong; loss=cdpo only"
    )
    length_normalised: bool = Field(
        default=False, description="divide the log-probability of each response by its number of tokens"
    )
    nll_coef: float = Field(
        default=0.0, ge=0, description="weight of an added loss, the chosen response's NLL per token; arXiv:2404.19733"
    )


class KlConfig(Section, frozen=True):
    """The KL penalty that keeps PPO near its reference."""

    coef: float = Field(
        default=0.4,
        ge=0,
        description="weight of the KL per token in the reward (initial weight if adaptive); the paper's Table 9: 0.4 "
        "for HH-RLHF, 0.1 for TL;DR",
    )
    adaptive: bool = Field(
        default=False,
        description="change coef after every iteration so that the KL approaches target; arXiv:1909.08593",
    )
    target: float = Field(default=6.0, gt=0, description="KL to aim for, in nats per response; if adaptive")
    horizon: float = Field(
        default=10000.0, gt=0, description="responses over which coef adapts; larger is slower; if adaptive"
    )
    stop: float | None = Field(
        default=None,
        gt=0,
        description="end an iteration's updates once the estimated KL from the policy that sampled exceeds this, in "
        "nats per token; null: never",
    )


class PpoExtrasConfig(Section, frozen=True):
    """Additions to plain PPO, each off by default."""

    whiten_advantages: bool = Field(
        default=False, description="shift and scale the batch's advantages to mean 0 and variance 1"
    )
    whiten_rewards: bool = Field(
        default=False, description="scale the batch's per-token rewards to variance 1 and keep their mean"
    )
    missing_eos: Literal["none", "replace", "subtract"] = Field(
        default="none",
        description="score of a response that was cut off without EOS. none: as it is; replace: -missing_eos_penalty; "
        "subtract: less missing_eos_penalty",
    )
    missing_eos_penalty: float = Field(default=1.0, ge=0, description="penalty of missing_eos, in units of the score")
    ptx_coef: float = Field(
        default=0.0, ge=0, description="weight of an added SFT loss on the demonstrations (PPO-ptx); 0: none"
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="export an exponential moving average of the actor with this decay; null: the actor itself",
    )
    critic_warmup: int = Field(
        default=0,
        ge=0,
        description="first iterations, in which only the critic trains; the actor's schedule starts after them",
    )


class PpoConfig(Section, frozen=True):
    """Proximal Policy Optimization. Each iteration samples responses to a batch of prompts, scores them and updates."""

    train: Annotated[TrainConfig, _stage_defaults({"optim": _ACTOR_OPTIM})] = Field(
        default_factory=lambda: TrainConfig(optim=OptimConfig.model_validate(_ACTOR_OPTIM))
    )
    critic_optim: Annotated[OptimConfig, _stage_defaults(_CRITIC_OPTIM)] = Field(
        default_factory=lambda: OptimConfig.model_validate(_CRITIC_OPTIM)
    )
    epochs: int = Field(default=1, gt=0, description="passes over the rollouts of an iteration")
    minibatches: int = Field(default=1, gt=0, description="minibatches per pass, with one update each")
    kl: KlConfig = Field(default_factory=lambda: KlConfig())
    gamma: float = Field(default=1.0, ge=0, le=1, description="discount factor per token")
    gae_lambda: float = Field(
        default=0.95, ge=0, le=1, description="lambda of generalised advantage estimation; arXiv:1506.02438"
    )
    clip_eps: float = Field(
        default=0.2, gt=0, description="the policy's probability ratio is clipped to [1 - clip_eps, 1 + clip_eps]"
    )
    value_clip_eps: float = Field(
        default=0.2, gt=0, description="values are clipped to within this of the old ones; DeepSpeed-Chat's 0.2"
    )
    score: Literal["raw", "normalised"] = Field(
        default="raw",
        description="raw: the reward model's score; normalised: by the running mean and standard deviation of scores",
    )
    score_clip: float = Field(
        default=5.0, gt=0, description="scores are clipped to [-score_clip, score_clip]; DeepSpeed-Chat's 5"
    )
    reward_at: Literal["last_valid", "ds_chat"] = Field(
        default="last_valid",
        description="token that receives the score. last_valid: the response's last; ds_chat: the one after it, if "
        "there is room, as in DeepSpeed-Chat",
    )
    greedy: bool = Field(
        default=False, description="take the likeliest token in rollouts, as DeepSpeed-Chat does for Llama"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="temperature of sampling and of the log-probabilities that PPO compares"
    )
    one_pass: bool = Field(
        default=False,
        description="score the rollouts in the forward pass of the update: faster, but the first KL is 0 to rounding, "
        "not exactly. No effect with several updates per iteration, critic_warmup, ptx_coef, score=normalised, or "
        "whitening with accumulation",
    )
    save_critic: bool = Field(
        default=True,
        description="save the trained critic in critic/, beside the policy; no stage reads it, and it is as large as "
        "the reward model",
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
    """Evaluation: every policy answers the test prompts, and the reward model scores the answers."""

    num_prompts: int | None = Field(default=None, gt=0, description="use the first test prompts only; null: all")
    batch_size: int = Field(default=64, gt=0, description="prompts per batch")
    greedy: bool = Field(default=False, description="take the likeliest token instead of sampling")
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature")
    num_samples_shown: int = Field(
        default=100,
        ge=0,
        description="prompts whose responses the report shows side by side: half those on which runs differ most, half "
        "the first ones",
    )
    bootstrap_resamples: int = Field(default=2000, gt=0, description="resamples of the report's bootstrap intervals")


class TableConfig(Section, frozen=True):
    """What `mpo table` runs: the experiments for every seed. MPO and Figure 4's runs are made at further splits too."""

    seeds: tuple[int, ...] = Field(
        default=(0,), description="training seeds, different whole numbers from 0 up, each in workdir/seed-N"
    )
    experiment: tuple[ExperimentName, ...] = Field(
        default=get_args(ExperimentName), description="experiments to run for every seed, as in the key experiment"
    )
    thresholds: tuple[float, ...] = Field(
        default=(1.0, 2.0), description="further values of select.threshold to split at; the paper has 1 and 2"
    )
    easy_fractions: tuple[float, ...] = Field(
        default=(), description="further values of select.easy_fraction to split at, each in [0, 1]"
    )

    @field_validator("seeds", "experiment", "thresholds", "easy_fractions", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(","))
        return (value,) if isinstance(value, int | float) else value

    @field_validator("seeds")
    @classmethod
    def _some_and_different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value) or min(value) < 0 or max(value) >= 2**31:
            raise ValueError("must be different whole numbers from 0 up and below 2147483648, such as 0,1,2")
        return value

    @field_validator("experiment")
    @classmethod
    def _runs_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return named_once(value)

    @field_validator("easy_fractions")
    @classmethod
    def _fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.0 <= fraction <= 1.0 for fraction in value):
            raise ValueError("each must lie in [0, 1]")
        return value
