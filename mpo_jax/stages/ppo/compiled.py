"""PPO's compiled programs: scoring of rollouts, updates of actor and critic, and both fused in one pass."""

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.packed import sum_over
from mpo_jax.ops import add_to_moments
from mpo_jax.runtime.sharding import batch_sharding, constrain, replicated
from mpo_jax.stages.ppo.objective import (
    Outputs,
    actor_objective,
    critic_objective,
    estimate,
    one_pass,
    outputs,
    rollout_metrics,
    rollout_of,
)
from mpo_jax.stages.ppo.settings import Method
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.training.update import accumulate, apply_if_finite, jit_update, like_parameters, state_sharding
from mpo_jax.types import Metrics, Moments, Packed, Params, PpoBatch, PromptBatch, Rollout, Tree, merge


def overlaid(base: Tree, params: Params) -> Tree:
    """All parameters of a model that may leave out what it shares with another one's frozen part, `base`."""
    return {**base, **merge(params)}


def trees(trains: Params, other: Params) -> tuple[Tree, Tree]:
    """All parameters of a model that trains, and of one that does not and may share the first one's frozen part."""
    return merge(trains), overlaid(trains["frozen"], other)


def _trainable(actor_model: Model, reward_model: Model) -> tuple[Tree, Tree]:
    """Shapes of what trains in actor and critic."""
    splits = forward.abstract_split(actor_model), forward.abstract_split(reward_model, head="value")
    return splits[0]["trainable"], splits[1]["trainable"]


@lru_cache
def make_score(actor_model: Model, reward_model: Model, method: Method, mesh: Mesh) -> Any:
    """The jitted (policies, value_models, batch, has_eos, allowed_V, kl_coef, moments, packed) -> (PpoBatch, metrics,
    moments).

    `policies` are the parameters of actor and reference, `value_models` those of critic and reward model, as `trees`
    takes them. `moments` are the running `Moments` of all raw scores, or None if scores are not normalised. The scores
    of real rows are added before normalisation; a batch with a non-finite score adds none. `packed` is the batch as
    the models read it; without it they read padded rows.
    """

    def score(policies, value_models, joined, has_eos_BN, allowed_V, kl_coef, moments=None, packed=None):
        found = _outputs(
            actor_model, reward_model, method, trees(*policies), trees(*value_models), joined, packed, allowed_V
        )
        return _estimated(rollout_of(found, joined, has_eos_BN[:, 0]), found.entropy, kl_coef, method, moments, packed)

    everywhere = replicated(mesh)
    return jax.jit(score, out_shardings=(batch_sharding(mesh), everywhere, everywhere))


def _outputs(
    actor_model: Model,
    reward_model: Model,
    method: Method,
    policies: tuple[Tree, Tree],
    value_models: tuple[Tree, Tree | None],
    joined: PromptBatch,
    packed: Packed | None,
    allowed_V: Array,
) -> Outputs:
    """What the models say of a whole batch of samples, all micro-batches of it if it is packed."""

    def part(rows: Any) -> Outputs:
        return outputs(actor_model, reward_model, method.temperature, policies, value_models, joined, rows, allowed_V)

    return sum_over(part, joined if packed is None else packed, keep=_by_rows)


def _laid_out(sums: Any) -> Any:
    """Gradients like their parameters, and what the models said by rows."""
    (actor, critic), found, measured = sums
    return (like_parameters(actor), like_parameters(critic)), _by_rows(found), measured


def _by_rows(tree: Any) -> Any:
    """Arrays that lead with the batch axis, divided over it."""
    return jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), tree)


def _estimated(
    rollout: Rollout,
    entropy_BS: Array,
    kl_coef: Array,
    method: Method,
    moments: Moments | None,
    packed: Packed | None,
) -> tuple[PpoBatch, Metrics, Moments | None]:
    """A scored rollout with advantages, its metrics, and the moments with its scores."""
    if moments is not None:
        moments = add_to_moments(moments, rollout.score, rollout.mask.any(-1))
    batch, _ = estimate(rollout, method, kl_coef, moments)
    return batch, rollout_metrics(batch, entropy_BS, kl_coef, method, moments, packed), moments


@lru_cache
def make_unscored(actor_model: Model, critic_model: Model, method: Method, mesh: Mesh) -> Any:
    """The jitted (policies, critic, batch, has_eos, allowed_V, packed) -> (Rollout with scores of 0, entropy [B S]).

    The first half of `make_score` where scores come from outside. `policies` and `packed` are as there, `critic` the
    critic's parameters.
    """

    def unscored(policies, critic, joined, has_eos_BN, allowed_V, packed=None):
        value_models = merge(critic), None
        found = _outputs(actor_model, critic_model, method, trees(*policies), value_models, joined, packed, allowed_V)
        return rollout_of(found, joined, has_eos_BN[:, 0]), found.entropy

    return jax.jit(unscored, out_shardings=batch_sharding(mesh))


@lru_cache
def make_scored(method: Method, mesh: Mesh) -> Any:
    """The jitted (Rollout, entropy, score [B], kl_coef, moments, packed) -> (PpoBatch, metrics, moments).

    The second half of `make_score` where scores come from outside; `moments` and `packed` as there.
    """

    def scored(rollout, entropy_BS, score_B, kl_coef, moments=None, packed=None):
        rollout = dataclasses.replace(rollout, score=score_B)
        return _estimated(rollout, entropy_BS, kl_coef, method, moments, packed)

    everywhere = replicated(mesh)
    return jax.jit(scored, out_shardings=(batch_sharding(mesh), everywhere, everywhere))


@lru_cache
def make_updates(actor_model: Model, reward_model: Model, method: Method, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted updates of actor and critic.

    (state, (PpoBatch, demonstrations or None), frozen, allowed_V) -> (state, metrics), and
    (state, PpoBatch, frozen) -> (state, metrics).
    """
    actor, critic = _trainable(actor_model, reward_model)
    update = partial(jit_update, mesh=mesh, accumulation=method.accumulation)
    return (
        update(partial(actor_objective, actor_model, method), make_optimizer(method.actor_optim), actor),
        update(partial(critic_objective, reward_model, method), make_optimizer(method.critic_optim), critic),
    )


@lru_cache
def make_one_pass(actor_model: Model, reward_model: Model, method: Method, mesh: Mesh) -> Any:
    """The jitted scoring and update in one pass.

    (actor, critic, rest, frozen, batch, has_eos [B 1], allowed_V, kl_coef, score, packed) -> (actor, critic, PpoBatch,
    metrics). `rest` holds the frozen parts of actor and critic, `frozen` the parameters of reference and reward model.
    `score` [B] are scores from outside; without them the reward model's. `packed` is as in `make_score`.
    """
    optimizers = make_optimizer(method.actor_optim), make_optimizer(method.critic_optim)

    def update(actor, critic, rest, frozen, joined, has_eos_BN, allowed_V, kl_coef, score_B=None, packed=None):
        real_B1 = (joined.prompt_len > 0)[:, None]
        count = jnp.where(real_B1, joined.response_len, 0).sum().astype(jnp.float32)
        reward = None if score_B is not None else overlaid(rest[1], frozen[1])

        def part(samples, rows):
            responses, has_eos_B, score_B = samples
            return one_pass(
                actor_model,
                reward_model,
                method,
                (actor.trainable, critic.trainable),
                rest,
                (overlaid(rest[0], frozen[0]), reward),
                responses,
                rows,
                has_eos_B,
                allowed_V,
                kl_coef,
                count,
                score_B,
            )

        def cut(samples):
            grads, found, measured = part(samples, samples[0])
            return (grads, measured), found

        samples = (joined, has_eos_BN[:, 0], score_B)
        if packed is None:
            (grads, measured), found = accumulate(cut, samples, method.accumulation)
        else:
            grads, found, measured = sum_over(partial(part, samples), packed, keep=_laid_out)
        models, advantage_BS, returns_BS = found
        batch = PpoBatch(rollout_of(models, *samples), advantage_BS, returns_BS)
        metrics = rollout_metrics(batch, models.entropy, kl_coef, method, packed=packed)
        states = []
        for name, state, grad, own, optimizer in zip(
            ("policy", "critic"), (actor, critic), grads, measured, optimizers, strict=True
        ):
            loss = sum(mean.value for key, mean in own.items() if key.startswith("loss/"))
            state, own = apply_if_finite(state, jnp.asarray(loss), grad, own, optimizer)
            states.append(state)
            metrics |= named(name, own)
        return *states, batch, metrics

    everywhere = replicated(mesh)
    trained = zip(_trainable(actor_model, reward_model), optimizers, strict=True)
    shardings = [state_sharding(tree, optimizer, mesh) for tree, optimizer in trained]
    return jax.jit(update, donate_argnums=(0, 1), out_shardings=(*shardings, batch_sharding(mesh), everywhere))


@lru_cache
def make_minibatch(mesh: Mesh) -> Any:
    """The jitted (batch, rows [b]) -> these rows of the batch.

    Rows move between devices, so any two rows can share a minibatch; moving token arrays is cheap next to an update.
    Each device gets an equal share of a minibatch.
    """

    def minibatch(batch: Any, rows: Int[Array, " b"]) -> Any:
        return jax.tree.map(lambda x: x[rows], batch)

    return jax.jit(minibatch, out_shardings=batch_sharding(mesh))


@lru_cache
def make_order(num_rows: int, count: int, mesh: Mesh) -> Any:
    """The jitted (key, iteration, epoch) -> [count, num_rows / count], the rows of an epoch's minibatches.

    They are disjoint and cover all rows, in an order that depends on key, iteration and epoch alone.
    """

    def order(key: Array, iteration: Int[Array, ""], epoch: Int[Array, ""]) -> Int[Array, "count b"]:
        key = jax.random.fold_in(jax.random.fold_in(key, iteration), epoch)
        return jax.random.permutation(key, num_rows).reshape(count, -1)

    return jax.jit(order, out_shardings=replicated(mesh))


@partial(jax.jit, donate_argnums=0)
def average(ema: Tree, tree: Tree, decay: float) -> Tree:
    """decay * ema + (1 - decay) * tree."""
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, ema, tree)


def named(model: str, metrics: Metrics) -> Metrics:
    """An update's metrics; those that both models report get the model's name as a prefix."""
    return {(f"{model}/{name}" if name in ("grad_norm", "skipped") else name): m for name, m in metrics.items()}
