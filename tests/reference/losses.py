"""Losses as (sum, count), one element at a time. `keep` is the mask of tokens or of pairs."""

import math

import numpy as np


def log_sigmoid(z):
    return -math.log1p(math.exp(-z)) if z >= 0 else z - math.log1p(math.exp(z))


def _reduce(element, keep):
    """Sum of element(index) over the kept indices, and their number."""
    indices = [tuple(int(i) for i in index) for index in np.argwhere(keep)]
    return math.fsum(element(*index) for index in indices), len(indices)


def sft(logp, keep):
    return _reduce(lambda b, t: -float(logp[b, t]), keep)


def bradley_terry(chosen, rejected, keep):
    return _reduce(lambda b: -log_sigmoid(float(chosen[b]) - float(rejected[b])), keep)


def span(score, ids, length, keep):
    def pair(b):
        end = int(max(length[b]))
        start = end - 1
        for t in reversed(range(end)):
            one_ended = (t < length[b, 0]) != (t < length[b, 1])
            if one_ended or ids[b, 0, t] != ids[b, 1, t]:
                start = t
        terms = [-log_sigmoid(float(score[b, 0, t]) - float(score[b, 1, t])) for t in range(start, end)]
        return math.fsum(terms) / len(terms)

    return _reduce(pair, keep)


def dpo(margin, ref_margin, keep, beta):
    return _reduce(lambda b: -log_sigmoid(beta * (float(margin[b]) - float(ref_margin[b]))), keep)


def cdpo(margin, ref_margin, keep, beta, label_smoothing):
    right, count = dpo(margin, ref_margin, keep, beta)
    wrong, _ = dpo(ref_margin, margin, keep, beta)
    return (1 - label_smoothing) * right + label_smoothing * wrong, count


def ipo(margin, ref_margin, keep, beta):
    return _reduce(lambda b: (float(margin[b]) - float(ref_margin[b]) - 1 / (2 * beta)) ** 2, keep)


def simpo(logp, length, keep, beta, target_margin):
    """Of summed log-probabilities [B 2] and lengths [B 2]."""

    def pair(b):
        chosen, rejected = (float(logp[b, n]) / int(length[b, n]) for n in (0, 1))
        return -log_sigmoid(beta * chosen - beta * rejected - target_margin)

    return _reduce(pair, keep)


def chosen_nll(logp, length, keep):
    return _reduce(lambda b: -float(logp[b]) / int(length[b]), keep)


def ppo_policy(logp, old_logp, advantage, keep, clip):
    def token(b, t):
        ratio = math.exp(float(logp[b, t]) - float(old_logp[b, t]))
        a = float(advantage[b, t])
        return max(-a * ratio, -a * min(max(ratio, 1 - clip), 1 + clip))

    return _reduce(token, keep)


def value(new, old, returns, keep, clip):
    def token(b, t):
        v, v_old, r = float(new[b, t]), float(old[b, t]), float(returns[b, t])
        clipped = min(max(v, v_old - clip), v_old + clip)
        return 0.5 * max((v - r) ** 2, (clipped - r) ** 2)

    return _reduce(token, keep)
