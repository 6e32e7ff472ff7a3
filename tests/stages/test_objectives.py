"""What each stage's objective must give at known points."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config.schema import OptimConfig
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.stages import dpo, reward, sft
from mpo_jax.stages.dpo import DpoBatch
from mpo_jax.stages.preference import PreferenceLoss
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state, make_update
from mpo_jax.types import trainable
from tests.models.tiny import DECODER, batch, close, join, logits, mesh_of, random_params, response_logps

MODEL = Model(DECODER)
ALLOWED = jnp.arange(DECODER.vocab_size) > 1
PAIRS = batch([4, 3, 6, 5], [[9, 1], [2, 2], [1, 9], [5, 4]])


def test_sft_loss_is_the_nll_of_response_tokens_alone():
    params = random_params(DECODER)
    one = batch([4, 3, 6], [[5], [2], [7]])
    tokens = join(one)
    logits_BTV = np.asarray(logits(MODEL, params, tokens), np.float64)
    total = count = 0
    for b in range(3):
        row = np.concatenate([one.prompt[b, : one.prompt_len[b]], one.response[b, 0, : one.response_len[b, 0]]])
        real = [t for t in range(tokens.ids.shape[1]) if tokens.segment[b, t]]
        for place in range(int(one.prompt_len[b]), len(row)):
            before = logits_BTV[b, real[place - 1]]
            total -= before[row[place]] - np.log(np.exp(before).sum())
            count += 1
    terms, metrics = sft.objective(MODEL, params, one)
    close(terms["loss"].value, total / count)
    assert terms["loss"].count == count == 14
    assert metrics["tokens"] == 4 + 3 + 6 + 14


def test_reward_starts_at_log_2_and_half_right():
    """A zero head scores every response 0: log 2 a pair, and a tie is half right."""
    params = forward.with_score_head(random_params(DECODER), DECODER)
    terms, metrics = reward.objective(MODEL, "last_token", params, PAIRS)
    close(terms["loss"].value, math.log(2))
    assert metrics["accuracy"].value == 0.5


def test_reward_reads_the_last_real_token():
    """Scores do not depend on what lies behind a response, and do on its last token."""
    params = random_params(DECODER, head="value")
    gap = lambda pairs: reward.objective(MODEL, "last_token", params, pairs)[1]["gap"].total  # noqa: E731
    response = PAIRS.response.copy()
    response[0, 1, 5] += 1  # beyond the rejected side's one token
    assert gap(dataclasses.replace(PAIRS, response=response)) == gap(PAIRS)
    response[0, 1, 0] = (response[0, 1, 0] + 1) % DECODER.vocab_size
    assert gap(dataclasses.replace(PAIRS, response=response)) != gap(PAIRS)


@pytest.mark.parametrize(("kind", "expected"), [("dpo", math.log(2)), ("cdpo", math.log(2)), ("ipo", 25.0)])
def test_dpo_at_policy_equals_reference(kind, expected):
    """log 2 for DPO whatever the smoothing, (1 / 2 beta)^2 for IPO; implicit rewards 0 tie."""
    params = random_params(DECODER)
    ref = response_logps(MODEL, params, PAIRS)
    options = (("label_smoothing", 0.1),) if kind == "cdpo" else ()
    loss = PreferenceLoss(name=kind, beta=0.1, options=options)
    terms, metrics = dpo.objective(MODEL, loss, 0.0, params, DpoBatch(PAIRS, ref))
    close(terms["loss"].value, expected)
    assert metrics["rewards/chosen"].value == metrics["rewards/margins"].value == 0
    assert metrics["rewards/accuracies"].value == 0.5  # all pairs tie


def test_dpo_gradient_raises_chosen_and_lowers_rejected():
    params = random_params(DECODER)
    ref = response_logps(MODEL, params, PAIRS)
    objective = partial(dpo.objective, MODEL, PreferenceLoss(name="dpo", beta=0.1), 0.0)
    # with a small eps Adam's first direction is the gradient's sign
    optimizer = make_optimizer(OptimConfig(clip_norm=None, eps=1.0))
    state = with_learning_rate(init_state(trainable(params), optimizer, mesh_of(1, 1, 1)), 1e-3)
    state, _ = jax.jit(make_update(objective, optimizer))(state, DpoBatch(PAIRS, ref))
    moved = state.trainable
    after = response_logps(MODEL, moved, PAIRS)
    margin = lambda logp: (logp[:, 0] - logp[:, 1]).mean()  # noqa: E731
    assert margin(after) > margin(ref)


def test_dpo_length_normalisation_divides_both_sides():
    params, other = random_params(DECODER), random_params(DECODER, 1)
    ref = response_logps(MODEL, other, PAIRS)
    policy = response_logps(MODEL, params, PAIRS)
    loss = PreferenceLoss(name="dpo", beta=0.5, length_normalised=True)
    terms, metrics = dpo.objective(MODEL, loss, 0.0, params, DpoBatch(PAIRS, ref))
    scaled = np.asarray((policy - ref) / PAIRS.response_len)
    close(terms["loss"].value, np.mean(np.log1p(np.exp(-0.5 * (scaled[:, 0] - scaled[:, 1])))), rtol=2e-5)
    close(metrics["rewards/chosen"].value, 0.5 * scaled[:, 0].mean(), rtol=2e-5)
