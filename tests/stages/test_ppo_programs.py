"""PPO's compiled programs and its loop: minibatches, schedules, normalised scores, one pass, skipped updates."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config.schema import KlConfig, OptimConfig, PpoExtrasConfig, TrainConfig
from mpo_jax.data.batches import Batch
from mpo_jax.data.packing import Packing
from mpo_jax.models import forward
from mpo_jax.ops import add_to_moments, normalise
from mpo_jax.runtime.offload import Offload
from mpo_jax.runtime.sharding import place_batch, replicated
from mpo_jax.stages.ppo import compiled
from mpo_jax.stages.ppo.iteration import Loop, Models, PpoState, init_ppo_state
from mpo_jax.stages.ppo.layout import Samples
from mpo_jax.stages.ppo.settings import Method
from mpo_jax.training.optimizer import make_optimizer, make_schedule, with_learning_rate
from mpo_jax.training.update import init_state
from mpo_jax.types import Mean, Moments, PpoBatch, Rollout, frozen, trainable
from tests.models.tiny import DECODER, batch, close, mesh_of, random_params, trees_close
from tests.reference import rl
from tests.stages.test_ppo_objective import ALLOWED, MODEL, PAIRS, allowed_samples, method_of, score

PADDED: Any = Samples(None)  # type: ignore[arg-type]
"""Says of samples that stand elsewhere that the models read them padded."""


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_normalised_scores_follow_the_running_moments_of_all_raw_scores(shape):
    """Three batches against NumPy, this batch's scores counted before use; the third is broken and changes nothing."""
    method = method_of(score="normalised", score_clip=1.0, kl=KlConfig(coef=0.0))
    mesh, seen = mesh_of(*shape), []
    place = lambda params: jax.device_put(params, forward.param_shardings(params, mesh))  # noqa: E731
    with jax.set_mesh(mesh):
        run = compiled.make_score(MODEL, MODEL, method, mesh)
        actor, critic, judge = (place(random_params(DECODER, s, head="value" if s else "lm")) for s in (0, 5, 6))
        moments = jax.device_put(Moments(*jnp.zeros((3,))), replicated(mesh))
        for number in range(3):
            samples = batch([4, 3, 6, 5], [[6], [2], [1], [5]], seed=number)
            samples = dataclasses.replace(samples, response=np.maximum(samples.response, 2))
            if number == 1:  # a row of padding
                samples = dataclasses.replace(samples, prompt_len=np.asarray([4, 3, 0, 5], np.int32))
            if number == 2:
                judge = jax.tree.map(lambda x: x * jnp.nan, judge)
            rows = place_batch((samples, np.ones((4, 1), bool)), mesh)
            before = jax.device_get(moments)
            found, metrics, moments = run(
                (trainable(actor), frozen(actor)),
                (trainable(critic), frozen(judge)),
                *rows,
                ALLOWED,
                jnp.asarray(0.0),
                moments,
            )
            raw, real = np.asarray(found.rollout.score, np.float64), samples.prompt_len > 0
            if number == 2:
                chex.assert_trees_all_equal(jax.device_get(moments), before)
                assert np.isnan(np.asarray(found.advantage)).any(), "a broken score must not look like a number"
                continue
            seen.extend(raw[real])
            mean, std = rl.running_moments(seen)
            close(metrics["objective/scores"].value, raw[real].mean(), rtol=1e-5)
            close(metrics["objective/score_running_mean"], mean, rtol=1e-5)
            close(metrics["objective/score_running_std"], std, rtol=1e-5)
            normalised = (raw - mean) / std
            close(metrics["objective/scores_normalised"].value, normalised[real].mean(), rtol=1e-4, atol=1e-6)
            close(metrics["objective/score_clipfrac"].value, (np.abs(normalised[real]) > 1).mean())
            returned = rl.shape_rewards(*np.zeros((2, *found.rollout.mask.shape)), normalised, found.rollout.mask, 0, 1)
            value = np.asarray(found.rollout.value, np.float64)
            advantage, _ = rl.gae(returned, value, np.asarray(found.rollout.mask))
            close(found.advantage, advantage, rtol=1e-4, atol=1e-5)
        assert moments.count == 7 and moments.count.sharding.is_fully_replicated


def test_a_first_batch_of_one_score_is_normalised_to_zero():
    moments = add_to_moments(Moments(*jnp.zeros((3,))), jnp.asarray([3.0, 9.0]), jnp.asarray([True, False]))
    assert (float(moments.mean), float(moments.std)) == (3.0, 0.0)
    assert normalise(jnp.asarray([3.0]), moments).tolist() == [0.0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_minibatches_are_drawn_anew_each_epoch_and_cover_the_rows(shape):
    mesh, rows = mesh_of(*shape), np.arange(16)
    order, key = compiled.make_order(16, 4, mesh), jax.random.key(3)
    draw = compiled.make_minibatch(mesh)
    with jax.set_mesh(mesh):
        placed = place_batch({"row": rows, "wide": rows[:, None]}, mesh)
        orders = {}
        for k, epoch in ((0, 0), (0, 1), (1, 0)):
            parts = [draw(placed, part) for part in order(key, k, epoch)]
            assert all(len({s.data.shape for s in part["row"].addressable_shards}) == 1 for part in parts)
            assert parts[0]["row"].sharding.is_equivalent_to(placed["row"].sharding, 1)
            orders[k, epoch] = np.concatenate([part["row"] for part in parts])
            np.testing.assert_array_equal(orders[k, epoch], np.concatenate([part["wide"][:, 0] for part in parts]))
            np.testing.assert_array_equal(np.sort(orders[k, epoch]), rows)
        again = np.concatenate(order(key, 0, 1))
    np.testing.assert_array_equal(again, orders[0, 1])
    assert order._cache_size() == 1, "iteration and epoch are arguments of one program"
    together = [[frozenset(part) for part in order.reshape(4, 4)] for order in orders.values()]
    assert together[0] != together[1] != together[2] != together[0]
    # the same rows on every mesh
    np.testing.assert_array_equal(compiled.make_order(16, 4, mesh_of(1, 1, 1))(key, 0, 1), orders[0, 1].reshape(4, 4))


def make_loop(
    method: Method, *, iterations: int = 1, frozen_models: Any = ({}, {}), packing: Packing | None = None
) -> Loop:
    """A loop over the tiny models, all parts compiled as it needs them."""
    settings: Any = SimpleNamespace(seed=0, method=method, sampling=None)
    codec: Any = SimpleNamespace(ends=0, allowed=lambda size: np.arange(size) > 1)
    models = Models(MODEL, MODEL, {}, {}, *frozen_models)
    offload = Offload(False, False)
    return Loop(settings, mesh_of(1, 1, 1), codec, models, offload, iterations, log_every=10, packing=packing)


def rows_of(k: int) -> Batch:
    return Batch(k, PAIRS, np.arange(4), np.zeros(4, np.uint32))


def rate_of(state: Any) -> float:
    return float(state.opt_state.hyperparams["learning_rate"])


def bare_state() -> PpoState:
    """Two models of one number each."""
    params, mesh = trainable({"norm": {"scale": jnp.ones(1)}}), mesh_of(1, 1, 1)
    return PpoState(*(init_state(params, make_optimizer(OptimConfig()), mesh) for _ in range(2)), jnp.asarray(0.1))


def test_every_epoch_has_minibatches_of_its_own():
    """As the loop asks for them: of two iterations with three epochs, no two epochs cut the rows alike."""
    cuts: list[tuple[int, ...]] = []

    def update(state: Any, rows: Any, *_: Any) -> tuple[Any, dict[str, Any]]:
        cuts.append(tuple(sorted(rows.tolist())))
        return state, {}

    loop = make_loop(method_of(epochs=3, minibatches=2))
    loop.update_critic, loop.update_actor = update, lambda state, *_: (state, {})
    for k in range(2):
        loop._updates(loop.models, bare_state(), k, (jnp.arange(8), None), PADDED)
    epochs = [frozenset(cuts[i : i + 2]) for i in range(0, len(cuts), 2)]
    assert len(epochs) == len(set(epochs)) == 6
    assert all(sorted(sum(epoch, ())) == list(range(8)) for epoch in epochs)


def test_critic_warmup_leaves_the_actors_schedule_whole():
    """Actor and critic each get the rates of a schedule over their own updates, from step 0 to the last."""
    optim = OptimConfig(learning_rate=1.0, warmup_steps=2)
    method = method_of(
        train=TrainConfig(batch_size=4, optim=optim), critic_optim=optim, epochs=2,
        extras=PpoExtrasConfig(critic_warmup=3),
    )  # fmt: skip
    loop = make_loop(method, iterations=7)
    rates: dict[str, list[float]] = {"actor": [], "critic": []}

    def update(name: str) -> Any:
        return lambda state, *_: (rates[name].append(rate_of(state)), (state, {}))[1]

    loop.update_actor, loop.update_critic = update("actor"), update("critic")
    state = bare_state()
    for k in range(7):
        loop._updates(loop.models, state, k, (None, None), PADDED)
    close(rates["critic"], [make_schedule(optim, 14)(step) for step in range(14)])
    close(rates["actor"], [make_schedule(optim, 8)(step) for step in range(8)])
    assert rates["actor"][0] == 0.0


def test_work_is_counted_for_the_updates_that_are_made():
    """Two epochs of two minibatches: of the critic alone in its warm-up, of both models, and up to an early stop."""
    loop = make_loop(method_of(epochs=2, minibatches=2, extras=PpoExtrasConfig(critic_warmup=1), kl=KlConfig(stop=0.5)))
    kls = iter([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9])
    loop.update_critic = lambda state, *_: (state, {})
    loop.update_actor = lambda state, *_: (
        state,
        {"policy/approxkl_avg": Mean(jnp.asarray(next(kls)), jnp.asarray(1.0))},
    )
    loop.minibatch = lambda batch, *_: batch
    loop._at_peak = lambda prompt_len, response_len, *epochs: epochs
    score_4 = jnp.zeros(4)
    rollout = Rollout(PAIRS, score_4, score_4, score_4, score_4, score_4, score_4)  # type: ignore[arg-type]
    rows = PpoBatch(rollout, score_4, score_4)  # type: ignore[arg-type]
    found = [loop._updates(loop.models, bare_state(), k, (rows, None), PADDED)[1]["peak_s"] for k in range(3)]
    assert found == [(0, 2), (2, 2), (1.5, 1.5)]


@pytest.mark.thorough
@pytest.mark.parametrize("broken", ["actor", "critic"])
def test_actor_and_critic_skip_updates_each_by_itself(broken):
    """The first of two minibatches is not finite for one of the models: as if that one had had the second alone."""
    mesh = mesh_of(1, 1, 1)
    method = method_of(minibatches=2, critic_optim=OptimConfig())
    loop = make_loop(method)
    loop.actor_rate = loop.critic_rate = lambda k: jnp.asarray(0.01)
    with jax.set_mesh(mesh):
        actor, critic = compiled.make_updates(MODEL, MODEL, method, mesh)
        tree, value_tree = random_params(DECODER), random_params(DECODER, 5, head="value")
        state = lambda: init_ppo_state(  # noqa: E731
            method, trainable(tree), trainable(value_tree), mesh, Offload(False, False)
        )
        estimated, _, _ = score(random_params(DECODER), random_params(DECODER, 1), samples=allowed_samples())
        order = compiled.make_order(4, 2, mesh)(loop.minibatch_key, 0, 0)
        field = "advantage" if broken == "actor" else "returns"
        poisoned = dataclasses.replace(estimated, **{field: getattr(estimated, field).at[order[0, 0]].set(jnp.nan)})
        found, metrics = loop._updates(loop.models, state(), 0, (poisoned, None), PADDED)
        whole, _ = loop._updates(loop.models, state(), 0, (estimated, None), PADDED)
        second = loop.minibatch((estimated, None), order[1])
        start = with_learning_rate(getattr(state(), broken), 0.01)
        alone = actor(start, second, {}, ALLOWED) if broken == "actor" else critic(start, second[0], {})
    names = {"actor": "policy/skipped", "critic": "critic/skipped"}
    assert {name: int(metrics[key].count) for name, key in names.items()} == {
        name: int(name == broken) for name in names
    }
    other = "critic" if broken == "actor" else "actor"
    chex.assert_trees_all_equal(getattr(found, other), getattr(whole, other))
    chex.assert_trees_all_equal(getattr(found, broken).trainable, alone[0].trainable)
    assert (int(getattr(found, broken).skipped), int(getattr(found, broken).skipped_in_a_row)) == (1, 0)


ONE_PASS_CASES = [
    ({}, 1, (1, 1, 1)),
    ({}, 4, (1, 1, 1)),
    ({"reward_at": "ds_chat", "temperature": 0.7}, 2, (2, 1, 1)),
    ({"extras": PpoExtrasConfig(whiten_advantages=True, missing_eos="replace")}, 1, (1, 2, 2)),
]


@pytest.mark.thorough
@pytest.mark.parametrize("options,accumulation,shape", ONE_PASS_CASES)
def test_one_pass_equals_scoring_and_then_updating(options, accumulation, shape):
    """Rollouts, metrics, gradients and both models; a row of padding is among the samples."""
    mesh = mesh_of(*shape)
    optim = OptimConfig(beta1=0.5, clip_norm=None, eps=1.0)  # gradients can be read off the moments
    train = TrainConfig(batch_size=4, accumulation=accumulation, optim=optim)
    method = method_of(train=train, critic_optim=optim, one_pass=True, **options)
    assert method.in_one_pass
    samples = dataclasses.replace(allowed_samples(), prompt_len=np.asarray([4, 3, 0, 5], np.int32))
    place = lambda params: jax.device_put(params, forward.param_shardings(params, mesh))  # noqa: E731
    with jax.set_mesh(mesh):
        actor, ref = (place(random_params(DECODER, seed)) for seed in (0, 1))
        critic, reward_model = (place(random_params(DECODER, seed, head="value")) for seed in (5, 6))
        start = lambda params, rate: with_learning_rate(  # noqa: E731
            init_state(trainable(params), make_optimizer(optim), mesh), rate
        )
        state = lambda: (start(actor, 0.01), start(critic, 0.02))  # noqa: E731
        has_eos, kl_coef = jnp.asarray([[True], [True], [False], [True]]), jnp.asarray(0.1)
        joined, has_eos = place_batch((samples, has_eos), mesh)
        batch, metrics, _ = compiled.make_score(MODEL, MODEL, method, mesh)(
            (trainable(actor), frozen(ref)),
            (trainable(critic), frozen(reward_model)),
            joined,
            has_eos,
            ALLOWED,
            kl_coef,
        )
        update_actor, update_critic = compiled.make_updates(MODEL, MODEL, method, mesh)
        before = state()
        new_critic, critic_metrics = update_critic(before[1], batch, {})
        new_actor, actor_metrics = update_actor(before[0], (batch, None), {}, ALLOWED)
        wanted = {
            **metrics,
            **compiled.named("critic", critic_metrics),
            **compiled.named("policy", actor_metrics),
        }
        step = compiled.make_one_pass(MODEL, MODEL, method, mesh)
        value_models = frozen(ref), frozen(reward_model)
        found = step(*state(), ({}, {}), value_models, joined, has_eos, ALLOWED, kl_coef)
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
        {"score": "normalised"},
        {"extras": PpoExtrasConfig(ptx_coef=0.1)},
        {"extras": PpoExtrasConfig(critic_warmup=1)},
        {"extras": PpoExtrasConfig(whiten_rewards=True), "train": TrainConfig(batch_size=4, accumulation=2)},
    ],
)
def test_where_one_pass_is_not_enough(options):
    assert not method_of(**{"one_pass": True, **options}).in_one_pass


@pytest.mark.thorough
def test_a_broken_reward_skips_both_updates_of_one_pass():
    mesh = mesh_of(1, 1, 1)
    method = method_of(critic_optim=OptimConfig(), one_pass=True)
    with jax.set_mesh(mesh):
        reward_model = jax.tree.map(lambda x: x * jnp.nan, random_params(DECODER, 6, head="value"))
        start = lambda params: with_learning_rate(  # noqa: E731
            init_state(trainable(params), make_optimizer(OptimConfig()), mesh), 0.01
        )
        state = lambda: (start(random_params(DECODER)), start(random_params(DECODER, 5, head="value")))  # noqa: E731
        step = compiled.make_one_pass(MODEL, MODEL, method, mesh)
        inputs = place_batch((allowed_samples(), np.ones((4, 1), bool)), mesh)
        value_models = frozen(random_params(DECODER, 1)), frozen(reward_model)
        *found, _, metrics = step(*state(), ({}, {}), value_models, *inputs, ALLOWED, jnp.asarray(0.1))
    for before, after in zip(state(), found, strict=True):
        assert int(after.skipped) == 1
        chex.assert_trees_all_equal(after.trainable, before.trainable)
    assert int(metrics["policy/skipped"].count) == int(metrics["critic/skipped"].count) == 1


def test_a_kl_that_is_not_finite_leaves_its_coefficient():
    """Else one broken rollout would make every later reward NaN."""
    loop = make_loop(method_of(kl=KlConfig(adaptive=True, horizon=10.0)))
    loop.generate, loop.lay_out = lambda *_: (None, None), lambda joined: PADDED
    loop._updates = lambda _, state, *__: (state, {})
    loop.utility = lambda joined: {}
    coefficients = []
    for kl in (jnp.nan, 1e9):
        metrics = {"objective/kl": Mean(jnp.asarray(kl), jnp.asarray(1.0))}
        loop.score = lambda *_, metrics=metrics: (None, metrics, None)
        coefficients.append(float(loop.iteration(bare_state(), rows_of(0), None)[0].kl_coef))
    assert coefficients[0] == float(jnp.float32(0.1)) and coefficients[1] > 0.1
