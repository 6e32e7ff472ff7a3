"""What each stage's objective must give at known points."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config import Config, KlConfig, OptimConfig, PpoConfig, PpoExtrasConfig, TrainConfig
from mpo_jax.model import functional
from mpo_jax.model.functional import Model
from mpo_jax.sharding import place_batch
from mpo_jax.stages import dpo, ppo, reward, sft
from mpo_jax.train import init_state, make_update
from mpo_jax.types import Mean, Rollout
from tests.model.tiny import DECODER, batch, close, mesh_of, random_params, trees_close
from tests.reference import rl

pytestmark = pytest.mark.unoptimised

MODEL = Model(DECODER)
ALLOWED = jnp.arange(DECODER.vocab_size) > 1
PAIRS = batch([4, 3, 6, 5], [[9, 1], [2, 2], [1, 9], [5, 4]])


def test_sft_loss_is_the_nll_of_response_tokens_alone():
    params = random_params(DECODER)
    one = batch([4, 3, 6], [[5], [2], [7]])
    tokens = functional.join(one)
    logits = np.asarray(functional.logits(MODEL, params, tokens), np.float64)
    total = count = 0
    for b in range(3):
        row = np.concatenate([one.prompt[b, : one.prompt_len[b]], one.response[b, 0, : one.response_len[b, 0]]])
        real = [t for t in range(tokens.ids.shape[1]) if tokens.segment[b, t]]
        for place in range(int(one.prompt_len[b]), len(row)):
            before = logits[b, real[place - 1]]
            total -= before[row[place]] - np.log(np.exp(before).sum())
            count += 1
    terms, metrics = sft.objective(MODEL, params, one)
    close(terms["loss"].value, total / count)
    assert terms["loss"].count == count == 14
    assert metrics["tokens"] == 4 + 3 + 6 + 14


def test_reward_starts_at_log_2_and_half_right_is_not_counted():
    """A zero head scores every response 0: log 2 a pair, and a tie is not accurate."""
    params = functional.with_score_head(random_params(DECODER), DECODER)
    terms, metrics = reward.objective(MODEL, "last_token", params, PAIRS)
    close(terms["loss"].value, math.log(2))
    assert metrics["accuracy"].value == 0


def test_reward_reads_the_last_real_token():
    """Scores do not depend on what lies behind a response, and do on its last token."""
    params = random_params(DECODER, scalar=True)
    gap = lambda pairs: reward.objective(MODEL, "last_token", params, pairs)[1]["gap"].total  # noqa: E731
    response = PAIRS.response.copy()
    response[0, 1, 5] += 1  # beyond the rejected side's one token
    assert gap(dataclasses.replace(PAIRS, response=response)) == gap(PAIRS)
    response[0, 1, 0] = (response[0, 1, 0] + 1) % DECODER.vocab_size
    assert gap(dataclasses.replace(PAIRS, response=response)) != gap(PAIRS)


@pytest.mark.parametrize(("kind", "expected"), [("dpo", math.log(2)), ("cdpo", math.log(2)), ("ipo", 25.0)])
def test_dpo_at_policy_equals_reference(kind, expected):
    """log 2 for DPO whatever the smoothing, (1 / 2 beta)^2 for IPO; implicit rewards 0."""
    params = random_params(DECODER)
    ref = functional.response_logps(MODEL, params, PAIRS)
    terms, metrics = dpo.objective(MODEL, dpo.DpoLoss(kind, 0.1, 0.1, False, 0.0), params, (PAIRS, ref))
    close(terms["loss"].value, expected)
    assert (
        metrics["rewards/chosen"].value == metrics["rewards/margins"].value == metrics["rewards/accuracies"].value == 0
    )


def test_dpo_gradient_raises_chosen_and_lowers_rejected():
    params = random_params(DECODER)
    ref = functional.response_logps(MODEL, params, PAIRS)
    objective = partial(dpo.objective, MODEL, dpo.DpoLoss("dpo", 0.1, 0.0, False, 0.0))
    optim = OptimConfig(clip_norm=None, eps=1.0)  # with a small eps Adam's first direction is the gradient's sign
    update = jax.jit(make_update(objective, optim, accumulation=1))
    state, _ = update(init_state(params, optim, mesh_of(1, 1, 1)), (PAIRS, ref), jnp.asarray(1e-3))
    moved = state.params
    after = functional.response_logps(MODEL, moved, PAIRS)
    margin = lambda logp: (logp[:, 0] - logp[:, 1]).mean()  # noqa: E731
    assert margin(after) > margin(ref)


def test_dpo_length_normalisation_divides_both_sides():
    params, other = random_params(DECODER), random_params(DECODER, 1)
    ref = functional.response_logps(MODEL, other, PAIRS)
    policy = functional.response_logps(MODEL, params, PAIRS)
    terms, metrics = dpo.objective(MODEL, dpo.DpoLoss("dpo", 0.5, 0.0, True, 0.0), params, (PAIRS, ref))
    scaled = np.asarray((policy - ref) / PAIRS.response_len)
    close(terms["loss"].value, np.mean(np.log1p(np.exp(-0.5 * (scaled[:, 0] - scaled[:, 1])))), rtol=2e-5)
    close(metrics["rewards/chosen"].value, 0.5 * scaled[:, 0].mean(), rtol=2e-5)


def score(actor, reference, *, config=None, samples=None, has_eos=None):
    """A scored rollout of given samples and its metrics."""
    config = config or PpoConfig(train=TrainConfig(batch_size=4))
    samples = samples or batch([4, 3, 6, 5], [[6], [2], [1], [5]])
    judges = (random_params(DECODER, 5, scalar=True), random_params(DECODER, 6, scalar=True))
    has_eos = jnp.asarray([True, True, False, True]) if has_eos is None else has_eos
    rollout, entropy = ppo.score_rollout(MODEL, MODEL, 1.0, (actor, reference), judges, samples, has_eos, ALLOWED)
    kl_coef = jnp.asarray(config.kl.coef)
    estimated, shaped = ppo.estimate(rollout, config, kl_coef)
    return estimated, shaped, ppo.rollout_metrics(estimated, entropy, kl_coef)


def allowed_samples():
    """Samples from the ids that may be sampled: 0 and 1 have probability 0."""
    samples = batch([4, 3, 6, 5], [[6], [2], [1], [5]])
    return dataclasses.replace(samples, response=np.maximum(samples.response, 2))


def test_step_0_of_mpo_has_kl_0_and_ratio_1():
    """Reference and actor are the same model before the first update: exactly 0, and a ratio of 1 everywhere."""
    actor = random_params(DECODER)
    estimated, _, metrics = score(actor, actor, samples=allowed_samples())
    assert metrics["objective/kl"].total == 0 and metrics["objective/kl_k3"].total == 0
    terms, update = ppo.actor_objective(
        MODEL, PpoConfig(train=TrainConfig(batch_size=4)), actor, (estimated, None), ALLOWED
    )
    assert update["val/ratio"].value == 1 and update["policy/clipfrac_avg"].value == 0
    close(terms["loss/policy_avg"].value, -jnp.where(estimated.rollout.mask, estimated.advantage, 0).sum() / 14)


def test_step_0_against_another_reference_has_kl():
    """mpo_sft_kl starts with a KL that is not 0: a wrong reference shows at once."""
    _, _, metrics = score(random_params(DECODER), random_params(DECODER, 1), samples=allowed_samples())
    assert abs(metrics["objective/kl"].value) > 1e-2 and metrics["objective/kl_k3"].value > 1e-2


def test_rollout_matches_the_numpy_reference():
    """Rewards, advantages and returns of ragged responses, row by row in float64."""
    config = PpoConfig(train=TrainConfig(batch_size=4), kl=KlConfig(coef=0.3), score_clip=0.5, discount=0.9, trace=0.8)
    estimated, shaped, metrics = score(
        random_params(DECODER), random_params(DECODER, 1), config=config, samples=allowed_samples()
    )
    r = estimated.rollout
    arrays = [np.asarray(x, np.float64) for x in (r.behavior_logp, r.ref_logp, r.score)]
    mask = np.asarray(r.mask)
    expected = rl.shape_rewards(*arrays, mask, kl_coef=0.3, clip=0.5)
    close(shaped, expected, rtol=1e-4, atol=1e-5)
    advantage, returns = rl.gae(expected, np.asarray(r.value, np.float64), mask, discount=0.9, trace=0.8)
    close(estimated.advantage, advantage, rtol=1e-4, atol=1e-5)
    close(estimated.returns, returns, rtol=1e-4, atol=1e-5)
    assert metrics["response_length/mean"].value == 14 / 4
    assert metrics["response_length/clip_ratio"].value == 0.25 and metrics["val/num_eos_tokens"] == 3
    close(
        metrics["objective/rlhf_reward"].value,
        metrics["objective/scores"].value + metrics["objective/non_score_reward"].value,
    )


def test_value_is_read_before_the_action():
    """The value of a response's first token is the critic at the prompt's last token."""
    estimated, _, _ = score(random_params(DECODER), random_params(DECODER))
    samples = batch([4, 3, 6, 5], [[6], [2], [1], [5]])
    critic = random_params(DECODER, 5, scalar=True)
    scores = functional.scores(MODEL, critic, functional.join(samples))
    expected = [scores[b, n - 1] for b, n in enumerate(samples.prompt_len)]
    np.testing.assert_array_equal(estimated.rollout.value[:, 0], jnp.stack(expected))


@pytest.mark.parametrize(("mode", "expected"), [("none", 2.0), ("replace", -3.0), ("subtract", -1.0)])
def test_missing_eos_penalty_touches_unfinished_rows_alone(mode, expected):
    extras = PpoExtrasConfig(missing_eos=mode, missing_eos_penalty=3.0)
    config = PpoConfig(train=TrainConfig(batch_size=2), extras=extras, kl=KlConfig(coef=0.0))
    mask, zero = jnp.ones((2, 3), bool), jnp.zeros((2, 3))
    rollout = Rollout(PAIRS, mask, zero, zero, zero, jnp.asarray([2.0, 2.0]), jnp.asarray([True, False]))
    _, shaped = ppo.estimate(rollout, config, jnp.asarray(0.0))
    assert shaped[:, -1].tolist() == [2.0, expected]


def test_ds_chat_places_the_score_after_eos():
    config = PpoConfig(train=TrainConfig(batch_size=2), reward_at="ds_chat", kl=KlConfig(coef=0.0), trace=0.5)
    mask = jnp.asarray([[True, True, False, False], [True, True, True, True]])
    zero = jnp.zeros((2, 4))
    rollout = Rollout(PAIRS, mask, zero, zero, zero, jnp.asarray([4.0, 4.0]), jnp.asarray([True, False]))
    estimated, shaped = ppo.estimate(rollout, config, jnp.asarray(0.0))
    assert shaped.tolist() == [[0, 0, 4, 0], [0, 0, 0, 4]]
    assert estimated.advantage.tolist() == [[1, 2, 0, 0], [0.5, 1, 2, 4]]


def test_whitening_options_scale_but_keep_the_mask():
    extras = PpoExtrasConfig(whiten_advantages=True, whiten_rewards=True)
    config = PpoConfig(train=TrainConfig(batch_size=4), extras=extras)
    estimated, _, _ = score(random_params(DECODER), random_params(DECODER, 1), config=config, samples=allowed_samples())
    kept = np.asarray(estimated.advantage)[np.asarray(estimated.rollout.mask)]
    close(kept.mean(), 0.0, atol=1e-6)
    close(kept.std(ddof=1), 1.0, rtol=1e-4)
    assert not np.asarray(estimated.advantage)[~np.asarray(estimated.rollout.mask)].any()


def test_ptx_adds_the_sft_loss_with_its_weight():
    actor = random_params(DECODER)
    config = PpoConfig(train=TrainConfig(batch_size=4), extras=PpoExtrasConfig(ptx_coef=0.5))
    estimated, _, _ = score(actor, actor, config=config, samples=allowed_samples())
    shown = batch([2, 2, 3, 4], [[3], [1], [2], [2]])
    terms, _ = ppo.actor_objective(MODEL, config, actor, (estimated, shown), ALLOWED)
    close(terms["loss/ptx"].value, 0.5 * sft.objective(MODEL, actor, shown)[0]["loss"].value)


@pytest.mark.parametrize("broken", ["actor", "critic"])
def test_actor_and_critic_skip_updates_each_by_itself(broken):
    """The first of two minibatches is not finite for one of the models: as if that one had had the second alone."""
    mesh = mesh_of(1, 1, 1)
    config = Config(ppo=PpoConfig(train=TrainConfig(batch_size=4), minibatches=2, critic_optim=OptimConfig()))
    with jax.set_mesh(mesh):
        actor, critic = ppo.make_updates(MODEL, MODEL, config.ppo, mesh)
        rate = lambda k: jnp.asarray(0.01)  # noqa: E731
        loop: Any = SimpleNamespace(config=config, update_actor=actor, update_critic=critic, actor_rate=rate)
        loop.critic_rate, loop.allowed_V = rate, ALLOWED
        state = lambda: ppo.PpoState(  # noqa: E731
            init_state(random_params(DECODER), config.ppo.train.optim, mesh),
            init_state(random_params(DECODER, 5, scalar=True), config.ppo.critic_optim, mesh),
            jnp.asarray(0.1),
            None,
        )
        estimated, _, _ = score(random_params(DECODER), random_params(DECODER, 1), samples=allowed_samples())
        field = "advantage" if broken == "actor" else "returns"
        poisoned = dataclasses.replace(estimated, **{field: getattr(estimated, field).at[0].set(jnp.nan)})
        found, metrics = ppo.Loop._updates(loop, state(), 0, (poisoned, None))
        whole, _ = ppo.Loop._updates(loop, state(), 0, (estimated, None))
        second = ppo.minibatch((estimated, None), jnp.asarray(1), 2)
        alone = actor(state().actor, second, rate(0), ALLOWED) if broken == "actor" else None
        alone = alone or critic(state().critic, second[0], rate(0))
    names = {"actor": "policy/skipped", "critic": "critic/skipped"}
    assert {name: int(metrics[key].count) for name, key in names.items()} == {
        name: int(name == broken) for name in names
    }
    other = "critic" if broken == "actor" else "actor"
    chex.assert_trees_all_equal(getattr(found, other), getattr(whole, other))
    chex.assert_trees_all_equal(getattr(found, broken).params, alone[0].params)
    assert (int(getattr(found, broken).skipped), int(getattr(found, broken).skipped_in_a_row)) == (1, 0)


ONE_PASS_CASES = [
    ({}, 1, (1, 1, 1)),
    ({}, 4, (1, 1, 1)),
    ({"reward_at": "ds_chat", "temperature": 0.7}, 2, (2, 1, 1)),
    ({"extras": PpoExtrasConfig(whiten_advantages=True, missing_eos="replace")}, 1, (1, 2, 2)),
]


@pytest.mark.parametrize("options,accumulation,shape", ONE_PASS_CASES)
def test_one_pass_equals_scoring_and_then_updating(options, accumulation, shape):
    """Rollouts, metrics, gradients and both models; a row of padding is among the samples."""
    mesh = mesh_of(*shape)
    optim = OptimConfig(beta1=0.5, clip_norm=None, eps=1.0)  # gradients can be read off the moments
    train = TrainConfig(batch_size=4, accumulation=accumulation, optim=optim)
    config = PpoConfig(train=train, critic_optim=optim, one_pass=True, **options)
    assert ppo.updates_in_one_pass(config)
    rates = jnp.asarray(0.01), jnp.asarray(0.02)
    samples = dataclasses.replace(allowed_samples(), prompt_len=np.asarray([4, 3, 0, 5], np.int32))
    place = lambda params: jax.device_put(params, functional.param_shardings(params, mesh))  # noqa: E731
    with jax.set_mesh(mesh):
        actor, ref = (place(random_params(DECODER, seed)) for seed in (0, 1))
        critic, reward_model = (place(random_params(DECODER, seed, scalar=True)) for seed in (5, 6))
        state = lambda: (init_state(actor, optim, mesh), init_state(critic, optim, mesh))  # noqa: E731
        has_eos, kl_coef = jnp.asarray([[True], [True], [False], [True]]), jnp.asarray(0.1)
        joined, has_eos = place_batch((samples, has_eos), mesh)
        batch, metrics = ppo.make_score(MODEL, MODEL, config, mesh)(
            (actor, ref), (critic, reward_model), joined, has_eos, ALLOWED, kl_coef
        )
        update_actor, update_critic = ppo.make_updates(MODEL, MODEL, config, mesh)
        before = state()
        new_critic, critic_metrics = update_critic(before[1], batch, rates[1])
        new_actor, actor_metrics = update_actor(before[0], (batch, None), rates[0], ALLOWED)
        wanted = {**metrics, **ppo._named("critic", critic_metrics), **ppo._named("policy", actor_metrics)}
        step = ppo.make_one_pass(MODEL, MODEL, config, mesh)
        found = step(*state(), (ref, reward_model), joined, has_eos, ALLOWED, kl_coef, rates)
    assert found[3].keys() == wanted.keys()
    assert float(found[3]["val/ratio"].value) == 1 and float(found[3]["policy/approxkl_avg"].value) == 0
    values = lambda metrics: {k: getattr(m, "value", m) for k, m in metrics.items()}  # noqa: E731
    for actual, expected in zip(
        (*found[:3], values(found[3])), (new_actor, new_critic, batch, values(wanted)), strict=True
    ):
        trees_close(jax.device_get(actual), jax.device_get(expected), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"one_pass": False},
        {"epochs": 2},
        {"minibatches": 2},
        {"extras": PpoExtrasConfig(ptx_coef=0.1)},
        {"extras": PpoExtrasConfig(critic_warmup=1)},
        {"extras": PpoExtrasConfig(whiten_rewards=True), "train": TrainConfig(batch_size=4, accumulation=2)},
    ],
)
def test_where_one_pass_is_not_enough(options):
    assert not ppo.updates_in_one_pass(PpoConfig(**{"train": TrainConfig(batch_size=4), "one_pass": True, **options}))


def test_a_broken_reward_skips_both_updates_of_one_pass():
    mesh = mesh_of(1, 1, 1)
    config = PpoConfig(train=TrainConfig(batch_size=4), critic_optim=OptimConfig(), one_pass=True)
    with jax.set_mesh(mesh):
        reward_model = jax.tree.map(lambda x: x * jnp.nan, random_params(DECODER, 6, scalar=True))
        state = lambda: (  # noqa: E731
            init_state(random_params(DECODER), config.train.optim, mesh),
            init_state(random_params(DECODER, 5, scalar=True), config.critic_optim, mesh),
        )
        step = ppo.make_one_pass(MODEL, MODEL, config, mesh)
        inputs = place_batch((allowed_samples(), np.ones((4, 1), bool)), mesh)
        frozen, rates = (random_params(DECODER, 1), reward_model), (jnp.asarray(0.01), jnp.asarray(0.01))
        *found, _, metrics = step(*state(), frozen, *inputs, ALLOWED, jnp.asarray(0.1), rates)
    for before, after in zip(state(), found, strict=True):
        assert int(after.skipped) == 1
        chex.assert_trees_all_equal(after.params, before.params)
    assert int(metrics["policy/skipped"].count) == int(metrics["critic/skipped"].count) == 1


def test_a_kl_that_is_not_finite_leaves_its_coefficient():
    """Else one broken rollout would make every later reward NaN."""
    ppo_config = PpoConfig(train=TrainConfig(batch_size=4), kl=KlConfig(adaptive=True, horizon=10.0))
    loop: Any = SimpleNamespace(config=Config(ppo=ppo_config), mesh=mesh_of(1, 1, 1), key=None, allowed_V=ALLOWED)
    loop.ref_params = loop.reward_params = loop.one_pass = None
    loop.generate = lambda *_: (None, None)
    loop._updates = lambda state, *_: (state, {})
    loop.utility = lambda joined: {}
    params = SimpleNamespace(params=None)
    start = ppo.PpoState(params, params, jnp.asarray(0.1), None)
    rows = [SimpleNamespace(rows=PAIRS, epoch=np.zeros(4, np.uint32))]
    coefficients = []
    for kl in (jnp.nan, 1e9):
        loop.score = lambda *_, kl=kl: (None, {"objective/kl": Mean(jnp.asarray(kl), jnp.asarray(1.0))})
        coefficients.append(float(ppo.Loop.iteration(loop, start, 0, rows, None)[0].kl_coef))
    assert coefficients[0] == float(jnp.float32(0.1)) and coefficients[1] > 0.1
