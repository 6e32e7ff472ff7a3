"""Array mathematics shared by losses and stages. Sources: PPO arXiv:1707.06347, GAE arXiv:1506.02438.

Index t of every token array refers to token t; `mask_BT` is True at response tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.types import Moments


def masked_sum(x_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Row sums over the kept tokens; dropped tokens never contribute, not even a NaN."""
    return jnp.where(mask_BT, x_BT, 0.0).sum(-1)


def masked_mean(x_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over all kept tokens; 0 if none is kept."""
    return masked_sum(x_BT, mask_BT).sum() / jnp.maximum(mask_BT.sum(), 1)


def last_index(mask_BT: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """Index of each row's last kept token; 0 for a row that keeps none."""
    return jnp.argmax(jnp.where(mask_BT, jnp.arange(mask_BT.shape[-1])[None], -1), -1)


def whiten(
    x_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"], *, shift_mean: bool = True, eps: float = 1e-8
) -> Float[Array, "B T"]:
    """(x - mean) / sqrt(var + eps) over the kept tokens, unbiased variance; dropped tokens become 0.

    With `shift_mean=False` the mean is added back, so only the scale changes.
    """
    count = jnp.maximum(mask_BT.sum(), 1)
    mean = masked_mean(x_BT, mask_BT)
    centred_BT = jnp.where(mask_BT, x_BT - mean, 0.0)
    var = (centred_BT**2).sum() / jnp.maximum(count - 1, 1)
    white_BT = centred_BT * jax.lax.rsqrt(var + eps)
    return white_BT if shift_mean else jnp.where(mask_BT, white_BT + mean, 0.0)


def add_to_moments(moments: Moments, x_B: Float[Array, " B"], mask_B: Bool[Array, " B"]) -> Moments:
    """Updates the moments with all kept numbers at once; a kept NaN or infinity leaves the moments unchanged.

    Pairwise update of Chan, Golub and LeVeque (1983), eq. 1.5: m2 = m2_a + m2_b + delta^2 n_a n_b / (n_a + n_b).
    """
    added = mask_B.sum().astype(jnp.float32)
    mean = jnp.where(mask_B, x_B, 0.0).sum() / jnp.maximum(added, 1.0)
    m2 = (jnp.where(mask_B, x_B - mean, 0.0) ** 2).sum()
    delta, share = mean - moments.mean, added / jnp.maximum(moments.count + added, 1.0)
    merged = Moments(
        moments.count + added, moments.mean + delta * share, moments.m2 + m2 + delta**2 * moments.count * share
    )
    finite = jnp.isfinite(merged.mean) & jnp.isfinite(merged.m2)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), merged, moments)


def normalise(x_B: Float[Array, " B"], moments: Moments) -> Float[Array, " B"]:
    """(x - mean) / std; x - mean if the standard deviation is 0."""
    return (x_B - moments.mean) / jnp.where(moments.std > 0, moments.std, 1.0)


def kl_k1(logp: Float[Array, "*S"], ref_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """log p - log q at samples of p: an unbiased estimate of KL(p, q) that may be negative. nats."""
    return logp - ref_logp


def kl_k2(logp: Float[Array, "*S"], ref_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """(log p - log q)^2 / 2 at samples of p: a biased, low-variance estimate of KL(p, q), never negative. nats."""
    return 0.5 * jnp.square(logp - ref_logp)


def kl_k3(logp: Float[Array, "*S"], ref_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """exp(-k1) - 1 + k1 at samples of p: an unbiased estimate of KL(p, q), never negative. nats."""
    k1 = logp - ref_logp
    return jnp.expm1(-k1) + k1


def shape_rewards(
    logp_BT: Float[Array, "B T"],
    ref_logp_BT: Float[Array, "B T"],
    score_B: Float[Array, " B"],
    mask_BT: Bool[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
    clip: float,
) -> Float[Array, "B T"]:
    """-kl_coef (logp - ref_logp) at every response token, plus the score clipped to +-clip at the last one.

    Dropped tokens get 0; a row without kept tokens gets no reward.
    """
    return _place_score(logp_BT, ref_logp_BT, score_B, mask_BT, last_index(mask_BT), kl_coef, clip)


def shape_rewards_ds_chat(
    logp_BT: Float[Array, "B T"],
    ref_logp_BT: Float[Array, "B T"],
    score_B: Float[Array, " B"],
    mask_BT: Bool[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
    clip: float,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """`shape_rewards` with the score one index after the last response token, if that index exists.

    DeepSpeed-Chat's placement: its rewards, KL penalty included, run one token past EOS. Returns the rewards and the
    mask of the indices that carry a reward. Estimate advantages over that mask, with the value of the state after the
    response at the added index; losses still use `mask_BT`.
    """
    after_B = jnp.minimum(last_index(mask_BT) + 1, mask_BT.shape[-1] - 1)
    index_T = jnp.arange(mask_BT.shape[-1])[None]
    carry_BT = mask_BT | ((index_T == after_B[:, None]) & mask_BT.any(-1)[:, None])
    return _place_score(logp_BT, ref_logp_BT, score_B, carry_BT, after_B, kl_coef, clip), carry_BT


def _place_score(logp_BT, ref_logp_BT, score_B, mask_BT, at_B, kl_coef, clip):
    kl_BT = jnp.where(mask_BT, kl_k1(logp_BT, ref_logp_BT), 0.0)
    at_BT = (jnp.arange(mask_BT.shape[-1])[None] == at_B[:, None]) & mask_BT
    return -kl_coef * kl_BT + jnp.where(at_BT, jnp.clip(score_B, -clip, clip)[:, None], 0.0)


def gae(
    reward_BT: Float[Array, "B T"],
    value_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation; returns (advantage, returns), both 0 at dropped tokens.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma gae_lambda A_{t+1};  returns = A + V.
    V after the last kept token is 0, and dropped tokens are skipped. Eq. 16 of arXiv:1506.02438.
    """

    def backwards(carry, x):
        next_value_B, next_advantage_B = carry
        reward_B, value_B, mask_B = x
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = delta_B + gamma * gae_lambda * next_advantage_B
        kept = (jnp.where(mask_B, value_B, next_value_B), jnp.where(mask_B, advantage_B, next_advantage_B))
        return kept, jnp.where(mask_B, advantage_B, 0.0)

    zero_B = jnp.zeros_like(reward_BT[:, 0])
    _, advantage_TB = jax.lax.scan(backwards, (zero_B, zero_B), (reward_BT.T, value_BT.T, mask_BT.T), reverse=True)
    advantage_BT = advantage_TB.T
    return advantage_BT, jnp.where(mask_BT, advantage_BT + value_BT, 0.0)


def adaptive_kl_coef(
    kl_coef: Float[Array, ""], kl: Float[Array, ""], *, target: float, horizon: float, num_samples: int
) -> Float[Array, ""]:
    """Log-space proportional controller: coef * (1 + clip(kl / target - 1, +-0.2) * n / horizon).

    `kl` is the mean KL per response in nats. Section 2.2 of arXiv:1909.08593.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)


def explained_variance(
    value_BT: Float[Array, "B T"], returns_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """1 - var(returns - value) / var(returns) over the kept tokens; 0 if the returns are constant."""
    count = jnp.maximum(mask_BT.sum(), 1)

    def variance(x_BT):
        return (jnp.where(mask_BT, x_BT - masked_mean(x_BT, mask_BT), 0.0) ** 2).sum() / count

    total = variance(returns_BT)
    return jnp.where(total > 0, 1.0 - variance(returns_BT - value_BT) / jnp.where(total > 0, total, 1.0), 0.0)
