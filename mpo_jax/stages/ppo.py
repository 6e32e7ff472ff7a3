"""Proximal policy optimisation on prompts, with a KL penalty to a reference; the critic is a model of its own.

An iteration: sample from the actor; score, and recompute log-probabilities and values with the training forward pass;
shape rewards; estimate advantages; update on minibatches. Sources: arXiv:1707.06347, arXiv:2009.01325, DeepSpeed-Chat.
"""

import dataclasses
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from mpo_jax.config import Config, OptimConfig, PpoConfig, TrainConfig
from mpo_jax.data.batches import Buckets, TrainBatches, num_steps
from mpo_jax.data.corpus import load_corpus
from mpo_jax.data.pair_table import PairTable, Subset
from mpo_jax.data.tokens import tokenize
from mpo_jax.generate import Sampling, make_generate
from mpo_jax.losses import ppo_policy_loss, sft_loss, value_loss
from mpo_jax.model import functional, loading
from mpo_jax.model.functional import Model
from mpo_jax.offload import Offload, to_devices
from mpo_jax.ops import (
    adaptive_kl_coef,
    explained_variance,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_sum,
    shape_rewards,
    shape_rewards_ds_chat,
    whiten,
)
from mpo_jax.runtime import data_seed, stage_key
from mpo_jax.sharding import batch_sharding, check_batch, place_batch, replicated
from mpo_jax.text import TextCodec, load_tokenizer
from mpo_jax.train import check_sizes, fit, init_state, make_learning_rate, make_update, state_sharding
from mpo_jax.types import Artifact, Joined, Mean, Metrics, Params, PpoBatch, Rollout, Skips, TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PpoState:
    """All that changes: both models, the KL coefficient, and the actor's average where one is kept."""

    actor: TrainState
    critic: TrainState
    kl_coef: Float[Array, ""]
    ema: Params | None


def score_rollout(
    actor_model: Model,
    reward_model: Model,
    temperature: float,
    policies: tuple[Params, Params],
    judges: tuple[Params, Params],
    joined: Joined,
    has_eos_B: Bool[Array, " B"],
    allowed_V: Bool[Array, " V"],
) -> tuple[Rollout, Float[Array, "B S"]]:
    """One pass of every model over the sampled responses, and the policy's entropy at each token.

    Args:
      policies: parameters of actor and reference.
      judges: parameters of critic and reward model.
    """
    tokens = functional.join(joined)

    def logps(params, with_entropy):
        return functional.token_logp(
            actor_model, params, tokens, temperature=temperature, allowed_V=allowed_V, with_entropy=with_entropy
        )

    mask_BS = tokens.loss_mask[:, tokens.scored_from :]
    behavior_BS, entropy_BS = logps(policies[0], True)
    ref_BS, _ = logps(policies[1], False)
    critic_BT = functional.scores(reward_model, judges[0], tokens)
    score_BN = functional.response_scores(functional.scores(reward_model, judges[1], tokens), joined)
    rollout = Rollout(
        joined=joined,
        mask=mask_BS,
        behavior_logp=behavior_BS,
        ref_logp=ref_BS,
        value=jnp.where(mask_BS, functional.values_before(critic_BT, tokens), 0.0),
        score=score_BN[:, 0],
        has_eos=has_eos_B,
    )
    return rollout, entropy_BS


def estimate(rollout: Rollout, config: PpoConfig, kl_coef: Float[Array, ""]) -> tuple[PpoBatch, Float[Array, "B S"]]:
    """Advantages and returns of a rollout, and its shaped rewards."""
    score_B = rollout.score
    if config.extras.missing_eos == "replace":
        score_B = jnp.where(rollout.has_eos, score_B, -config.extras.missing_eos_penalty)
    elif config.extras.missing_eos == "subtract":
        score_B = jnp.where(rollout.has_eos, score_B, score_B - config.extras.missing_eos_penalty)

    place = {"kl_coef": kl_coef, "clip": config.score_clip}
    if config.reward_at == "ds_chat":
        # beyond the response both log-probs are 0 here, so the token after EOS carries the score and no KL
        reward_BS, carry_BS = shape_rewards_ds_chat(
            rollout.behavior_logp, rollout.ref_logp, score_B, rollout.mask, **place
        )
    else:
        reward_BS = shape_rewards(rollout.behavior_logp, rollout.ref_logp, score_B, rollout.mask, **place)
        carry_BS = rollout.mask
    if config.extras.whiten_rewards:
        reward_BS = whiten(reward_BS, carry_BS, shift_mean=False)
    advantage_BS, returns_BS = gae(reward_BS, rollout.value, carry_BS, discount=config.discount, trace=config.trace)
    advantage_BS = jnp.where(rollout.mask, advantage_BS, 0.0)
    if config.extras.whiten_advantages:
        advantage_BS = whiten(advantage_BS, rollout.mask)
    return PpoBatch(rollout, advantage_BS, jnp.where(rollout.mask, returns_BS, 0.0)), reward_BS


def rollout_metrics(batch: PpoBatch, entropy_BS: Array, kl_coef: Array) -> Metrics:
    """What the rollout says about the policy, before any update; sums run over a response, means over responses."""
    r = batch.rollout
    kl_B = masked_sum(kl_k1(r.behavior_logp, r.ref_logp), r.mask)
    length_B = r.mask.sum(-1)
    return {
        "objective/kl": Mean.of(kl_B),
        "objective/kl_k2": Mean.of(masked_sum(kl_k2(r.behavior_logp, r.ref_logp), r.mask)),
        "objective/kl_k3": Mean.of(masked_sum(kl_k3(r.behavior_logp, r.ref_logp), r.mask)),
        "objective/entropy": Mean.of(-masked_sum(r.behavior_logp, r.mask)),
        "objective/scores": Mean.of(r.score),
        "objective/non_score_reward": Mean.of(-kl_coef * kl_B),
        "objective/rlhf_reward": Mean.of(r.score - kl_coef * kl_B),
        "objective/kl_coef": kl_coef,
        "policy/entropy_avg": Mean.of(entropy_BS, r.mask),
        "critic/explained_variance": explained_variance(r.value, batch.returns, r.mask),
        "val/num_eos_tokens": r.has_eos.sum(),
        "response_length/mean": Mean.of(length_B),
        "response_length/clip_ratio": Mean.of(~r.has_eos),
        "tokens": length_B.sum() + jnp.asarray(r.joined.prompt_len).sum(),
    }


def actor_objective(
    model: Model,
    config: PpoConfig,
    params: Params,
    batch: tuple[PpoBatch, Joined | None],
    allowed_V: Bool[Array, " V"],
) -> tuple[Metrics, Metrics]:
    """The clipped policy loss, and the SFT loss on demonstrations where it has a weight.

    `batch` is the rollouts, and demonstrations or None.
    """
    ppo, demonstrations = batch
    rollout = ppo.rollout
    tokens = functional.join(rollout.joined)
    logp_BS, _ = functional.token_logp(model, params, tokens, temperature=config.temperature, allowed_V=allowed_V)
    terms = {
        "loss/policy_avg": ppo_policy_loss(
            logp_BS, rollout.behavior_logp, ppo.advantage, rollout.mask, clip=config.policy_clip
        )
    }
    if demonstrations is not None:
        shown = functional.join(demonstrations)
        shown_BS, _ = functional.token_logp(model, params, shown)
        ptx = sft_loss(shown_BS, shown.loss_mask[:, shown.scored_from :])
        terms["loss/ptx"] = Mean(config.extras.ptx_coef * ptx.total, ptx.count)
    log_ratio_BS = jnp.where(rollout.mask, logp_BS - rollout.behavior_logp, 0.0)
    ratio_BS = jnp.exp(log_ratio_BS)
    return terms, {
        "policy/approxkl_avg": Mean.of(0.5 * log_ratio_BS**2, rollout.mask),
        "policy/clipfrac_avg": Mean.of(jnp.abs(ratio_BS - 1.0) > config.policy_clip, rollout.mask),
        "val/ratio": Mean.of(ratio_BS, rollout.mask),
    }


def critic_objective(model: Model, config: PpoConfig, params: Params, ppo: PpoBatch) -> tuple[Metrics, Metrics]:
    """The clipped value loss."""
    rollout = ppo.rollout
    tokens = functional.join(rollout.joined)
    value_BS = functional.values_before(functional.scores(model, params, tokens), tokens)
    loss = value_loss(value_BS, rollout.value, ppo.returns, rollout.mask, clip=config.value_clip)
    clipped_BS = jnp.abs(value_BS - rollout.value) > config.value_clip
    return {"loss/value_avg": loss}, {"val/clipfrac_avg": Mean.of(clipped_BS, rollout.mask)}


@lru_cache
def make_score(actor_model: Model, reward_model: Model, config: PpoConfig, mesh: Mesh) -> Any:
    """A jitted (policies, judges, joined, has_eos, allowed_V, kl_coef) -> (PpoBatch, metrics)."""

    def score(policies, judges, joined, has_eos_BN, allowed_V, kl_coef):
        rollout, entropy_BS = score_rollout(
            actor_model, reward_model, config.temperature, policies, judges, joined, has_eos_BN[:, 0], allowed_V
        )
        batch, _ = estimate(rollout, config, kl_coef)
        return batch, rollout_metrics(batch, entropy_BS, kl_coef)

    return jax.jit(score, out_shardings=(batch_sharding(mesh), replicated(mesh)))


@lru_cache
def make_updates(actor_model: Model, reward_model: Model, config: PpoConfig, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted updates of actor and critic, each (state, batch, learning_rate, *fixed) -> (state, metrics)."""
    accumulation = config.train.accumulation

    def update(objective: Any, optim: OptimConfig, model: Model, scalar: bool) -> Any:
        return jax.jit(
            make_update(objective, optim, accumulation=accumulation),
            donate_argnums=0,
            out_shardings=(state_sharding(model, optim, mesh, scalar=scalar), replicated(mesh)),
        )

    return (
        update(partial(actor_objective, actor_model, config), config.train.optim, actor_model, False),
        update(partial(critic_objective, reward_model, config), config.critic_optim, reward_model, True),
    )


@partial(jax.jit, static_argnames=("count",))
def minibatch(batch: Any, index: Array, count: int) -> Any:
    """Part `index` of `count`, interleaved so that every device keeps its own rows."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:])[:, index], batch)


@partial(jax.jit, donate_argnums=0)
def average(ema: Params, params: Params, decay: float) -> Params:
    """decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, ema, params)


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
    reward_model, reward_params = loading.load(reward.model, config, mesh, scalar=True, frozen=True)
    reward_params = offload.put_away(reward_params)
    actor_model, actor_params = loading.load(init.model, config, mesh)
    critic_params = loading.load(reward.model, config, mesh, scalar=True)[1]

    loading.save_description(folder / "model", actor_model, codec)
    loading.save_description(folder / "critic", reward_model, codec, scalar=True)

    prompts = [(prompt, ()) for prompt in _prompts(config, pairs, subset)]
    examples, _ = tokenize(codec, prompts, cache=config.runtime.token_cache_folder)
    buckets = Buckets.of(examples, config.text.length_buckets)
    size = ppo.train.batch_size
    iterations = num_steps(len(examples), epochs=ppo.train.epochs, steps=ppo.train.steps, batch_size=size)
    batches = TrainBatches(examples, buckets, size, data_seed(config.seed, "ppo"), ppo.train.shuffle)
    demonstrations = _demonstrations(config, codec) if ppo.extras.ptx_coef else None
    loop = Loop(config, mesh, codec, actor_model, reward_model, ref_params, reward_params, iterations)

    def step(state: PpoState, k: int) -> tuple[PpoState, Metrics, Any]:
        return loop.iteration(state, k, batches, demonstrations)

    state = PpoState(
        actor=offload.state(init_state(actor_params, ppo.train.optim, mesh)),
        critic=offload.state(init_state(critic_params, ppo.critic_optim, mesh)),
        kl_coef=jax.device_put(jnp.asarray(ppo.kl.coef, jnp.float32), replicated(mesh)),
        ema=jax.tree.map(jnp.copy, actor_params) if ppo.extras.ema_decay is not None else None,
    )
    del actor_params, critic_params
    state, logged = fit(
        state,
        step,
        config=config,
        train=ppo.train,
        num_steps=iterations,
        folder=folder,
        stage="ppo",
    )
    exported = state.actor.params if state.ema is None else state.ema
    loading.save(folder / "model", actor_model, exported, codec)
    loading.save(folder / "critic", reward_model, state.critic.params, codec)
    return {"prompts": len(examples), "steps": iterations, "train": logged}


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

    def __post_init__(self) -> None:
        ppo = self.config.ppo
        sampling = Sampling(
            self.config.text.max_response_tokens, temperature=ppo.temperature, top_p=1.0, greedy=ppo.greedy
        )
        self.generate = make_generate(self.actor_model, sampling, self.codec.eos_id, self.mesh)
        # compiled functions are kept by configuration: how long to train and what to save must not make them anew
        train = TrainConfig(batch_size=ppo.train.batch_size, accumulation=ppo.train.accumulation, optim=ppo.train.optim)
        method = ppo.model_copy(update={"train": train})
        self.score = make_score(self.actor_model, self.reward_model, method, self.mesh)
        updates = make_updates(self.actor_model, self.reward_model, method, self.mesh)
        self.update_actor, self.update_critic = map(Offload.of(self.config.runtime, self.mesh).update, updates)
        self.allowed_V = jnp.asarray(self.codec.allowed(self.actor_model.decoder.vocab_size))
        self.key = stage_key(self.config.seed, "ppo")
        num_updates = self.iterations * ppo.epochs * ppo.minibatches
        self.actor_rate = make_learning_rate(ppo.train.optim, num_updates)
        self.critic_rate = make_learning_rate(ppo.critic_optim, num_updates)

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
        with _timed(timing, "timing_s/score", k, ppo.train.log_every) as wait:
            scored, metrics = wait(
                self.score(
                    (state.actor.params, to_devices(self.ref_params)),
                    (state.critic.params, to_devices(self.reward_params)),
                    joined,
                    has_eos,
                    self.allowed_V,
                    state.kl_coef,
                )
            )
        shown = place_batch(demonstrations[k].rows, self.mesh) if demonstrations is not None else None
        with _timed(timing, "timing_s/update", k, ppo.train.log_every) as wait:
            state, update_metrics = wait(self._updates(state, k, (scored, shown)))
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
        return state, {**metrics, **update_metrics, **timing}, {"rollouts": scored, "shown": shown}

    def _updates(self, state: PpoState, k: int, batch: tuple[PpoBatch, Joined | None]) -> tuple[PpoState, Metrics]:
        """All passes over one iteration's rollouts."""
        ppo = self.config.ppo
        collected: list[Metrics] = []
        actor, critic = state.actor, state.critic
        for update in range(ppo.epochs * ppo.minibatches):
            part = batch
            if ppo.minibatches > 1:
                part = minibatch(batch, jnp.asarray(update % ppo.minibatches), ppo.minibatches)
            number = k * ppo.epochs * ppo.minibatches + update
            critic, metrics = self.update_critic(critic, part[0], self.critic_rate(number))
            metrics = _named("critic", metrics)
            if k >= ppo.extras.critic_warmup:
                actor, actor_metrics = self.update_actor(actor, part, self.actor_rate(number), self.allowed_V)
                metrics |= _named("policy", actor_metrics)
            collected.append(metrics)
            if ppo.kl.stop is not None and _exceeds(metrics.get("policy/approxkl_avg"), ppo.kl.stop):
                break
        return dataclasses.replace(state, actor=actor, critic=critic), _mean_of(collected)


def _named(model: str, metrics: Metrics) -> Metrics:
    """An update's metrics, those that both models have under the model's name."""
    return {(f"{model}/{name}" if name in ("grad_norm", "skipped") else name): m for name, m in metrics.items()}


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
        return load_corpus(config).prompts
    table = PairTable.read(pairs.path)
    return list(dict.fromkeys(table.prompt[row] for row in table.rows(subset, config.select)))


def _demonstrations(config: Config, codec: TextCodec) -> TrainBatches:
    rows = load_corpus(config).demonstrations
    texts = [(row.prompt, (row.response,)) for row in rows]
    examples, _ = tokenize(codec, texts, cache=config.runtime.token_cache_folder)
    buckets = Buckets.of(examples, config.text.length_buckets)
    train = config.ppo.train
    return TrainBatches(examples, buckets, train.batch_size, data_seed(config.seed, "ptx"), train.shuffle)
