"""PPO's computations on models: from sampled responses to scores, advantages, losses and their metrics.

Sources: arXiv:1707.06347, arXiv:2009.01325, DeepSpeed-Chat.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mpo_jax.losses import ppo_policy_loss, sft_loss, value_loss
from mpo_jax.models import forward, responses
from mpo_jax.models.forward import Model
from mpo_jax.models.responses import Rows
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
from mpo_jax.types import Mean, Metrics, Moments, Packed, PackedRows, PpoBatch, PromptBatch, Rollout, Tree, merge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the models say of samples; token arrays are [B S], and 0 where a row has no token.

    Attributes:
      behavior_logp, entropy: log-probability and entropy under the policy, nats.
      ref_logp: log-probability under the reference, nats.
      value: as in `Rollout`.
      score: [B] raw scores of the reward model.
    """

    behavior_logp: Float[Array, "B S"]
    entropy: Float[Array, "B S"]
    ref_logp: Float[Array, "B S"]
    value: Float[Array, "B S"]
    score: Float[Array, " B"]


def outputs(
    actor_model: Model,
    reward_model: Model,
    temperature: float,
    policies: tuple[Tree, Tree],
    value_models: tuple[Tree, Tree | None],
    joined: PromptBatch,
    rows: Rows,
    allowed_V: Bool[Array, " V"],
) -> Outputs:
    """Runs every model once over the sampled responses.

    Args:
      policies: parameters of actor and reference.
      value_models: parameters of critic and reward model; None for scores of 0.
      rows: the samples as the models read them: `joined`, or a packed micro-batch of it, whose prompts alone count.
    """
    width, drawn = joined.response.shape[2], {"temperature": temperature, "allowed_V": allowed_V}
    logp_BS, entropy_BS = responses.sample_logps(actor_model, policies[0], rows, width, **drawn, with_entropy=True)
    value_BS = with_end(*responses.sample_values(reward_model, value_models[0], rows, width), joined)
    ref_BS, score_B = frozen_outputs(actor_model, reward_model, (policies[1], value_models[1]), rows, width, **drawn)
    return Outputs(logp_BS, entropy_BS, ref_BS, value_BS, score_B)


def frozen_outputs(
    actor_model: Model, reward_model: Model, frozen: tuple[Tree, Tree | None], rows: Rows, width: int, **drawn: Any
) -> tuple[Float[Array, "B S"], Float[Array, " B"]]:
    """The reference's log-probabilities and the reward model's scores.

    Args:
      frozen: parameters of reference and reward model; None for scores of 0.
      drawn: temperature and allowed ids of the samples.
    """
    ref_BS, _ = responses.sample_logps(actor_model, frozen[0], rows, width, **drawn)
    if frozen[1] is None:
        return ref_BS, jnp.zeros(len(ref_BS))
    return ref_BS, responses.scores(reward_model, frozen[1], rows)[:, 0]


def rollout_of(
    found: Outputs, joined: PromptBatch, has_eos_B: Bool[Array, " B"], score_B: Float[Array, " B"] | None = None
) -> Rollout:
    """The outputs as a rollout.

    Args:
      score_B: scores from outside; None: those of the outputs.
    """
    return Rollout(
        joined=joined,
        mask=sample_mask(joined),
        behavior_logp=found.behavior_logp,
        ref_logp=found.ref_logp,
        value=found.value,
        score=found.score if score_B is None else score_B,
        has_eos=has_eos_B,
    )


def sample_mask(joined: PromptBatch) -> Bool[Array, "B S"]:
    """True at the samples' tokens; none of a padding row's."""
    tokens = forward.join(joined)
    return tokens.loss_mask[:, tokens.scored_from :]


def with_end(value_BS: Float[Array, "B S"], end_B1: Float[Array, "B 1"], joined: PromptBatch) -> Float[Array, "B S"]:
    """The values, with the value of the final state in the column after the last token, if that column exists.

    The alignment holds: a column has the value of the state before it, and the final state precedes that column.
    """
    behind_BS = jnp.arange(value_BS.shape[1])[None] == joined.response_len[:, :1]
    return jnp.where(behind_BS & (joined.prompt_len > 0)[:, None], end_B1, value_BS)


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
        # log-probs there; `sample_logps` gives 0 for both, since no policy can sample the padding token.
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
    batch: PpoBatch,
    entropy_BS: Array,
    kl_coef: Array,
    method: Method,
    moments: Moments | None = None,
    packed: Packed | None = None,
) -> Metrics:
    """Metrics of the rollout, before any update; sums run over a response, means over responses.

    Args:
      packed: the rollout as the models read it; None: padded.
    """
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
        **responses.usage(r.joined if packed is None else packed),
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

    `batch` holds the rollouts, and demonstrations or None; demonstrations need padded rollouts, which are cut into
    micro-batches as they are.
    """
    rows, ppo = _read(batch[0])
    logp_BS, _ = responses.sample_logps(
        model, tree, rows, ppo.advantage.shape[1], temperature=method.temperature, allowed_V=allowed_V
    )
    terms, metrics = policy_terms(logp_BS, ppo, method)
    if batch[1] is not None:
        shown = forward.join(batch[1])
        shown_BS, _ = forward.token_logp(model, tree, shown)
        ptx = sft_loss(shown_BS, shown.loss_mask[:, shown.scored_from :])
        terms["loss/ptx"] = Mean(method.extras.ptx_coef * ptx.total, ptx.count)
    return terms, metrics


def critic_objective(model: Model, method: Method, tree: Tree, batch: PpoBatch) -> tuple[Metrics, Metrics]:
    """The clipped value loss."""
    rows, ppo = _read(batch)
    return value_terms(responses.sample_values(model, tree, rows, ppo.advantage.shape[1])[0], ppo, method)


def _read(ppo: PpoBatch) -> tuple[Rows, PpoBatch]:
    """What the models read, and the rollouts with the tokens masked that it does not hold."""
    if ppo.packed is None:
        return ppo.rollout.joined, ppo
    assert isinstance(ppo.packed, PackedRows)
    mask = ppo.rollout.mask & responses.valid(ppo.packed)[:, None]
    return ppo.packed, dataclasses.replace(ppo, rollout=dataclasses.replace(ppo.rollout, mask=mask))


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
    frozen: tuple[Tree, Tree | None],
    joined: PromptBatch,
    rows: Rows,
    has_eos_B: Bool[Array, " B"],
    allowed_V: Bool[Array, " V"],
    kl_coef: Float[Array, ""],
    count: Float[Array, ""],
    score_B: Float[Array, " B"] | None = None,
) -> tuple[tuple[Tree, Tree], tuple[Outputs, Array, Array], tuple[Metrics, Metrics]]:
    """Scores rollouts and differentiates both losses for the first update, with one forward pass per model.

    In the first update the trained policy is the one that sampled, so its log-probabilities are also the old ones, and
    likewise for the critic's values: the same forward pass scores and is differentiated.

    Args:
      trained: trainable parts of actor and critic.
      rest: frozen parts of actor and critic.
      frozen: parameters of reference and reward model; None for scores from outside.
      joined, rows: as for `outputs`.
      count: number of response tokens in the whole batch; these rows may be a micro-batch of it.
      score_B: the samples' scores from outside; None: the reward model's.

    Returns:
      Gradients of actor and critic; the models' outputs, the advantages and the returns; terms and metrics of both.
    """
    width, drawn = joined.response.shape[2], {"temperature": method.temperature, "allowed_V": allowed_V}

    def policy(part: Tree) -> tuple[Array, Array]:
        tree = merge({"trainable": part, "frozen": rest[0]})
        return responses.sample_logps(actor_model, tree, rows, width, **drawn, with_entropy=True)

    logp_BS, pull_policy, entropy_BS = jax.vjp(policy, trained[0], has_aux=True)

    def critic(part: Tree) -> tuple[Array, Array]:
        tree = merge({"trainable": part, "frozen": rest[1]})
        return responses.sample_values(reward_model, tree, rows, width)

    value_BS, pull_value, end_B1 = jax.vjp(critic, trained[1], has_aux=True)
    ref_BS, found_B = frozen_outputs(actor_model, reward_model, frozen, rows, width, **drawn)
    found = Outputs(logp_BS, entropy_BS, ref_BS, with_end(value_BS, end_B1, joined), found_B)
    rollout = rollout_of(found, joined, has_eos_B, score_B)
    mask_BS = rollout.mask & responses.valid(rows)[:, None]
    ppo, _ = estimate(dataclasses.replace(rollout, mask=mask_BS), method, kl_coef)

    def losses(logp_BS: Array, value_BS: Array) -> tuple[Array, tuple[Metrics, Metrics]]:
        policy_loss, policy_metrics = policy_terms(logp_BS, ppo, method)
        critic_loss, critic_metrics = value_terms(value_BS, ppo, method)
        total = sum(term.total for term in (*policy_loss.values(), *critic_loss.values()))
        return total / jnp.maximum(count, 1.0), ({**policy_loss, **policy_metrics}, {**critic_loss, **critic_metrics})

    (d_logp_BS, d_value_BS), measured = jax.grad(losses, (0, 1), has_aux=True)(logp_BS, value_BS)
    grads = (pull_policy(d_logp_BS)[0], pull_value(d_value_BS)[0])
    return grads, (found, ppo.advantage, ppo.returns), measured
