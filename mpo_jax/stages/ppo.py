"""Proximal policy optimisation on prompts, with a KL penalty to a reference; the critic is a model of its own.

An iteration: sample from the actor; score, and recompute log-probabilities and values with the training forward pass;
shape rewards; estimate advantages; update on minibatches. Sources: arXiv:1707.06347, arXiv:2009.01325, DeepSpeed-Chat.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mpo_jax.config.schema import Config, PpoConfig, TrainConfig
from mpo_jax.data.batches import Buckets, TrainBatches, num_steps
from mpo_jax.data.corpus import known_utility, load_corpus
from mpo_jax.data.pair_table import PairTable, Subset
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import number_visits, tokenize
from mpo_jax.errors import UserError
from mpo_jax.evaluation.truth import Truth, make_rollout_utility
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling, make_generate
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.ops import adaptive_kl_coef
from mpo_jax.runtime.offload import Offload, to_devices
from mpo_jax.runtime.seeds import data_seed, stage_key
from mpo_jax.runtime.sharding import check_batch, place_batch, replicated
from mpo_jax.stages import ppo_eval
from mpo_jax.stages.ppo_programs import (
    average,
    make_minibatch,
    make_one_pass,
    make_score,
    make_updates,
    named,
    updates_in_one_pass,
)
from mpo_jax.training.loop import check_rows, check_schedule, check_sizes, fit, init_state, make_learning_rate
from mpo_jax.types import Artifact, Mean, Metrics, Moments, Params, PpoBatch, PromptBatch, Skips, TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PpoState:
    """All that changes.

    Attributes:
      actor: and `critic`, the two models.
      kl_coef: of the penalty.
      ema: the actor's average, where one is kept.
      scores: running moments of the raw scores, where scores are normalised.
    """

    actor: TrainState
    critic: TrainState
    kl_coef: Float[Array, ""]
    ema: Params | None = None
    scores: Moments | None = None


def init_ppo_state(
    config: PpoConfig, actor_params: Params, critic_params: Params, mesh: Mesh, offload: Offload
) -> PpoState:
    """The state before the first iteration; it holds copies of the parameters."""

    def number(value: float) -> Array:
        return jax.device_put(jnp.asarray(value, jnp.float32), replicated(mesh))

    return PpoState(
        actor=offload.state(init_state(actor_params, config.train.optim, mesh)),
        critic=offload.state(init_state(critic_params, config.critic_optim, mesh)),
        kl_coef=number(config.kl.coef),
        ema=jax.tree.map(jnp.copy, actor_params) if config.extras.ema_decay is not None else None,
        scores=Moments(number(0.0), number(0.0), number(0.0)) if config.score == "normalised" else None,
    )


def run(
    config: Config,
    mesh: Mesh,
    folder: Path,
    *,
    init: Artifact,
    reference: Artifact,
    reward: Artifact,
    pairs: Artifact | None = None,
    subset: Subset,
) -> dict[str, Any]:
    """Trains the actor from `init` against `reference` and writes `model/` and `critic/`.

    Args:
      pairs: a selection whose prompts to use; None for all training prompts.
      subset: which of the selection's prompts.
    """
    ppo = config.ppo
    check_sizes(config, ppo.train, "ppo", minibatches=ppo.minibatches)
    check_batch(ppo.train.batch_size, config.mesh, "ppo.train.batch_size")
    offload = Offload.of(config.runtime, mesh)
    codec = TextCodec(load_tokenizer(init.model), config.text)
    ref_params = offload.put_away(loading.load(reference.model, config, mesh, frozen=True)[1])
    reward_model, reward_params = loading.load(reward.model, config, mesh, head="value", frozen=True)
    reward_params = offload.put_away(reward_params)
    actor_model, actor_params = loading.load(init.model, config, mesh)
    critic_params = loading.load(reward.model, config, mesh, head="value")[1]

    loading.save_description(folder / "model", actor_model, codec)
    loading.save_description(folder / "critic", reward_model, codec, head="value")

    prompts = [(prompt, ()) for prompt in _prompts(config, pairs, subset)]
    examples = number_visits(tokenize(codec, prompts, cache=config.runtime.token_cache_folder)[0])
    buckets = Buckets.of(examples, config.text.length_buckets)
    size = ppo.train.batch_size
    iterations = num_steps(len(examples), epochs=ppo.train.epochs, steps=ppo.train.steps, batch_size=size)
    if ppo.extras.critic_warmup >= iterations:
        raise UserError(
            f"ppo.extras.critic_warmup={ppo.extras.critic_warmup} leaves the actor none of the {iterations} "
            "iterations: lower it, or train longer with ppo.train.epochs or ppo.train.steps"
        )
    batches = TrainBatches(examples, buckets, size, data_seed(config.seed, "ppo"), ppo.train.shuffle)
    demonstrations = _demonstrations(config, codec) if ppo.extras.ptx_coef else None
    check_rows("ppo", len(examples), size)
    own_iterations = iterations - ppo.extras.critic_warmup
    for key, optim, made in (("train.optim", ppo.train.optim, own_iterations),
                             ("critic_optim", ppo.critic_optim, iterations)):  # fmt: skip
        check_schedule(f"ppo.{key}", optim, made * ppo.epochs * ppo.minibatches)
    truth = known_utility(config.data)
    loop = Loop(config, mesh, codec, actor_model, reward_model, ref_params, reward_params, iterations, truth)

    def step(state: PpoState, k: int) -> tuple[PpoState, Metrics, Any]:
        return loop.iteration(state, k, batches, demonstrations)

    state = init_ppo_state(ppo, actor_params, critic_params, mesh, offload)
    del actor_params, critic_params
    state, trained = fit(
        state,
        step,
        config=config,
        train=ppo.train,
        num_steps=iterations,
        folder=folder,
        stage="ppo",
        evaluate=ppo_eval.make_evaluate(config, codec, loop, buckets),
        warmup=ppo.extras.critic_warmup,
    )
    loading.save(folder / "model", actor_model, ppo_eval.exported(state), codec)
    loading.save(folder / "critic", reward_model, state.critic.params, codec)
    return {"prompts": len(examples), **trained}


@dataclasses.dataclass
class Loop:
    """The compiled parts of an iteration and the frozen models they read."""

    config: Config
    mesh: Mesh
    codec: TextCodec
    actor_model: Model
    reward_model: Model
    ref_params: Params
    reward_params: Params
    iterations: int
    truth: Truth | None = None

    def __post_init__(self) -> None:
        ppo = self.config.ppo
        sampling = Sampling(self.config.text.max_response_tokens, temperature=ppo.temperature, greedy=ppo.greedy)
        self.generate = make_generate(self.actor_model, sampling, self.codec.eos_id, self.mesh)
        # compiled functions are kept by configuration: how long to train and what to save must not make them anew
        train = TrainConfig(batch_size=ppo.train.batch_size, accumulation=ppo.train.accumulation, optim=ppo.train.optim)
        method = ppo.model_copy(update={"train": train})
        self.score = make_score(self.actor_model, self.reward_model, method, self.mesh)
        updates = make_updates(self.actor_model, self.reward_model, method, self.mesh)
        self.offload = Offload.of(self.config.runtime, self.mesh)
        self.update_actor, self.update_critic = map(self.offload.update, updates)
        self.one_pass = None
        if updates_in_one_pass(method):
            self.one_pass = make_one_pass(self.actor_model, self.reward_model, method, self.mesh)
        self.allowed_V = jnp.asarray(self.codec.allowed(self.actor_model.decoder.vocab_size))
        self.utility = make_rollout_utility(self.truth, self.codec)
        self.key = stage_key(self.config.seed, "ppo")
        self.minibatch = make_minibatch(ppo.minibatches, self.mesh)
        self.minibatch_key = stage_key(self.config.seed, "ppo minibatches")
        updates_each = ppo.epochs * ppo.minibatches
        # each model's schedule counts its own updates: the actor's starts when the critic has warmed up
        own_iterations = max(self.iterations - ppo.extras.critic_warmup, 0)
        self.actor_rate = make_learning_rate(ppo.train.optim, own_iterations * updates_each)
        self.critic_rate = make_learning_rate(ppo.critic_optim, self.iterations * updates_each)

    def iteration(
        self, state: PpoState, k: int, batches: TrainBatches, demonstrations: TrainBatches | None
    ) -> tuple[PpoState, Metrics, Any]:
        """One PPO iteration on batch k; also returns the scored rollouts and the demonstrations."""
        ppo = self.config.ppo
        timing: dict[str, float] = {}
        batch = batches[k]
        prompts, epoch = place_batch((batch.rows, batch.epoch), self.mesh)
        with _timed(timing, "timing_s/rollout", k, ppo.train.log_every) as wait:
            joined, has_eos = wait(self.generate(state.actor.params, prompts, self.key, epoch, self.allowed_V))
        shown = place_batch(demonstrations[k].rows, self.mesh) if demonstrations is not None else None
        if self.one_pass is not None:
            with _timed(timing, "timing_s/update", k, ppo.train.log_every) as wait:
                inputs = joined, has_eos, self.allowed_V, state.kl_coef, (self.actor_rate(k), self.critic_rate(k))
                models = to_devices((state.actor, state.critic, (self.ref_params, self.reward_params)))
                actor, critic, scored, metrics = wait(self.one_pass(*models, *inputs))
            state = dataclasses.replace(state, actor=self.offload.state(actor), critic=self.offload.state(critic))
        else:
            with _timed(timing, "timing_s/score", k, ppo.train.log_every) as wait:
                scored, metrics, scores = wait(
                    self.score(
                        (state.actor.params, to_devices(self.ref_params)),
                        (state.critic.params, to_devices(self.reward_params)),
                        joined,
                        has_eos,
                        self.allowed_V,
                        state.kl_coef,
                        state.scores,
                    )
                )
                state = dataclasses.replace(state, scores=scores)
            with _timed(timing, "timing_s/update", k, ppo.train.log_every) as wait:
                state, update_metrics = wait(self._updates(state, k, (scored, shown)))
            metrics |= update_metrics
        kl_coef = state.kl_coef
        if ppo.kl.adaptive:
            adapted = adaptive_kl_coef(
                kl_coef,
                metrics["objective/kl"].value,
                target=ppo.kl.target,
                horizon=ppo.kl.horizon,
                num_samples=ppo.train.batch_size,
            )
            # as with the models, a batch that is not finite changes nothing
            kl_coef = jnp.where(jnp.isfinite(adapted), adapted, kl_coef)
        ema = state.ema
        if ema is not None:
            ema = average(ema, state.actor.params, self.config.ppo.extras.ema_decay)
        state = dataclasses.replace(state, kl_coef=kl_coef, ema=ema)
        metrics = {**metrics, **timing, **self.utility(joined)}
        return state, metrics, {"rollouts": scored, "shown": shown}

    def _updates(self, state: PpoState, k: int, batch: tuple[PpoBatch, PromptBatch | None]) -> tuple[PpoState, Metrics]:
        """All passes over one iteration's rollouts."""
        ppo = self.config.ppo
        collected: list[Metrics] = []
        actor, critic = state.actor, state.critic
        updates_each, own_k = ppo.epochs * ppo.minibatches, k - ppo.extras.critic_warmup
        for update in range(updates_each):
            part = batch
            if ppo.minibatches > 1:
                epoch, index = divmod(update, ppo.minibatches)
                part = self.minibatch(batch, self.minibatch_key, k, epoch, index)
            critic, metrics = self.update_critic(critic, part[0], self.critic_rate(k * updates_each + update))
            metrics = named("critic", metrics)
            if own_k >= 0:
                rate = self.actor_rate(own_k * updates_each + update)
                actor, actor_metrics = self.update_actor(actor, part, rate, self.allowed_V)
                metrics |= named("policy", actor_metrics)
            collected.append(metrics)
            if ppo.kl.stop is not None and _exceeds(metrics.get("policy/approxkl_avg"), ppo.kl.stop):
                break
        return dataclasses.replace(state, actor=actor, critic=critic), _mean_of(collected)


def _exceeds(mean: Mean | None, limit: float) -> bool:
    """The one place where the host waits for the device inside an iteration, and only if asked to stop early."""
    return mean is not None and float(mean.value) > limit


def _mean_of(collected: list[Metrics]) -> Metrics:
    """Means and skips added, scalars averaged, over an iteration's updates."""
    totals: Metrics = {}
    for metrics in collected:
        for name, value in metrics.items():
            totals[name] = totals[name] + value if name in totals else value
    return {name: m if isinstance(m, Mean | Skips) else m / len(collected) for name, m in totals.items()}


class _timed:
    """Seconds of a part of an iteration, for logged iterations only: timing makes the host wait for the device."""

    def __init__(self, timing: dict[str, float], name: str, k: int, log_every: int):
        self.timing, self.name = timing, name
        self.on = (k + 1) % log_every == 0

    def __enter__(self) -> Any:
        self.begin = time.perf_counter()
        return jax.block_until_ready if self.on else lambda x: x

    def __exit__(self, *_: object) -> None:
        if self.on:
            self.timing[self.name] = time.perf_counter() - self.begin


def _prompts(config: Config, pairs: Artifact | None, subset: Subset) -> list[str]:
    if pairs is None:
        return load_corpus(config).sampled_prompts(config.select.num_prompts)
    table = PairTable.read(pairs.path)
    prompts = [table.prompt[row] for row in table.rows(subset, config.select)]
    return prompts if config.data.prompts == "rows" else list(dict.fromkeys(prompts))


def _demonstrations(config: Config, codec: TextCodec) -> TrainBatches:
    rows = load_corpus(config).demonstrations
    texts = [(row.prompt, (row.response,)) for row in rows]
    examples, _ = tokenize(codec, texts, cache=config.runtime.token_cache_folder)
    buckets = Buckets.of(examples, config.text.length_buckets)
    train = config.ppo.train
    return TrainBatches(examples, buckets, train.batch_size, data_seed(config.seed, "ptx"), train.shuffle)
