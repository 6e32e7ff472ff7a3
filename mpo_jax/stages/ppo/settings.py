"""PPO's settings: the method, which determines the compiled programs, and the length and data of training."""

from typing import Literal

from mpo_jax.config.schema import Config, KlConfig, OptimConfig, PpoConfig, PpoExtrasConfig, Section, TextConfig
from mpo_jax.models.generate import Sampling
from mpo_jax.runtime import machine
from mpo_jax.stages.settings import Adapting, Numerics, Split, TrainSettings, adapter_of


class Method(Section, frozen=True):
    """Everything that determines an iteration's computation, independent of run length; keys the compiled programs."""

    epochs: int
    minibatches: int
    kl: KlConfig
    gamma: float
    gae_lambda: float
    clip_eps: float
    value_clip_eps: float
    score: Literal["raw", "normalised"]
    score_clip: float
    reward_at: Literal["last_valid", "ds_chat"]
    greedy: bool
    temperature: float
    one_pass: bool
    extras: PpoExtrasConfig
    accumulation: int
    actor_optim: OptimConfig
    critic_optim: OptimConfig

    @classmethod
    def of(cls, config: PpoConfig) -> "Method":
        shared = {name: getattr(config, name) for name in cls.model_fields.keys() & type(config).model_fields.keys()}
        return cls(**shared, accumulation=config.train.accumulation, actor_optim=config.train.optim)

    @property
    def updates(self) -> int:
        """Number of updates of each model per iteration."""
        return self.epochs * self.minibatches

    @property
    def whitens(self) -> bool:
        """Whether losses need a statistic of the whole batch."""
        return self.extras.whiten_advantages or self.extras.whiten_rewards

    @property
    def in_one_pass(self) -> bool:
        """Whether an iteration's only update takes its old log-probabilities and values from its own forward pass.

        Requires `one_pass` and a single update. Not possible if micro-batch losses need a whole-batch statistic
        (whitening), if scores are normalised, with the demonstrations' loss, or with a critic warm-up. Off by default:
        a differentiated forward pass compiles differently from the reference's, so the first KL is 0 only up to
        rounding instead of exactly.
        """
        extras, single = self.extras, self.one_pass and self.updates == 1
        whitens = self.whitens and self.accumulation > 1
        return single and not (whitens or self.score == "normalised" or extras.ptx_coef or extras.critic_warmup)


class Settings(Section, frozen=True):
    """Everything policy and critic depend on, besides the models, prompts and rows that the stage reads.

    Attributes:
      samples_once: whether each distinct prompt of a selection is sampled once, however many rows it has.
      save_dtype: type in which policy and critic are saved.
      save_critic: whether the critic is saved.
    """

    seed: int
    text: TextConfig
    numerics: Numerics
    adapter: Adapting = None
    save_dtype: str
    save_critic: bool
    split: Split
    samples_once: bool
    method: Method
    train: TrainSettings

    @classmethod
    def of(cls, config: Config, split: Split) -> "Settings":
        return cls(
            seed=config.seed,
            text=config.text,
            numerics=Numerics.of(config.model),
            adapter=adapter_of("ppo", config),
            save_dtype=machine.save_dtype(config.runtime),
            save_critic=config.ppo.save_critic,
            split=split,
            samples_once=config.data.prompts == "unique",
            method=Method.of(config.ppo),
            train=TrainSettings.of(config.ppo.train),
        )

    @property
    def update(self) -> TrainSettings:
        """`train` with the rows of one update as its batch."""
        return self.train.model_copy(update={"batch_size": self.train.batch_size // self.method.minibatches})

    @property
    def packed(self) -> bool:
        """Whether scoring and updates read packed rows.

        Demonstrations are cut into micro-batches as padded rollouts are, and an update in one pass that whitens needs
        the whole batch at a time.
        """
        method = self.method
        return self.text.packed and not (method.extras.ptx_coef or (method.in_one_pass and method.whitens))

    @property
    def sampling(self) -> Sampling:
        """One sample per prompt, from the same distribution whose log-probabilities the update uses."""
        method = self.method
        return Sampling(self.text.max_response_tokens, temperature=method.temperature, greedy=method.greedy)
