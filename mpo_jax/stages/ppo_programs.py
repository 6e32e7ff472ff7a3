"""PPO's compiled programs: scoring of rollouts, the updates of actor and critic, and both in one pass."""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mpo_jax.config.schema import OptimConfig, PpoConfig
from mpo_jax.models.forward import Model
from mpo_jax.ops import add_to_moments
from mpo_jax.runtime.sharding import batch_sharding, replicated
from mpo_jax.stages.ppo_objective import (
    actor_objective,
    critic_objective,
    estimate,
    one_pass,
    rollout_metrics,
    score_rollout,
)
from mpo_jax.training.loop import apply_if_finite, make_update, micro_batches, state_sharding
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.types import Head, Metrics, Params


@lru_cache
def make_score(actor_model: Model, reward_model: Model, config: PpoConfig, mesh: Mesh) -> Any:
    """A jitted (policies, judges, joined, has_eos, allowed_V, kl_coef, moments) -> (PpoBatch, metrics, moments).

    `moments` is the running `Moments` of all raw scores, or None where scores are not normalised. This batch's scores
    are added before they are normalised, those of real rows alone. A batch with a score that is not finite adds none.
    """

    def score(policies, judges, joined, has_eos_BN, allowed_V, kl_coef, moments=None):
        rollout, entropy_BS = score_rollout(
            actor_model, reward_model, config.temperature, policies, judges, joined, has_eos_BN[:, 0], allowed_V
        )
        if moments is not None:
            moments = add_to_moments(moments, rollout.score, rollout.mask.any(-1))
        batch, _ = estimate(rollout, config, kl_coef, moments)
        return batch, rollout_metrics(batch, entropy_BS, kl_coef, config, moments), moments

    everywhere = replicated(mesh)
    return jax.jit(score, out_shardings=(batch_sharding(mesh), everywhere, everywhere))


@lru_cache
def make_updates(actor_model: Model, reward_model: Model, config: PpoConfig, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted updates of actor and critic, each (state, batch, learning_rate, *fixed) -> (state, metrics)."""
    accumulation = config.train.accumulation

    def update(objective: Any, optim: OptimConfig, model: Model, head: Head) -> Any:
        return jax.jit(
            make_update(objective, optim, accumulation=accumulation),
            donate_argnums=0,
            out_shardings=(state_sharding(model, optim, mesh, head=head), replicated(mesh)),
        )

    return (
        update(partial(actor_objective, actor_model, config), config.train.optim, actor_model, "lm"),
        update(partial(critic_objective, reward_model, config), config.critic_optim, reward_model, "value"),
    )


def updates_in_one_pass(config: PpoConfig) -> bool:
    """Whether an iteration's only update takes its old log-probabilities and values from its own forward pass.

    Not where a statistic of the whole batch stands between scores and losses of micro-batches, where scores are
    normalised, where there are further losses, or where the actor waits. Not unless asked for: a forward pass that is
    to be differentiated is compiled otherwise than the reference's, so that the first KL is 0 to rounding in place of
    exactly.
    """
    extras, single = config.extras, config.one_pass and config.epochs * config.minibatches == 1
    whitens = (extras.whiten_advantages or extras.whiten_rewards) and config.train.accumulation > 1
    return single and not (whitens or config.score == "normalised" or extras.ptx_coef or extras.critic_warmup)


@lru_cache
def make_one_pass(actor_model: Model, reward_model: Model, config: PpoConfig, mesh: Mesh) -> Any:
    """The jitted scoring and update in one:

    (actor, critic, frozen, joined, has_eos [B 1], allowed_V, kl_coef, rates) -> (actor, critic, PpoBatch, metrics),
    where `frozen` is reference and reward model, and `rates` the learning rates of actor and critic.
    """
    accumulation = config.train.accumulation
    transforms = make_optimizer(config.train.optim), make_optimizer(config.critic_optim)

    def update(actor, critic, frozen, joined, has_eos_BN, allowed_V, kl_coef, rates):
        real_B1 = (joined.prompt_len > 0)[:, None]
        count = jnp.where(real_B1, joined.response_len, 0).sum().astype(jnp.float32)

        def part(rows):
            responses, has_eos_B = rows
            return one_pass(
                actor_model,
                reward_model,
                config,
                (actor.params, critic.params),
                frozen,
                responses,
                has_eos_B,
                allowed_V,
                kl_coef,
                count,
            )

        rows = joined, has_eos_BN[:, 0]
        if accumulation == 1:
            grads, (batch, entropy_BS), found = part(rows)
        else:
            rows = micro_batches(rows, accumulation)

            def add(total, rows):
                grads, kept, found = part(rows)
                return jax.tree.map(jnp.add, total, (grads, found)), kept

            shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], rows))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[2]))
            (grads, found), kept = jax.lax.scan(add, zeros, rows)
            batch, entropy_BS = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), kept)
        metrics = rollout_metrics(batch, entropy_BS, kl_coef, config)
        states = []
        for name, state, grad, own, rate, tx in zip(
            ("policy", "critic"), (actor, critic), grads, found, rates, transforms, strict=True
        ):
            loss = sum(mean.value for key, mean in own.items() if key.startswith("loss/"))
            state, own = apply_if_finite(state, jnp.asarray(loss), grad, own, rate, tx)
            states.append(state)
            metrics |= named(name, own)
        return *states, batch, metrics

    everywhere = replicated(mesh)
    shardings = (
        state_sharding(actor_model, config.train.optim, mesh),
        state_sharding(reward_model, config.critic_optim, mesh, head="value"),
    )
    return jax.jit(update, donate_argnums=(0, 1), out_shardings=(*shardings, batch_sharding(mesh), everywhere))


@lru_cache
def make_minibatch(count: int, mesh: Mesh) -> Any:
    """A jitted (batch, key, iteration, epoch, index) -> part `index` of `count` of the batch's rows.

    The parts of one epoch are disjoint and cover the rows, in an order drawn by key, iteration and epoch alone. Rows
    cross devices, so that any two can meet; they are token arrays, which is little beside an update. Each device gets
    an equal share of a part.
    """

    def minibatch(
        batch: Any, key: Array, iteration: Int[Array, ""], epoch: Int[Array, ""], index: Int[Array, ""]
    ) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(key, iteration), epoch)
        num_rows = len(jax.tree.leaves(batch)[0])
        rows = jax.random.permutation(key, num_rows).reshape(count, -1)[index]
        return jax.tree.map(lambda x: x[rows], batch)

    return jax.jit(minibatch, out_shardings=batch_sharding(mesh))


@partial(jax.jit, donate_argnums=0)
def average(ema: Params, params: Params, decay: float) -> Params:
    """decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, ema, params)


def named(model: str, metrics: Metrics) -> Metrics:
    """An update's metrics, those that both models have under the model's name."""
    return {(f"{model}/{name}" if name in ("grad_norm", "skipped") else name): m for name, m in metrics.items()}
