"""PPO as a library: the stage's rollout, scoring and updates, one iteration at a time."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpo_jax.config.schema import PpoConfig
from mpo_jax.config.suggestion import suggest
from mpo_jax.data.batches import Batch
from mpo_jax.errors import UserError
from mpo_jax.models.generate import Sampling, make_generate
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import place_batch, replicated
from mpo_jax.stages.ppo.compiled import make_score, named
from mpo_jax.stages.ppo.layout import make_narrow
from mpo_jax.stages.ppo.objective import actor_objective, critic_objective
from mpo_jax.stages.ppo.settings import Method
from mpo_jax.tools.api.arguments import checked
from mpo_jax.tools.api.models import LoadedModel, check_rows, check_same_tokens
from mpo_jax.tools.api.trainers import Measures, check_trains
from mpo_jax.training.update import init_state, jit_update
from mpo_jax.types import Params, PpoBatch, PromptBatch, merge, trainable

OPTIONS = ("score_clip", "reward_at", "greedy")
EXTRAS = ("whiten_advantages", "whiten_rewards", "missing_eos", "missing_eos_penalty")
"""Further keys of the sections `ppo` and `ppo.extras`: those that an iteration here honours."""


class Ppo:
    """Proximal policy optimisation on prompts, with a KL penalty to a reference. arXiv:1707.06347.

    Args:
      policy: model to train; it is not modified, and `ppo.policy` is the trained copy.
      reward: reward model that scores the samples and initialises the critic.
      optimizer: optimizer of the policy.
      critic_optimizer: optimizer of the critic; None: the same as the policy's.
      reference: reference of the KL penalty; None: the initial policy.
      kl_coef: weight of the per-token KL in the reward.
      epochs: number of updates per iteration on its samples.
      max_new_tokens: maximum response length; None: the policy's `text.max_response_tokens`.
      seed: random seed; a sample depends only on prompt, seed and visit.
      options: score_clip, reward_at, greedy, whiten_advantages, whiten_rewards, missing_eos and missing_eos_penalty, as
        the keys of the sections `ppo` and `ppo.extras` (configs/README.md).
    """

    def __init__(
        self,
        policy: LoadedModel,
        reward: LoadedModel,
        *,
        optimizer: optax.GradientTransformation,
        critic_optimizer: optax.GradientTransformation | None = None,
        reference: LoadedModel | None = None,
        kl_coef: float = 0.4,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip_eps: float = 0.2,
        value_clip_eps: float = 0.2,
        temperature: float = 1.0,
        epochs: int = 1,
        accumulation: int = 1,
        max_new_tokens: int | None = None,
        seed: int = 0,
        **options: Any,
    ):
        policy.check_head("lm", "policy")
        reward.check_head("value", "reward")
        (reference or policy).check_head("lm", "reference")
        check_trains(policy)
        check_same_tokens(policy.tokenizer, reward.tokenizer, "policy and reward model")
        if policy.mesh != reward.mesh:
            raise UserError("policy and reward model lie on different meshes: load both with the same mesh")
        if unknown := options.keys() - {*OPTIONS, *EXTRAS}:
            name = sorted(unknown)[0]
            raise UserError(f"Ppo has no option {name}{suggest(name, [*OPTIONS, *EXTRAS])}")
        config = checked(PpoConfig, {
            **{name: value for name, value in options.items() if name in OPTIONS},
            "extras": {name: value for name, value in options.items() if name in EXTRAS},
            "kl": {"coef": kl_coef}, "gamma": gamma, "gae_lambda": gae_lambda, "clip_eps": clip_eps,
            "value_clip_eps": value_clip_eps, "temperature": temperature, "epochs": epochs,
            "train": {"batch_size": accumulation, "accumulation": accumulation},
        })  # fmt: skip
        self.method, mesh = Method.of(config), policy.mesh
        self._start, self._reference, self._reward = policy, reference or policy, reward
        codec = policy.codec
        self._new_tokens = max_new_tokens or policy.text.max_response_tokens
        sampling = Sampling(self._new_tokens, temperature=temperature, greedy=config.greedy)
        update = partial(jit_update, mesh=mesh, accumulation=accumulation)
        with jax.set_mesh(mesh):
            # master parameters are float32, whatever type the reward model is stored in
            critic = trainable(jax.tree.map(lambda x: x.astype(jnp.float32), merge(reward.params)))
            self.actor = init_state(policy.params, optimizer, mesh)
            self.critic = init_state(critic, critic_optimizer or optimizer, mesh)
            self.generate = make_generate(policy.model, sampling, codec.ends, mesh)
            self._narrow = make_narrow(self.method, mesh)
            self.score = make_score(policy.model, reward.model, self.method, mesh)
            self._update_actor = update(
                partial(actor_objective, policy.model, self.method), optimizer, self.actor.trainable
            )
            self._update_critic = update(
                partial(critic_objective, reward.model, self.method),
                critic_optimizer or optimizer,
                self.critic.trainable,
            )
            self._kl_coef = jax.device_put(jnp.asarray(kl_coef, jnp.float32), replicated(mesh))
        self._allowed_V = jnp.asarray(codec.allowed(policy.model.decoder.vocab_size))
        self._key = stage_key(seed, "ppo")

    def step(self, batch: Batch | PromptBatch) -> Measures:
        """Runs one iteration: sampling, scoring, and `epochs` updates of critic and policy."""
        with jax.set_mesh(self._start.mesh):
            samples, metrics = self.rollout(batch)
            for _ in range(self.method.epochs):
                metrics = {**metrics, **self.update(samples)}
        return Measures(metrics)

    def rollout(self, batch: Batch | PromptBatch) -> tuple[PpoBatch, Any]:
        """Draws one sample per prompt; returns it with advantages and returns, and the rollout metrics."""
        rows, visit = (batch.rows, batch.epoch) if isinstance(batch, Batch) else (batch, None)
        visit = np.zeros(len(rows.prompt_len), np.uint32) if visit is None else visit
        mesh = self._start.mesh
        check_rows(rows, self._start, num_responses=0, new_tokens=self._new_tokens)
        with jax.set_mesh(mesh):
            rows, visit = place_batch((rows, visit), mesh)
            joined, has_eos = self.generate(self.params, rows, self._key, visit, self._allowed_V)
            joined = self._narrow(joined)
            policies = self.params, self._reference.params
            value_models = trainable(self.critic.trainable), self._reward.params
            samples, metrics, _ = self.score(policies, value_models, joined, has_eos, self._allowed_V, self._kl_coef)
        return samples, metrics

    def update(self, samples: PpoBatch) -> Any:
        """Updates critic and policy once on scored samples; returns their metrics."""
        with jax.set_mesh(self._start.mesh):
            self.critic, critic = self._update_critic(self.critic, samples, {})
            frozen = self._start.params["frozen"]
            self.actor, actor = self._update_actor(self.actor, (samples, None), frozen, self._allowed_V)
        return named("critic", critic) | named("policy", actor)

    @property
    def params(self) -> Params:
        """The trained policy's parameters; the next step donates their memory, so save or copy them first."""
        return {"trainable": self.actor.trainable, "frozen": self._start.params["frozen"]}

    @property
    def policy(self) -> LoadedModel:
        """The trained policy; like `params`, valid until the next step."""
        return self._start.with_params(self.params)
