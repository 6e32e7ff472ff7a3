"""PPO's computations on models: from sampled responses to scores, advantages, losses and their metrics.

Sources: arXiv:1707.06347, arXiv:2009.01325, DeepSpeed-Chat.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mpo_jax.losses import ppo_policy_loss, sft_loss, value_loss
from mpo_jax.models import forward, responses
from mpo_jax.models.forward import Model
from mpo_jax.ops import (
    explained_variance,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_sum,
    normalise,
    shape_rewards,
    shape_rewards_ds_chat,
    whiten,
)
from mpo_jax.stages.ppo.settings import Method
from mpo_jax.types import Mean, Metrics, Moments, PpoBatch, PromptBatch, Rollout, Tree, merge


def score_rollout(
    actor_model: Model,
    reward_model: Model,
    temperature: float,
    policies: tuple[Tree, Tree],
    value_models: tuple[Tree, Tree],
    joined: PromptBatch,
    has_eos_B: Bool[Array, " B"],
    allowed_V: Bool[Array, " V"],
    score_B: Float[Array, " B"] | None = None,
) -> tuple[Rollout, Float[Array, "B S"]]:
    """Runs every model once over the sampled responses; returns the rollout and the policy's entropy at each token.

    Args:
      policies: parameters of actor and reference.
      value_models: parameters of critic and reward model.
      score_B: the responses' scores; None: those of the reward model.
    """
    tokens = forward.join(joined)
    behavior_BS, entropy_BS = forward.token_logp(
        actor_model, policies[0], tokens, temperature=temperature, allowed_V=allowed_V, with_entropy=True
    )
    value_BS = with_end(*values(reward_model, value_models[0], joined), joined)
    frozen = policies[1], value_models[1]
    rollout = with_frozen_scores(
        actor_model, reward_model, temperature, frozen, joined, has_eos_B, allowed_V, behavior_BS, value_BS, score_B
    )
    return rollout, entropy_BS


def values(model: Model, critic: Tree, joined: PromptBatch) -> tuple[Float[Array, "B S"], Float[Array, "B 1"]]:
    """The critic's value of the state before each response token (0 elsewhere), and of the state after the last one."""
    tokens = forward.join(joined)
    score_BT = forward.scores(model, critic, tokens)
    value_BS = forward.values_before(score_BT, tokens)
    value_BS = jnp.where(tokens.loss_mask[:, tokens.scored_from :], value_BS, 0.0)
    return value_BS, forward.response_scores(score_BT, joined)


def with_end(value_BS: Float[Array, "B S"], end_B1: Float[Array, "B 1"], joined: PromptBatch) -> Float[Array, "B S"]:
    """The values, with the value of the final state in the column after the last token, if that column exists.

    The alignment holds: a column has the value of the state before it, and the final state precedes that column.
    """
    behind_BS = jnp.arange(value_BS.shape[1])[None] == joined.response_len[:, :1]
    return jnp.where(behind_BS & (joined.prompt_len > 0)[:, None], end_B1, value_BS)


def with_frozen_scores(
    actor_model: Model,
    reward_model: Model,
    temperature: float,
    frozen: tuple[Tree, Tree],
    joined: PromptBatch,
    has_eos_B: Bool[Array, " B"],
    allowed_V: Bool[Array, " V"],
    behavior_BS: Float[Array, "B S"],
    value_BS: Float[Array, "B S"],
    score_B: Float[Array, " B"] | None = None,
) -> Rollout:
    """The rollout with the outputs of the frozen models: reference log-probabilities and reward-model scores.

    Args:
      score_B: as for `score_rollout`.
    """
    tokens = forward.join(joined)
    ref_BS, _ = forward.token_logp(actor_model, frozen[0], tokens, temperature=temperature, allowed_V=allowed_V)
    if score_B is None:
        score_B = forward.response_scores(forward.scores(reward_model, frozen[1], tokens), joined)[:, 0]
    return Rollout(
        joined=joined,
        mask=tokens.loss_mask[:, tokens.scored_from :],
        behavior_logp=behavior_BS,
        ref_logp=ref_BS,
        value=value_BS,
        score=score_B,
        has_eos=has_eos_B,
    )


def rewarded_score(rollout: Rollout, method: Method, moments: Moments | None) -> Float[Array, " B"]:
    """The score before clipping: normalised by `moments` if given, then penalised for a missing EOS."""
    score_B = rollout.score if moments is None else normalise(rollout.score, moments)
    if method.extras.missing_eos == "replace":
        return jnp.where(rollout.has_eos, score_B, -method.extras.missing_eos_penalty)
    if method.extras.missing_eos == "subtract":
        return jnp.where(rollout.has_eos, score_B, score_B - method.extras.missing_eos_penalty)
    return score_B


def estimate(
    rollout: Rollout, method: Method, kl_coef: Float[Array, ""], moments: Moments | None = None
) -> tuple[PpoBatch, Float[Array, "B S"]]:
    """Advantages and returns of a rollout, and its shaped rewards.

    Args:
      moments: moments of the raw scores including this rollout's, if scores are normalised.
    """
    score_B = rewarded_score(rollout, method, moments)
    place = {"kl_coef": kl_coef, "clip": method.score_clip}
    if method.reward_at == "ds_chat":
        # The token after EOS carries the score, the value of the state after EOS, and the KL of the rollout's
        # log-probs there; `token_logp` gives 0 for both, since no policy can sample the padding token.
        reward_BS, carry_BS = shape_rewards_ds_chat(
            rollout.behavior_logp, rollout.ref_logp, score_B, rollout.mask, **place
        )
    else:
        reward_BS = shape_rewards(rollout.behavior_logp, rollout.ref_logp, score_B, rollout.mask, **place)
        carry_BS = rollout.mask
    if method.extras.whiten_rewards:
        reward_BS = whiten(reward_BS, carry_BS, shift_mean=False)
    advantage_BS, returns_BS = gae(reward_BS, rollout.value, carry_BS, gamma=method.gamma, gae_lambda=method.gae_lambda)
    advantage_BS = jnp.where(rollout.mask, advantage_BS, 0.0)
    if method.extras.whiten_advantages:
        advantage_BS = whiten(advantage_BS, rollout.mask)
    return PpoBatch(rollout, advantage_BS, jnp.where(rollout.mask, returns_BS, 0.0)), reward_BS


def rollout_metrics(
    batch: PpoBatch, entropy_BS: Array, kl_coef: Array, method: Method, moments: Moments | None = None
) -> Metrics:
    """Metrics of the rollout, before any update; sums run over a response, means over responses."""
    r = batch.rollout
    real_B = r.mask.any(-1)
    clipped_B = jnp.abs(rewarded_score(r, method, moments)) > method.score_clip
    normalised: Metrics = {}
    optimised_B = r.score if moments is None else normalise(r.score, moments)
    if moments is not None:
        normalised = {
            "objective/scores_normalised": Mean.of(optimised_B, real_B),
            "objective/score_running_mean": moments.mean,
            "objective/score_running_std": moments.std,
        }
    kl_B = masked_sum(kl_k1(r.behavior_logp, r.ref_logp), r.mask)
    length_B = r.mask.sum(-1)
    return {
        "objective/kl": Mean.of(kl_B, real_B),
        "objective/kl_k2": Mean.of(masked_sum(kl_k2(r.behavior_logp, r.ref_logp), r.mask), real_B),
        "objective/kl_k3": Mean.of(masked_sum(kl_k3(r.behavior_logp, r.ref_logp), r.mask), real_B),
        "objective/entropy": Mean.of(-masked_sum(r.behavior_logp, r.mask), real_B),
        "objective/scores": Mean.of(r.score, real_B),
        "objective/score_clipfrac": Mean.of(clipped_B, real_B),
        **normalised,
        "objective/non_score_reward": Mean.of(-kl_coef * kl_B, real_B),
        "objective/rlhf_reward": Mean.of(optimised_B - kl_coef * kl_B, real_B),
        "objective/kl_coef": kl_coef,
        "policy/entropy_avg": Mean.of(entropy_BS, r.mask),
        "critic/explained_variance": explained_variance(r.value, batch.returns, r.mask),
        "val/num_eos_tokens": r.has_eos.sum(),
        "response_length/mean": Mean.of(length_B, real_B),
        "response_length/clip_ratio": Mean.of(~r.has_eos, real_B),
        **responses.usage(r.joined),
    }


def policy_terms(logp_BS: Float[Array, "B S"], ppo: PpoBatch, method: Method) -> tuple[Metrics, Metrics]:
    """The clipped policy loss and its metrics, from the differentiated log-probabilities."""
    rollout = ppo.rollout
    loss = ppo_policy_loss(logp_BS, rollout.behavior_logp, ppo.advantage, rollout.mask, clip=method.clip_eps)
    log_ratio_BS = jnp.where(rollout.mask, logp_BS - rollout.behavior_logp, 0.0)
    ratio_BS = jnp.exp(log_ratio_BS)
    return {"loss/policy_avg": loss}, {
        "policy/approxkl_avg": Mean.of(0.5 * log_ratio_BS**2, rollout.mask),
        "policy/clipfrac_avg": Mean.of(jnp.abs(ratio_BS - 1.0) > method.clip_eps, rollout.mask),
        "val/ratio": Mean.of(ratio_BS, rollout.mask),
    }


def actor_objective(
    model: Model,
    method: Method,
    tree: Tree,
    batch: tuple[PpoBatch, PromptBatch | None],
    allowed_V: Bool[Array, " V"],
) -> tuple[Metrics, Metrics]:
    """The clipped policy loss, plus the weighted SFT loss on demonstrations if there are any.

    `batch` holds the rollouts, and demonstrations or None.
    """
    ppo, demonstrations = batch
    tokens = forward.join(ppo.rollout.joined)
    logp_BS, _ = forward.token_logp(model, tree, tokens, temperature=method.temperature, allowed_V=allowed_V)
    terms, metrics = policy_terms(logp_BS, ppo, method)
    if demonstrations is not None:
        shown = forward.join(demonstrations)
        shown_BS, _ = forward.token_logp(model, tree, shown)
        ptx = sft_loss(shown_BS, shown.loss_mask[:, shown.scored_from :])
        terms["loss/ptx"] = Mean(method.extras.ptx_coef * ptx.total, ptx.count)
    return terms, metrics


def critic_objective(model: Model, method: Method, tree: Tree, ppo: PpoBatch) -> tuple[Metrics, Metrics]:
    """The clipped value loss."""
    return value_terms(values(model, tree, ppo.rollout.joined)[0], ppo, method)


def value_terms(value_BS: Float[Array, "B S"], ppo: PpoBatch, method: Method) -> tuple[Metrics, Metrics]:
    """The clipped value loss and its metrics, from the differentiated values."""
    rollout = ppo.rollout
    loss = value_loss(value_BS, rollout.value, ppo.returns, rollout.mask, clip=method.value_clip_eps)
    clipped_BS = jnp.abs(value_BS - rollout.value) > method.value_clip_eps
    return {"loss/value_avg": loss}, {"val/clipfrac_avg": Mean.of(clipped_BS, rollout.mask)}


def one_pass(
    actor_model: Model,
    reward_model: Model,
    method: Method,
    trained: tuple[Tree, Tree],
    rest: tuple[Tree, Tree],
    frozen: tuple[Tree, Tree],
    joined: PromptBatch,
    has_eos_B: Bool[Array, " B"],
    allowed_V: Bool[Array, " V"],
    kl_coef: Float[Array, ""],
    count: Float[Array, ""],
    score_B: Float[Array, " B"] | None = None,
) -> tuple[tuple[Tree, Tree], tuple[PpoBatch, Float[Array, "B S"]], tuple[Metrics, Metrics]]:
    """Scores rollouts and differentiates both losses for the first update, with one forward pass per model.

    In the first update the trained policy is the one that sampled, so its log-probabilities are also the old ones, and
    likewise for the critic's values: the same forward pass scores and is differentiated.

    Args:
      trained: trainable parts of actor and critic.
      rest: frozen parts of actor and critic.
      frozen: parameters of reference and reward model.
      count: number of response tokens in the whole batch; these rows may be a micro-batch of it.
      score_B: as for `score_rollout`.

    Returns:
      Gradients of actor and critic; the batch and the policy's entropy; terms and metrics of actor and critic.
    """
    tokens = forward.join(joined)

    def policy(part: Tree) -> tuple[Array, Array]:
        tree = merge({"trainable": part, "frozen": rest[0]})
        return forward.token_logp(
            actor_model, tree, tokens, temperature=method.temperature, allowed_V=allowed_V, with_entropy=True
        )

    logp_BS, pull_policy, entropy_BS = jax.vjp(policy, trained[0], has_aux=True)

    def critic(part: Tree) -> tuple[Array, Array]:
        return values(reward_model, merge({"trainable": part, "frozen": rest[1]}), joined)

    value_BS, pull_value, end_B1 = jax.vjp(critic, trained[1], has_aux=True)
    kept_BS = with_end(value_BS, end_B1, joined)
    rollout = with_frozen_scores(
        actor_model, reward_model, method.temperature, frozen, joined, has_eos_B, allowed_V, logp_BS, kept_BS, score_B
    )
    ppo, _ = estimate(rollout, method, kl_coef)

    def losses(logp_BS: Array, value_BS: Array) -> tuple[Array, tuple[Metrics, Metrics]]:
        policy_loss, policy_metrics = policy_terms(logp_BS, ppo, method)
        critic_loss, critic_metrics = value_terms(value_BS, ppo, method)
        total = sum(term.total for term in (*policy_loss.values(), *critic_loss.values()))
        return total / jnp.maximum(count, 1.0), ({**policy_loss, **policy_metrics}, {**critic_loss, **critic_metrics})

    (d_logp_BS, d_value_BS), found = jax.grad(losses, (0, 1), has_aux=True)(logp_BS, value_BS)
    return (pull_policy(d_logp_BS)[0], pull_value(d_value_BS)[0]), (ppo, entropy_BS), found
