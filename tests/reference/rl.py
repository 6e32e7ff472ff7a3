"""Reward shaping, advantages and statistics, row by row and token by token."""

import math

import numpy as np


def _kept(mask):
    return [[t for t in range(mask.shape[1]) if mask[b, t]] for b in range(mask.shape[0])]


def _values(x, mask):
    return [float(x[b, t]) for b, kept in enumerate(_kept(mask)) for t in kept]


def masked_sum(x, mask):
    return np.array([math.fsum(float(x[b, t]) for t in kept) for b, kept in enumerate(_kept(mask))])


def masked_mean(x, mask):
    values = _values(x, mask)
    return math.fsum(values) / len(values) if values else 0.0


def last_index(mask):
    return np.array([kept[-1] if kept else 0 for kept in _kept(mask)])


def whiten(x, mask, shift_mean=True, eps=1e-8):
    values = _values(x, mask)
    out = np.zeros(mask.shape)
    if not values:
        return out
    mean = math.fsum(values) / len(values)
    var = math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    for b, kept in enumerate(_kept(mask)):
        for t in kept:
            out[b, t] = (float(x[b, t]) - mean) / math.sqrt(var + eps) + (0.0 if shift_mean else mean)
    return out


def shape_rewards(logp, ref_logp, score, mask, kl_coef, clip):
    out = np.zeros(mask.shape)
    for b, kept in enumerate(_kept(mask)):
        for t in kept:
            out[b, t] = -kl_coef * (float(logp[b, t]) - float(ref_logp[b, t]))
        if kept:
            out[b, kept[-1]] += min(max(float(score[b]), -clip), clip)
    return out


def shape_rewards_ds_chat(logp, ref_logp, score, mask, kl_coef, clip):
    """The same, as if each response were one token longer where the row has room for it."""
    carry = np.array(mask)
    for b, kept in enumerate(_kept(mask)):
        if kept and kept[-1] + 1 < mask.shape[1]:
            carry[b, kept[-1] + 1] = True
    return shape_rewards(logp, ref_logp, score, carry, kl_coef, clip), carry


def gae(reward, value, mask, gamma=1.0, gae_lambda=0.95):
    """A_t = sum_k (gamma gae_lambda)^k delta_{t+k}: the definition, not the recursion."""
    advantage, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, kept in enumerate(_kept(mask)):
        v = [float(value[b, t]) for t in kept] + [0.0]
        delta = [float(reward[b, t]) + gamma * v[i + 1] - v[i] for i, t in enumerate(kept)]
        for i, t in enumerate(kept):
            advantage[b, t] = math.fsum((gamma * gae_lambda) ** k * d for k, d in enumerate(delta[i:]))
            returns[b, t] = advantage[b, t] + v[i]
    return advantage, returns


def running_moments(scores):
    """Mean and unbiased standard deviation of all scores so far, from the whole list."""
    mean = math.fsum(scores) / len(scores)
    return mean, math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1))


def adaptive_kl_coef(kl_coef, kl, target, horizon, num_samples):
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)


def explained_variance(value, returns, mask):
    residual = [r - v for v, r in zip(_values(value, mask), _values(returns, mask), strict=True)]
    total = np.var(_values(returns, mask)) if residual else 0.0
    return 1.0 - np.var(residual) / total if total > 0 else 0.0
