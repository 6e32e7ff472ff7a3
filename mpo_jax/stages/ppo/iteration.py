"""One PPO iteration: sample from the actor; cut the columns that no response reaches; score, and recompute
log-probabilities and values with the training forward pass; shape rewards; estimate advantages; update on minibatches.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mpo_jax.data.batches import Batch, TrainBatches
from mpo_jax.data.packing import Packing
from mpo_jax.data.text import TextCodec
from mpo_jax.evaluation.truth import Truth, make_rollout_utility
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import make_generate
from mpo_jax.ops import adaptive_kl_coef
from mpo_jax.runtime import device_kinds
from mpo_jax.runtime.offload import Offload, to_devices
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import place_batch, replicated
from mpo_jax.stages.ppo.compiled import (
    average,
    make_minibatch,
    make_one_pass,
    make_order,
    make_score,
    make_scored,
    make_unscored,
    make_updates,
    named,
)
from mpo_jax.stages.ppo.layout import Samples, make_lay_out
from mpo_jax.stages.ppo.settings import Method, Settings
from mpo_jax.stages.ppo.work import make_at_peak
from mpo_jax.stages.scorer import TextScorer
from mpo_jax.training.optimizer import make_learning_rate, make_optimizer, with_learning_rate
from mpo_jax.training.tracker import PEAK_S
from mpo_jax.training.update import init_state
from mpo_jax.types import Mean, Metrics, Moments, Packed, Params, PpoBatch, PromptBatch, Skips, TrainState, Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PpoState:
    """Everything that changes during PPO.

    Attributes:
      actor, critic: training states of the two models.
      kl_coef: coefficient of the KL penalty.
      ema: moving average of the actor's trainable part, if one is kept.
      scores: running moments of the raw scores, if scores are normalised.
    """

    actor: TrainState
    critic: TrainState
    kl_coef: Float[Array, ""]
    ema: Tree | None = None
    scores: Moments | None = None


@dataclasses.dataclass(frozen=True)
class Models:
    """The four models of an iteration, except the trainable parts of actor and critic, which are in the state.

    Attributes:
      actor, critic: sizes and arithmetic, also those of the reference and of a reward model of the policy's tokens.
      actor_frozen, critic_frozen: frozen parts of the models that train; the critic's may rest in host memory.
      reference, reward: parameters of the models that do not train, without those that they share with the frozen part
        of actor or critic; none of a reward model that reads text.
    """

    actor: Model
    critic: Model
    actor_frozen: Tree
    critic_frozen: Tree
    reference: Params
    reward: Params

    def policies(self, trainable: Tree) -> tuple[Params, Params]:
        """Parameters of a policy and of the reference, on the devices."""
        return {"trainable": trainable, "frozen": self.actor_frozen}, to_devices(self.reference)

    def value_models(self, trainable: Tree) -> tuple[Params, Params]:
        """Parameters of the critic and of the reward model, on the devices."""
        return {"trainable": trainable, "frozen": to_devices(self.critic_frozen)}, to_devices(self.reward)

    def after_sampling(self) -> "Models":
        """The same with the critic's frozen part on the devices, where scoring and updates read it."""
        return dataclasses.replace(self, critic_frozen=to_devices(self.critic_frozen))


def init_ppo_state(
    method: Method, actor: Params, critic: Params, mesh: Mesh, offload: Offload, *, donate: bool = False
) -> PpoState:
    """The state before the first iteration.

    Args:
      donate: whether it takes over the memory of both trainable parts; otherwise they are copied.
    """

    def number(value: float) -> Array:
        return jax.device_put(jnp.asarray(value, jnp.float32), replicated(mesh))

    init = partial(init_state, mesh=mesh, donate=donate)
    # offloaded before the critic's moments are made
    policy = offload.state(init(actor, make_optimizer(method.actor_optim)))
    return PpoState(
        actor=policy,
        critic=offload.state(init(critic, make_optimizer(method.critic_optim))),
        kl_coef=number(method.kl.coef),
        ema=jax.tree.map(jnp.copy, policy.trainable) if method.extras.ema_decay is not None else None,
        scores=Moments(number(0.0), number(0.0), number(0.0)) if method.score == "normalised" else None,
    )


@dataclasses.dataclass
class Loop:
    """The compiled parts of an iteration and the frozen models they read.

    Attributes:
      iterations: number of iterations of the whole training, for the learning-rate schedules.
      log_every: number of iterations between timed ones; timing makes the host wait for the devices.
      truth: true utility of samples, if known.
      scorer: what scores responses as text, in place of a reward model of the policy's tokens.
      packing: shape of the rows that scoring and updates read; None: they are padded.
    """

    settings: Settings
    mesh: Mesh
    codec: TextCodec
    models: Models
    offload: Offload
    iterations: int
    log_every: int
    truth: Truth | None = None
    scorer: TextScorer | None = None
    packing: Packing | None = None

    def __post_init__(self) -> None:
        method, models, mesh = self.settings.method, self.models, self.mesh
        self.generate = make_generate(models.actor, self.settings.sampling, self.codec.ends, mesh)
        self.lay_out = make_lay_out(method, self.packing, mesh)
        self._score = make_score(models.actor, models.critic, method, mesh)
        self._unscored = make_unscored(models.actor, models.critic, method, mesh)
        self._scored = make_scored(method, mesh)
        updates = make_updates(models.actor, models.critic, method, mesh)
        self.update_actor, self.update_critic = map(self.offload.update, updates)
        self.one_pass = make_one_pass(models.actor, models.critic, method, mesh) if method.in_one_pass else None
        self.allowed_V = jnp.asarray(self.codec.allowed(models.actor.decoder.vocab_size))
        self.utility = make_rollout_utility(self.truth, self.codec)
        self.key = stage_key(self.settings.seed, "ppo")
        self.minibatch = make_minibatch(mesh)
        self.minibatch_key = stage_key(self.settings.seed, "ppo minibatches")
        peak = device_kinds.peak_flops(mesh.devices.flat)
        scores = self.scorer is None
        self._at_peak = None if peak is None else make_at_peak(models.actor, models.critic, peak, mesh, scores=scores)
        # each schedule counts its own model's updates: the actor's starts after the critic's warm-up
        own_iterations = max(self.iterations - method.extras.critic_warmup, 0)
        self.actor_rate = make_learning_rate(method.actor_optim, own_iterations * method.updates)
        self.critic_rate = make_learning_rate(method.critic_optim, self.iterations * method.updates)

    def score(
        self,
        models: Models,
        trainable: Tree,
        state: PpoState,
        samples: Samples,
        has_eos: Array,
        prompts: Sequence[str | None],
    ) -> tuple[PpoBatch, Metrics, Moments | None]:
        """Scored samples, metrics, and moments of the scores.

        Args:
          trainable: the policy's trainable part: the actor's, or its average's.
          prompts: [B] prompts of the corpus, for a scorer of texts; None for padding rows.
        """
        policies, (joined, packed, _) = models.policies(trainable), samples
        rows = (joined, has_eos, self.allowed_V)
        if self.scorer is None:
            value_models = models.value_models(state.critic.trainable)
            return self._score(policies, value_models, *rows, state.kl_coef, state.scores, packed)
        critic, _ = models.value_models(state.critic.trainable)
        # the devices compute it while the host decodes and tokenizes
        rollout, entropy = self._unscored(policies, critic, *rows, packed)
        score, measured = self.scorer.batch(prompts, joined)
        scored, metrics, moments = self._scored(rollout, entropy, score, state.kl_coef, state.scores, packed)
        return scored, {**metrics, **measured}, moments

    def iteration(
        self,
        state: PpoState,
        batch: Batch,
        demonstrations: TrainBatches | None,
        prompts: Sequence[str | None] = (),
    ) -> tuple[PpoState, Metrics, Any]:
        """Runs one PPO iteration on a batch of prompts; also returns the scored rollouts and the demonstrations.

        Args:
          prompts: as for `score`.
        """
        method, k = self.settings.method, batch.number
        clock = _Clock(on=(k + 1) % self.log_every == 0)
        rows, epoch = place_batch((batch.rows, batch.epoch), self.mesh)
        actor = {"trainable": state.actor.trainable, "frozen": self.models.actor_frozen}
        with clock.timing("rollout") as wait:
            joined, has_eos = wait(self.generate(actor, rows, self.key, epoch, self.allowed_V))
            samples = self.lay_out(joined)
        models = self.models.after_sampling()
        shown = place_batch(demonstrations[k].rows, self.mesh) if demonstrations is not None else None
        if self.one_pass is not None:
            with clock.timing("update") as wait:
                state, scored, metrics = wait(self._in_one_pass(models, state, k, samples, has_eos, prompts))
        else:
            with clock.timing("score") as wait:
                scored, metrics, scores = wait(
                    self.score(models, state.actor.trainable, state, samples, has_eos, prompts)
                )
                state = dataclasses.replace(state, scores=scores)
            with clock.timing("update") as wait:
                state, update_metrics = wait(self._updates(models, state, k, (scored, shown), samples))
            metrics |= update_metrics
        kl_coef = state.kl_coef
        if method.kl.adaptive:
            adapted = adaptive_kl_coef(
                kl_coef,
                metrics["objective/kl"].value,
                target=method.kl.target,
                horizon=method.kl.horizon,
                num_samples=len(batch.example),
            )
            # as for the models, a non-finite batch changes nothing
            kl_coef = jnp.where(jnp.isfinite(adapted), adapted, kl_coef)
        ema = state.ema
        if ema is not None:
            ema = average(ema, state.actor.trainable, method.extras.ema_decay)
        state = dataclasses.replace(state, kl_coef=kl_coef, ema=ema)
        metrics = {**metrics, **clock.seconds, **self.utility(joined)}
        return state, metrics, {"samples": joined, "rollouts": scored, "shown": shown}

    def _in_one_pass(
        self,
        models: Models,
        state: PpoState,
        k: int,
        samples: Samples,
        has_eos: Array,
        prompts: Sequence[str | None],
    ) -> tuple[PpoState, PpoBatch, Metrics]:
        """Scores and updates in one pass: the update differentiates the forward pass that scores."""
        joined, packed, _ = samples
        score, measured = (None, {}) if self.scorer is None else self.scorer.batch(prompts, joined)
        actor, critic, frozen = to_devices((state.actor, state.critic, (models.reference, models.reward)))
        actor = with_learning_rate(actor, self.actor_rate(k))
        critic = with_learning_rate(critic, self.critic_rate(k))
        rest = models.actor_frozen, models.critic_frozen
        assert self.one_pass is not None
        actor, critic, scored, metrics = self.one_pass(
            actor, critic, rest, frozen, joined, has_eos, self.allowed_V, state.kl_coef, score, packed
        )
        state = dataclasses.replace(state, actor=self.offload.state(actor), critic=self.offload.state(critic))
        return state, scored, {**metrics, **measured, **self._work(scored, actor_updates=1, critic_updates=1)}

    def _updates(
        self,
        models: Models,
        state: PpoState,
        k: int,
        batch: tuple[PpoBatch, PromptBatch | None],
        samples: Samples,
    ) -> tuple[PpoState, Metrics]:
        """Runs all updates on one iteration's rollouts."""
        method = self.settings.method
        collected: list[Metrics] = []
        actor, critic = state.actor, state.critic
        own_k = k - method.extras.critic_warmup
        for number, part in enumerate(self._parts(k, batch, samples)):
            critic = with_learning_rate(critic, self.critic_rate(k * method.updates + number))
            critic, metrics = self.update_critic(critic, part[0], models.critic_frozen)
            metrics = named("critic", metrics)
            if own_k >= 0:
                actor = with_learning_rate(actor, self.actor_rate(own_k * method.updates + number))
                actor, actor_metrics = self.update_actor(actor, part, models.actor_frozen, self.allowed_V)
                metrics |= named("policy", actor_metrics)
            collected.append(metrics)
            if method.kl.stop is not None and _exceeds(metrics.get("policy/approxkl_avg"), method.kl.stop):
                break
        metrics = _mean_of(collected) | self._work(
            batch[0], actor_updates=len(collected) if own_k >= 0 else 0, critic_updates=len(collected)
        )
        return dataclasses.replace(state, actor=actor, critic=critic), metrics

    def _parts(
        self, k: int, batch: tuple[PpoBatch, PromptBatch | None], samples: Samples
    ) -> Iterator[tuple[PpoBatch, PromptBatch | None]]:
        """What each update of iteration k learns from: the whole batch, or a minibatch."""
        method = self.settings.method
        if method.minibatches == 1:
            for _ in range(method.epochs):
                yield _with_packed(batch, samples.packed)
            return
        draw = make_order(len(jax.tree.leaves(batch)[0]), method.minibatches, self.mesh)
        orders = [np.asarray(draw(self.minibatch_key, k, epoch)) for epoch in range(method.epochs)]
        for rows in itertools.chain(*orders):
            yield _with_packed(self.minibatch(batch, rows), None if samples.pack is None else samples.pack(rows))

    def _work(self, batch: PpoBatch, *, actor_updates: int, critic_updates: int) -> Metrics:
        """What `perf/mfu` of an iteration with these updates is made of; nothing where the devices' peak is unknown."""
        if self._at_peak is None:
            return {}
        epochs = (updates / self.settings.method.minibatches for updates in (actor_updates, critic_updates))
        joined = batch.rollout.joined
        return {PEAK_S: self._at_peak(joined.prompt_len, joined.response_len, *epochs)}


def _with_packed(
    batch: tuple[PpoBatch, PromptBatch | None], packed: Packed | None
) -> tuple[PpoBatch, PromptBatch | None]:
    return batch if packed is None else (dataclasses.replace(batch[0], packed=packed), batch[1])


def _exceeds(mean: Mean | None, limit: float) -> bool:
    """Whether a metric exceeds a limit; the only wait for the device within an iteration, for early stopping."""
    return mean is not None and float(mean.value) > limit


def _mean_of(collected: list[Metrics]) -> Metrics:
    """Combines the metrics of an iteration's updates: adds means and skips, averages scalars."""
    totals: Metrics = {}
    for metrics in collected:
        for name, value in metrics.items():
            totals[name] = totals[name] + value if name in totals else value
    return {name: m if isinstance(m, Mean | Skips) else m / len(collected) for name, m in totals.items()}


@dataclasses.dataclass
class _Clock:
    """Times the parts of an iteration, in seconds, as metrics."""

    on: bool
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[Callable[[Any], Any]]:
        """Yields a function to pass the part's results through; if the part is timed, it waits for them."""
        begin = time.perf_counter()
        yield jax.block_until_ready if self.on else lambda x: x
        if self.on:
            self.seconds[f"timing_s/{part}"] = time.perf_counter() - begin
