"""What PPO's objective must give at known points, from sampled responses to losses and metrics."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config.schema import KlConfig, PpoConfig, PpoExtrasConfig, TrainConfig
from mpo_jax.models.forward import Model
from mpo_jax.stages import sft
from mpo_jax.stages.ppo import objective as ppo_objective
from mpo_jax.stages.ppo.settings import Method
from mpo_jax.types import Rollout
from tests.models.tiny import DECODER, batch, close, join, random_params, scores, trees_close
from tests.reference import rl
from tests.training.test_update import parted

MODEL = Model(DECODER)
ALLOWED = jnp.arange(DECODER.vocab_size) > 1
PAIRS = batch([4, 3, 6, 5], [[9, 1], [2, 2], [1, 9], [5, 4]])
outputs = jax.jit(ppo_objective.outputs, static_argnums=(0, 1, 2))
estimate = jax.jit(ppo_objective.estimate, static_argnums=1)


def method_of(**options):
    """PPO's method under these keys of its section."""
    return Method.of(PpoConfig(**{"train": TrainConfig(batch_size=4), **options}))


def score(actor, reference, *, method=None, samples=None, has_eos=None, critic=5):
    """A scored rollout of given samples and its metrics; 6 is the seed of the reward model."""
    method = method or method_of()
    samples = samples or batch([4, 3, 6, 5], [[6], [2], [1], [5]])
    value_models = (random_params(DECODER, critic, head="value"), random_params(DECODER, 6, head="value"))
    has_eos = jnp.asarray([True, True, False, True]) if has_eos is None else has_eos
    found = outputs(MODEL, MODEL, method.temperature, (actor, reference), value_models, samples, samples, ALLOWED)
    rollout, entropy = ppo_objective.rollout_of(found, samples, has_eos), found.entropy
    kl_coef = jnp.asarray(method.kl.coef)
    estimated, shaped = estimate(rollout, method, kl_coef)
    return estimated, shaped, ppo_objective.rollout_metrics(estimated, entropy, kl_coef, method)


def allowed_samples():
    """Samples from the ids that may be sampled: 0 and 1 have probability 0."""
    samples = batch([4, 3, 6, 5], [[6], [2], [1], [5]])
    return dataclasses.replace(samples, response=np.maximum(samples.response, 2))


def test_step_0_of_mpo_has_kl_0_and_ratio_1():
    """Reference and actor are the same model before the first update: exactly 0, and a ratio of 1 everywhere."""
    actor = random_params(DECODER)
    estimated, _, metrics = score(actor, actor, samples=allowed_samples())
    assert metrics["objective/kl"].total == 0 and metrics["objective/kl_k3"].total == 0
    terms, update = ppo_objective.actor_objective(MODEL, method_of(), actor, (estimated, None), ALLOWED)
    assert update["val/ratio"].value == 1 and update["policy/clipfrac_avg"].value == 0
    close(terms["loss/policy_avg"].value, -jnp.where(estimated.rollout.mask, estimated.advantage, 0).sum() / 14)


def test_step_0_against_another_reference_has_kl():
    """mpo_sft_kl starts with a KL that is not 0: a wrong reference shows at once."""
    _, _, metrics = score(random_params(DECODER), random_params(DECODER, 1), samples=allowed_samples())
    assert abs(metrics["objective/kl"].value) > 1e-2 and metrics["objective/kl_k3"].value > 1e-2


def test_rollout_matches_the_numpy_reference():
    """Rewards, advantages and returns of ragged responses, row by row in float64."""
    method = method_of(kl=KlConfig(coef=0.3), score_clip=0.5, gamma=0.9, gae_lambda=0.8)
    estimated, shaped, metrics = score(
        random_params(DECODER), random_params(DECODER, 1), method=method, samples=allowed_samples()
    )
    r = estimated.rollout
    arrays = [np.asarray(x, np.float64) for x in (r.behavior_logp, r.ref_logp, r.score)]
    mask = np.asarray(r.mask)
    expected = rl.shape_rewards(*arrays, mask, kl_coef=0.3, clip=0.5)
    close(shaped, expected, rtol=1e-4, atol=1e-5)
    advantage, returns = rl.gae(expected, np.asarray(r.value, np.float64), mask, gamma=0.9, gae_lambda=0.8)
    close(estimated.advantage, advantage, rtol=1e-4, atol=1e-5)
    close(estimated.returns, returns, rtol=1e-4, atol=1e-5)
    assert metrics["response_length/mean"].value == 14 / 4
    assert metrics["response_length/clip_ratio"].value == 0.25 and metrics["val/num_eos_tokens"] == 3
    # 18 tokens of prompts and 14 of responses, in four rows of 6 + 6 columns
    assert metrics["tokens"] == 18 + 14
    assert metrics["perf/padding"].total == 4 * 12 - 32 and metrics["perf/padding"].count == 4 * 12
    close(
        metrics["objective/rlhf_reward"].value,
        metrics["objective/scores"].value + metrics["objective/non_score_reward"].value,
    )


def test_value_is_read_before_the_action():
    """The value of a response's first token is the critic at the prompt's last token."""
    estimated, _, _ = score(random_params(DECODER), random_params(DECODER))
    samples = batch([4, 3, 6, 5], [[6], [2], [1], [5]])
    critic = random_params(DECODER, 5, head="value")
    score_BT = scores(MODEL, critic, join(samples))
    expected = [score_BT[b, n - 1] for b, n in enumerate(samples.prompt_len)]
    np.testing.assert_array_equal(estimated.rollout.value[:, 0], jnp.stack(expected))


@pytest.mark.parametrize(("mode", "expected"), [("none", 2.0), ("replace", -3.0), ("subtract", -1.0)])
def test_missing_eos_penalty_touches_unfinished_rows_alone(mode, expected):
    extras = PpoExtrasConfig(missing_eos=mode, missing_eos_penalty=3.0)
    method = method_of(extras=extras, kl=KlConfig(coef=0.0))
    mask, zero = jnp.ones((2, 3), bool), jnp.zeros((2, 3))
    rollout = Rollout(PAIRS, mask, zero, zero, zero, jnp.asarray([2.0, 2.0]), jnp.asarray([True, False]))
    _, shaped = estimate(rollout, method, jnp.asarray(0.0))
    assert shaped[:, -1].tolist() == [2.0, expected]


def test_golden_ds_chat_case_through_the_stage():
    """ALGORITHMS' case: response [5, 6, EOS, PAD], with log-probabilities and a value at the padding token."""
    method = method_of(reward_at="ds_chat")
    mask = jnp.asarray([[True, True, True, False]])
    logp, ref = jnp.asarray([[-1.0, -2.0, -0.5, -4.0]]), jnp.asarray([[-1.1, -1.5, -0.7, -3.0]])
    value, one = jnp.asarray([[0.1, 0.2, 0.3, 0.4]]), batch([2], [[3]], width=(2, 4))
    rollout = Rollout(one, mask, logp, ref, value, jnp.asarray([1.5]), jnp.asarray([True]))
    estimated, shaped = estimate(rollout, method, jnp.asarray(0.1))
    close(shaped, [[-0.01, 0.05, -0.02, 1.6]])
    close(estimated.advantage, [[1.33355, 1.309, 1.22, 0.0]])
    close(estimated.returns, [[1.43355, 1.509, 1.52, 0.0]])


def test_ds_chat_ends_with_the_critics_value_after_eos():
    """Against NumPy, with models: the value behind the response is the critic's at the last token, and there is no KL.

    The first row fills the columns: no room for a token after its last one.
    """
    method = method_of(reward_at="ds_chat", score_clip=0.5, kl=KlConfig(coef=0.1))
    samples = allowed_samples()
    estimated, shaped, _ = score(
        random_params(DECODER), random_params(DECODER, 1), method=method, samples=samples, has_eos=jnp.ones(4, bool)
    )
    r, mask = estimated.rollout, np.asarray(estimated.rollout.mask)
    read = np.asarray(scores(MODEL, random_params(DECODER, 5, head="value"), join(samples)))
    value, width = np.zeros(mask.shape), samples.prompt.shape[1]
    for b, length in enumerate(samples.response_len[:, 0]):
        places = [
            samples.prompt_len[b] - 1,
            *range(width, width + length),
        ]  # the state before a token is its predecessor
        value[b, : min(length + 1, mask.shape[1])] = read[b, places][: mask.shape[1]]
    arrays = [np.asarray(x, np.float64) for x in (r.behavior_logp, r.ref_logp, r.score)]
    reward, carry = rl.shape_rewards_ds_chat(*arrays, mask, kl_coef=0.1, clip=0.5)
    advantage, returns = rl.gae(reward, value, carry, gae_lambda=0.95)
    close(shaped, reward, rtol=1e-4, atol=1e-5)
    close(estimated.advantage, np.where(mask, advantage, 0), rtol=1e-4, atol=1e-5)
    close(estimated.returns, np.where(mask, returns, 0), rtol=1e-4, atol=1e-5)
    assert carry.sum() == mask.sum() + 3
    close(reward[carry & ~mask], np.clip(np.asarray(r.score)[1:], -0.5, 0.5))


def test_the_return_at_eos_is_the_score_while_the_critic_is_the_reward_model():
    """ds_chat's first iteration: V after EOS is the score, so lambda shrinks nothing at EOS."""
    actor = random_params(DECODER)
    method = method_of(reward_at="ds_chat", gae_lambda=0.5, score_clip=100.0)
    estimated, _, _ = score(actor, actor, method=method, samples=allowed_samples(), critic=6)
    ends = allowed_samples().response_len[:, 0] - 1
    close(estimated.returns[np.arange(4), ends], estimated.rollout.score, rtol=1e-5)
    assert np.abs(estimated.rollout.score).min() > 1e-2


def test_ds_chat_places_the_score_after_eos():
    method = method_of(reward_at="ds_chat", kl=KlConfig(coef=0.0), gae_lambda=0.5)
    mask = jnp.asarray([[True, True, False, False], [True, True, True, True]])
    zero = jnp.zeros((2, 4))
    rollout = Rollout(PAIRS, mask, zero, zero, zero, jnp.asarray([4.0, 4.0]), jnp.asarray([True, False]))
    estimated, shaped = estimate(rollout, method, jnp.asarray(0.0))
    assert shaped.tolist() == [[0, 0, 4, 0], [0, 0, 0, 4]]
    assert estimated.advantage.tolist() == [[1, 2, 0, 0], [0.5, 1, 2, 4]]


def test_the_share_of_clipped_scores_counts_real_rows_and_the_score_that_is_rewarded():
    """Four rows, one of them padding; a missing EOS replaces a score beyond the clip by one within."""
    mask = jnp.asarray([[True], [True], [True], [False]])
    zero, raw = jnp.zeros((4, 1)), jnp.asarray([7.0, -6.0, 5.0, 9.0])
    rollout = Rollout(PAIRS, mask, zero, zero, zero, raw, jnp.asarray([True, False, True, True]))
    for mode, share in (("none", 2 / 3), ("replace", 1 / 3)):
        extras = PpoExtrasConfig(missing_eos=mode)
        method = method_of(extras=extras)
        estimated, _ = estimate(rollout, method, jnp.asarray(0.0))
        metrics = ppo_objective.rollout_metrics(estimated, zero, jnp.asarray(0.0), method)
        close(metrics["objective/score_clipfrac"].value, share)
        assert not [name for name in metrics if "normalised" in name or "running" in name]


def test_whitening_options_scale_but_keep_the_mask():
    extras = PpoExtrasConfig(whiten_advantages=True, whiten_rewards=True)
    method = method_of(extras=extras)
    estimated, _, _ = score(random_params(DECODER), random_params(DECODER, 1), method=method, samples=allowed_samples())
    kept = np.asarray(estimated.advantage)[np.asarray(estimated.rollout.mask)]
    close(kept.mean(), 0.0, atol=1e-6)
    close(kept.std(ddof=1), 1.0, rtol=1e-4)
    assert not np.asarray(estimated.advantage)[~np.asarray(estimated.rollout.mask)].any()


@pytest.mark.thorough
def test_ptx_adds_the_sft_loss_with_its_weight():
    actor = random_params(DECODER)
    method = method_of(extras=PpoExtrasConfig(ptx_coef=0.5))
    estimated, _, _ = score(actor, actor, method=method, samples=allowed_samples())
    shown = batch([2, 2, 3, 4], [[3], [1], [2], [2]])
    terms, _ = ppo_objective.actor_objective(MODEL, method, actor, (estimated, shown), ALLOWED)
    close(terms["loss/ptx"].value, 0.5 * sft.objective(MODEL, actor, shown)[0]["loss"].value)


@pytest.mark.thorough
def test_one_pass_gives_trainable_parts_the_gradients_of_whole_models():
    """And the same rollout, where the rest of actor and critic is frozen."""
    trees = random_params(DECODER), random_params(DECODER, 5, head="value")
    value_models = random_params(DECODER, 1), random_params(DECODER, 6, head="value")
    joined, kl_coef, count = allowed_samples(), jnp.asarray(0.1), jnp.asarray(14.0)
    inputs = joined, joined, jnp.asarray([True, True, False, True]), ALLOWED, kl_coef, count
    run = jax.jit(partial(ppo_objective.one_pass, MODEL, MODEL, method_of()))
    whole, whole_kept, whole_found = run(trees, ({}, {}), value_models, *inputs)
    parts = [parted(tree) for tree in trees]
    trained, rest = (tuple(part[name] for part in parts) for name in ("trainable", "frozen"))
    grads, kept, found = run(trained, rest, value_models, *inputs)
    trees_close(grads, tuple(parted(grad)["trainable"] for grad in whole), rtol=1e-4, atol=1e-5)
    trees_close((kept, found), (whole_kept, whole_found), rtol=1e-4, atol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
