"""PPO's settings: the method, which decides its compiled programs, and how long and on what it trains."""

from typing import Literal

from mpo_jax.config.schema import Config, KlConfig, OptimConfig, PpoConfig, PpoExtrasConfig, Section, TextConfig
from mpo_jax.models.generate import Sampling
from mpo_jax.stages.settings import Numerics, Split, TrainSettings


class Method(Section, frozen=True):
    """All that decides what an iteration computes; compiled programs are kept by it, whatever a run's length."""

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
        """Updates of each model in an iteration."""
        return self.epochs * self.minibatches

    @property
    def in_one_pass(self) -> bool:
        """Whether an iteration's only update takes its old log-probabilities and values from its own forward pass.

        Not where a statistic of the whole batch stands between scores and losses of micro-batches, where scores are
        normalised, where there are further losses, or where the actor waits. Not unless asked for: a forward pass that
        is differentiated is compiled otherwise than the reference's, so that the first KL is 0 to rounding in place of
        exactly.
        """
        extras, single = self.extras, self.one_pass and self.updates == 1
        whitens = (extras.whiten_advantages or extras.whiten_rewards) and self.accumulation > 1
        return single and not (whitens or self.score == "normalised" or extras.ptx_coef or extras.critic_warmup)


class Settings(Section, frozen=True):
    """What policy and critic depend on, besides the models, prompts and rows that they read.

    Attributes:
      samples_once: whether each distinct prompt of a selection is sampled once, whatever the number of its rows.
    """

    seed: int
    text: TextConfig
    numerics: Numerics
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
            split=split,
            samples_once=config.data.prompts == "unique",
            method=Method.of(config.ppo),
            train=TrainSettings.of(config.ppo.train),
        )

    @property
    def sampling(self) -> Sampling:
        """One sample a prompt, from the very distribution whose log-probabilities the update uses."""
        method = self.method
        return Sampling(self.text.max_response_tokens, temperature=method.temperature, greedy=method.greedy)
