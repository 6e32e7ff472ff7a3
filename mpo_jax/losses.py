"""Losses: arrays in, `Mean`s out. No model, no config, no key.

Log-probabilities are natural logs in nats; "margin" is log p(chosen) - log p(rejected), each summed over the response.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.types import Mean


def _kept(x_B, valid_B):
    """x at valid pairs, else 0: if only the sum were masked, NaN from a padding row would reach the gradient."""
    return x_B if valid_B is None else jnp.where(valid_B, x_B, 0.0)


def sft_loss(logp_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> Mean:
    """-log p of each response token, nats per token."""
    return Mean.of(-logp_BT, mask_BT)


def bradley_terry_loss(
    chosen_score_B: Float[Array, " B"],
    rejected_score_B: Float[Array, " B"],
    valid_B: Bool[Array, " B"] | None = None,
) -> Mean:
    """-log sigmoid(r_w - r_l), nats per pair. Eq. 1 of arXiv:2203.02155."""
    return Mean.of(-jax.nn.log_sigmoid(_kept(chosen_score_B - rejected_score_B, valid_B)), valid_B)


def span_reward_loss(
    score_BNT: Float[Array, "B 2 T"],
    ids_BNT: Int[Array, "B 2 T"],
    length_BN: Int[Array, "B 2"],
    valid_B: Bool[Array, " B"] | None = None,
) -> Mean:
    """Token-wise -log sigmoid(r_w - r_l), averaged over [first differing index, longer end), nats per pair.

    DeepSpeed-Chat's reward loss. Both sides start at the same token; `length_BN` counts real tokens. Identical sides
    are compared at their last token only.
    """
    index_T = jnp.arange(ids_BNT.shape[-1])[None]
    end_B = length_BN.max(-1)
    # past the end of a side is padding, which counts as different from any real token, whatever the pad id
    real_BNT = index_T[None] < length_BN[..., None]
    differs_BT = (ids_BNT[:, 0] != ids_BNT[:, 1]) | (real_BNT[:, 0] != real_BNT[:, 1])
    differs_BT &= index_T < end_B[:, None]
    start_B = jnp.where(differs_BT.any(-1), jnp.argmax(differs_BT, -1), end_B - 1)
    span_BT = (index_T >= start_B[:, None]) & (index_T < end_B[:, None])
    keep_BT = span_BT if valid_B is None else span_BT & valid_B[:, None]
    gap_BT = jnp.where(keep_BT, score_BNT[:, 0] - score_BNT[:, 1], 0.0)
    loss_BT = -jax.nn.log_sigmoid(gap_BT)
    loss_B = jnp.where(span_BT, loss_BT, 0.0).sum(-1) / jnp.maximum(span_BT.sum(-1), 1)
    return Mean.of(loss_B, valid_B)


def dpo_loss(
    policy_margin_B: Float[Array, " B"],
    ref_margin_B: Float[Array, " B"],
    *,
    beta: float,
    valid_B: Bool[Array, " B"] | None = None,
) -> Mean:
    """-log sigmoid(beta (policy margin - reference margin)), nats per pair. Eq. 7 of arXiv:2305.18290."""
    return Mean.of(-jax.nn.log_sigmoid(beta * _kept(policy_margin_B - ref_margin_B, valid_B)), valid_B)


def cdpo_loss(
    policy_margin_B: Float[Array, " B"],
    ref_margin_B: Float[Array, " B"],
    *,
    beta: float,
    label_smoothing: float,
    valid_B: Bool[Array, " B"] | None = None,
) -> Mean:
    """DPO if a label is wrong with probability `label_smoothing`: the expected loss over both orders.

    -(1 - e) log sigmoid(z) - e log sigmoid(-z), z = beta (policy margin - reference margin). Eq. 3 of Mitchell's note
    on DPO under noisy labels (2023).
    """
    z_B = beta * _kept(policy_margin_B - ref_margin_B, valid_B)
    loss_B = -(1 - label_smoothing) * jax.nn.log_sigmoid(z_B) - label_smoothing * jax.nn.log_sigmoid(-z_B)
    return Mean.of(loss_B, valid_B)


def ipo_loss(
    policy_margin_B: Float[Array, " B"],
    ref_margin_B: Float[Array, " B"],
    *,
    beta: float,
    valid_B: Bool[Array, " B"] | None = None,
) -> Mean:
    """(policy margin - reference margin - 1 / (2 beta))^2 per pair. Eq. 17 of arXiv:2310.12036."""
    return Mean.of(jnp.square(_kept(policy_margin_B - ref_margin_B, valid_B) - 0.5 / beta), valid_B)


def chosen_nll_loss(
    chosen_logp_B: Float[Array, " B"],
    chosen_len_B: Int[Array, " B"],
    valid_B: Bool[Array, " B"] | None = None,
) -> Mean:
    """-log p(chosen) / response tokens, nats per token, averaged over pairs; DPO's added term in arXiv:2404.19733."""
    return Mean.of(-chosen_logp_B / jnp.maximum(chosen_len_B, 1), valid_B)


def ppo_policy_loss(
    logp_BT: Float[Array, "B T"],
    old_logp_BT: Float[Array, "B T"],
    advantage_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    clip: float,
) -> Mean:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) per token, rho = exp(logp - old logp). Eq. 7, arXiv:1707.06347."""
    # mask the inputs, not only the sum: 0 times a NaN derivative is still NaN
    advantage_BT = jnp.where(mask_BT, advantage_BT, 0.0)
    log_ratio_BT = jnp.where(mask_BT, logp_BT - old_logp_BT, 0.0)
    ratio_BT = jnp.exp(log_ratio_BT)
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip, 1.0 + clip)
    return Mean.of(jnp.maximum(-advantage_BT * ratio_BT, -advantage_BT * clipped_BT), mask_BT)


def value_loss(
    value_BT: Float[Array, "B T"],
    old_value_BT: Float[Array, "B T"],
    returns_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    clip: float,
) -> Mean:
    """0.5 max((V - R)^2, (V_clipped - R)^2) per token, V_clipped within +-clip of the old value (DeepSpeed-Chat)."""
    value_BT, old_value_BT, returns_BT = (jnp.where(mask_BT, x, 0.0) for x in (value_BT, old_value_BT, returns_BT))
    clipped_BT = old_value_BT + jnp.clip(value_BT - old_value_BT, -clip, clip)
    return Mean.of(0.5 * jnp.maximum((value_BT - returns_BT) ** 2, (clipped_BT - returns_BT) ** 2), mask_BT)
