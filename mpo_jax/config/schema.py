"""The configuration: frozen pydantic models, YAML files, `key.sub=value` overrides. Unknown keys are refused."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from mpo_jax.config.suggestion import suggest

ExperimentName = Literal[
    "sft", "dpo_base", "dpo", "ppo", "mpo", "mpo_sft_kl", "mpo_reverse", "mpo_reverse_sft",
    "dpo_easy", "dpo_hard", "ppo_easy", "ppo_hard",
]  # fmt: skip


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


class Section(BaseModel, frozen=True):
    """A part of the configuration: immutable, hashable, defaults checked like given values, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ArchitectureConfig(Section, frozen=True):
    """Sizes of a Llama trained from scratch; a checkpoint brings its own. `vocab_size` follows the tokenizer."""

    hidden_size: int = Field(default=64, gt=0)
    intermediate_size: int = Field(default=172, gt=0)
    num_layers: int = Field(default=2, gt=0)
    num_heads: int = Field(default=4, gt=0)
    num_kv_heads: int = Field(default=4, gt=0)
    head_dim: int = Field(default=16, gt=0)
    max_positions: int = Field(default=512, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    norm_eps: float = Field(default=1e-5, gt=0)
    tie_embeddings: bool = True
    init_std: float = Field(default=0.02, gt=0)


class ModelConfig(Section, frozen=True):
    """Which base model, and how its arithmetic runs."""

    path: str | None = Field(
        default=None,
        description="base model: Hugging Face folder, .gguf file or hub id (org/name, org/name@revision); "
        "absent: trained from scratch",
    )
    architecture: ArchitectureConfig = Field(default_factory=lambda: ArchitectureConfig())
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: float32 on CPU only"
    )
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="storage of reference and reward model; auto: as compute_dtype"
    )
    remat: Literal["none", "dots", "full"] = Field(default="dots", description="what the backward pass computes again")
    attention: Literal["auto", "blocked", "xla", "cudnn"] = Field(
        default="auto", description="over whole rows; auto: blocked, which skips what the layout hides"
    )
    logit_chunk: int = Field(default=1024, gt=0, description="tokens a device whose logits exist at one time")


class TextConfig(Section, frozen=True):
    """Token limits and joins. A prompt is cut before a response; see ALGORITHMS in mpo_jax/README.md."""

    max_prompt_tokens: int = Field(default=512, gt=0)
    max_response_tokens: int = Field(default=512, gt=0)
    add_bos: Literal["auto", "true", "false"] = "auto"
    prompt_template: str = Field(default="{prompt}", description="text around every prompt; must hold {prompt}")
    chat: bool = Field(default=False, description="prompts as turns in the tokenizer's chat template")
    truncation: Literal["auto", "start", "post"] = Field(
        default="auto",
        description="where too long a prompt is cut: its start, or the end of its POST section; auto: the POST section "
        "where there is one",
    )
    length_buckets: int = Field(
        default=4, gt=0, le=16, description="widths that batches are padded to, at most; 1: all to the longest row"
    )

    @field_validator("add_bos", mode="before")
    @classmethod
    def _yaml_bool(cls, value: Any) -> Any:
        return str(value).lower() if isinstance(value, bool) else value

    @field_validator("prompt_template")
    @classmethod
    def _has_slot(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError("must hold {prompt} exactly once")
        return value


class ToyConfig(Section, frozen=True):
    """The toy TL;DR world; every number of its utility is documented in data/toy.py."""

    seed: int = Field(default=0, description="of the world's posts and labels, apart from the training seed")
    num_demonstrations: int = Field(default=4000, gt=0)
    num_pairs: int = Field(default=3000, gt=0)
    num_test: int = Field(default=400, gt=0)
    num_values: int = Field(default=12, ge=2, le=16, description="different values of each fact: the vocabulary's size")
    num_attempts: int = Field(
        default=2, ge=1, le=4, description="attempts a post, each a fact besides who, problem, question"
    )
    num_fillers: int = Field(default=1, ge=0, le=3, description="sentences without a fact")
    label_temperature: float = Field(default=1.0, gt=0, description="of the Bradley-Terry labels: higher is noisier")


class DataConfig(Section, frozen=True):
    """Where rows come from.

    A path is a .jsonl, .jsonl.gz or .parquet file, a folder that `datasets` saved, or
    hub:ORG/NAME[@REVISION][:DIR][:SPLIT].
    """

    kind: Literal["toy", "hh", "tldr", "pairs"] = "toy"
    path: tuple[str, ...] = Field(default=(), description="preference rows: training and, by split, validation")
    sft_path: tuple[str, ...] = Field(default=(), description="demonstrations; absent: the chosen responses")
    test_path: tuple[str, ...] = Field(
        default=(), description="preference rows that reward accuracy is measured on; absent: validation"
    )
    prompt_path: tuple[str, ...] = Field(
        default=(), description="prompt-only rows for selection and PPO; absent: the prompts of the training pairs"
    )
    test_prompt_path: tuple[str, ...] = Field(
        default=(),
        description="rows of any kind whose prompts policies are evaluated on; absent: the held-out pairs' prompts",
    )
    prompts: Literal["rows", "unique"] = Field(
        default="rows",
        description="selection and PPO sample once a row of the preference data (or of prompt_path), as the paper; "
        "unique: once a distinct prompt",
    )
    filter: Literal["strict", "none"] = "strict"
    keep_news: bool = Field(default=False, description="of tldr: keep the comparisons on news articles, without a post")
    validation_fraction: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="of the prompts, whose pairs the reward model does not train on; without a test set nothing does",
    )
    max_rows: int | None = Field(default=None, gt=0, description="the first rows of each file only")
    toy: ToyConfig = Field(default_factory=lambda: ToyConfig())

    @field_validator("path", "sft_path", "test_path", "prompt_path", "test_prompt_path", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def has_test_set(self) -> bool:
        """Whether there are rows apart to test on, so that validation rows are left out of the reward model alone."""
        return self.kind == "toy" or bool(self.test_path) or bool(self.test_prompt_path)

    @property
    def has_test_prompts(self) -> bool:
        """Whether there are prompts to evaluate policies on."""
        return self.has_test_set or self.validation_fraction > 0

    @property
    def holds_out(self) -> bool:
        """Whether there are preference rows that nothing trains on."""
        return self.kind == "toy" or bool(self.test_path) or (self.validation_fraction > 0 and not self.has_test_set)

    @model_validator(mode="after")
    def _needs_path(self) -> "DataConfig":
        given = [name for name in type(self).model_fields if name.endswith("path") and getattr(self, name)]
        if self.kind == "toy" and given:
            raise ValueError(f"data.{given[0]} names files: say how to read them, data.kind=hh, tldr or pairs")
        if self.kind != "toy" and not self.path:
            raise ValueError(f"data.kind={self.kind} needs data.path: name one or more files, folders or hub data sets")
        return self


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
    top_p: float = 1.0
    top_k: int = 0
    one_pass: bool = Field(
        default=False,
        description="an iteration's only update differentiates the forward pass that scores its rollouts; no effect "
        "with several updates an iteration, critic_warmup, ptx_coef, score=normalised, or whitening with accumulation",
    )
    extras: PpoExtrasConfig = Field(default_factory=lambda: PpoExtrasConfig())

    @model_validator(mode="after")
    def _samples_what_it_scores(self) -> "PpoConfig":
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                "ppo needs top_p=1 and top_k=0: a truncated sampler draws from another distribution than the one whose "
                "log-probabilities PPO uses, so ratios and KL would be wrong (KL even negative)"
            )
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


class MeshConfig(Section, frozen=True):
    """Devices along each axis of the mesh; their product is the number of devices used."""

    data: int = Field(default=1, gt=0)
    fsdp: int = Field(default=1, gt=0)
    tensor: int = Field(default=1, gt=0)

    @property
    def num_devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def batch_shards(self) -> int:
        return self.data * self.fsdp


class ProcessesConfig(Section, frozen=True):
    """Several processes, one a host. Found by itself under SLURM, Open MPI, Kubernetes jobs and TPU pods."""

    coordinator: str | None = Field(default=None, description="host:port of process 0")
    count: int | None = Field(default=None, gt=0)
    index: int | None = Field(default=None, ge=0)
    timeout_s: int = Field(default=100, gt=0, description="seconds without a sign of life after which the others stop")


class WandbConfig(Section, frozen=True):
    """Weights & Biases (the extra `wandb`). Its key is WANDB_API_KEY or that of `wandb login`: it has no place here."""

    project: str = Field(default="mpo_jax", pattern=r"^[^/\\#?%:]{1,128}$")
    entity: str | None = Field(default=None, min_length=1, description="user or team; null: the account's own default")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        default=None,
        description="offline: runs stay in workdir/wandb, for `wandb sync`; null: what WANDB_MODE says, else online",
    )


class RuntimeConfig(Section, frozen=True):
    """The machine, not the method: nothing here changes results beyond rounding or enters an artifact's hash."""

    cpu_devices: int | None = Field(default=None, gt=0, description="simulated CPU devices; null: what the machine has")
    compilation_cache: str | None = Field(default="~/.cache/mpo_jax/xla", description="folder; null: none")
    flags: Literal["none", "recommended"] = Field(
        default="none",
        description="compiler flags: none beyond XLA_FLAGS and LIBTPU_INIT_ARGS, or those of flags.py too",
    )
    processes: ProcessesConfig = Field(default_factory=lambda: ProcessesConfig())
    token_cache: str | None = Field(default="~/.cache/mpo_jax/tokens", description="folder; null: none")
    tensorboard: bool = True
    wandb: WandbConfig | None = Field(default=None, description="{project, entity, mode}; null: no Weights & Biases")
    offload_frozen: bool = Field(
        default=False, description="PPO's reference and reward model lie in host memory but while they score"
    )
    offload_moments: bool = Field(
        default=False, description="PPO's optimiser moments lie in host memory but for their own model's update"
    )
    keep_checkpoints: bool = Field(
        default=False, description="a finished stage keeps its last checkpoints, for mpo verify; false: its model alone"
    )
    bucket: str | None = Field(
        default=None,
        pattern=r"^(gs|s3|file)://.+",
        description="gs://, s3:// or file:// folder that keeps what workdir holds, for other hosts and after this one",
    )

    @model_validator(mode="after")
    def _one_place_for_checkpoints(self) -> "RuntimeConfig":
        if self.keep_checkpoints and self.bucket is not None:
            raise ValueError("keep_checkpoints=true keeps them in workdir, and bucket takes them from there: set one")
        return self

    @property
    def token_cache_folder(self) -> Path | None:
        return None if self.token_cache is None else Path(self.token_cache).expanduser()


class Config(Section, frozen=True):
    """Everything a run depends on."""

    workdir: str = "runs/default"
    seed: int = Field(default=0, ge=0, lt=2**31)
    experiment: tuple[ExperimentName, ...] = ("mpo",)
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    text: TextConfig = Field(default_factory=lambda: TextConfig())
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    sft: SftConfig = Field(default_factory=lambda: SftConfig())
    reward: RewardConfig = Field(default_factory=lambda: RewardConfig())
    select: SelectConfig = Field(default_factory=lambda: SelectConfig())
    dpo: DpoConfig = Field(default_factory=lambda: DpoConfig())
    ppo: PpoConfig = Field(default_factory=lambda: PpoConfig())
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig())
    table: TableConfig = Field(default_factory=lambda: TableConfig())
    mesh: MeshConfig = Field(default_factory=lambda: MeshConfig())
    runtime: RuntimeConfig = Field(default_factory=lambda: RuntimeConfig())

    @field_validator("experiment", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _can_measure(self) -> "Config":
        data = self.data
        measurable = {
            "sft": data.holds_out,
            "reward": data.holds_out or data.validation_fraction > 0,
            "dpo": data.holds_out,
            "ppo": data.has_test_prompts,
        }
        for stage in TRAINED:
            train: TrainConfig = getattr(self, stage).train
            if train.eval_every is not None and not measurable[stage]:
                raise ValueError(
                    f"{stage}.train.eval_every={train.eval_every} needs held-out rows: name preference rows as "
                    "data.test_path, or raise data.validation_fraction above 0"
                )
            if train.best_metric is None or not train.best_metric.startswith(EVAL):
                continue
            if train.eval_every is None:
                raise ValueError(
                    f"{stage}.train.best_metric={train.best_metric} is measured on held-out rows: set "
                    f"{stage}.train.eval_every, the updates between two measures"
                )
            known = [EVAL + name for name in MEASURES[stage] if name != "loss/nll" or self.dpo.nll_coef]
            if train.best_metric not in known:
                raise ValueError(
                    f"{stage}.train.best_metric={train.best_metric} is no measure of {stage}"
                    f"{suggest(train.best_metric, known)}"
                )
        return self
