"""With adapters a step on eight devices equals one device's, and what models share is shared."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.models import adapter, forward, quantised
from mpo_jax.models.adapter import Adapter
from mpo_jax.models.kernels import KERNELS
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.stages import dpo, reward, sft
from mpo_jax.stages.ppo import compiled
from mpo_jax.stages.preference import PreferenceLoss
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state
from mpo_jax.types import Head, Params, frozen
from tests.models.tiny import DECODER, FAST, mesh_of, random_params, trees_close
from tests.stages.test_sharded import (
    ALLOWED,
    ENDED,
    MESHES,
    ONE,
    OPTIM,
    PAIRS,
    PPO,
    SAMPLES,
    SINGLES,
    metrics_close,
    on_mesh,
    scored,
)
from tests.stages.test_sharded import MODEL as WHOLE

pytestmark = pytest.mark.thorough

MODEL = dataclasses.replace(WHOLE, adapter=Adapter(rank=2, alpha=4.0, targets=tuple(KERNELS)))
CASES = [("ppo_actor", shape) for shape in MESHES] + [
    (name, MESHES[-1]) for name in ("sft", "reward", "dpo", "ppo_critic", "dpo_int8")
]


def adapted(seed: int, head: Head = "lm") -> Params:
    """A random model with adapters whose B is not zero, so that A has a gradient too."""
    tree = random_params(DECODER, seed, head=head)
    assert MODEL.adapter is not None
    low = adapter.init(MODEL.adapter, tree["layers"], jax.random.key(seed))
    rng = np.random.default_rng(seed)
    low = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), low)
    return adapter.split(tree, low, head)


def case(name: str, mesh: jax.sharding.Mesh) -> tuple[Any, Params, Any, tuple[Any, ...]]:
    """The stage's real jitted step, its parameters, the batch, and the arguments after the frozen part."""
    if name == "sft":
        return sft.make_step(MODEL, OPTIM, 1, mesh), adapted(0), SINGLES, ()
    if name == "reward":
        return reward.make_step(MODEL, OPTIM, "last_token", 1, mesh), adapted(0, "value"), PAIRS, ()
    if name.startswith("dpo"):
        ref = np.random.default_rng(0).normal(-10, 3, (8, 2)).astype(np.float32)
        step = dpo.make_step(MODEL, OPTIM, PreferenceLoss(name="dpo", beta=0.1), 0.3, 1, mesh)
        params = adapted(0)
        if name == "dpo_int8":
            params = {**params, "frozen": quantised.quantised(params["frozen"])}
        return step, params, dpo.DpoBatch(PAIRS, ref), ()
    actor, critic = compiled.make_updates(MODEL, MODEL, PPO, mesh)
    rollouts, _ = scored(ONE)
    if name == "ppo_actor":
        return actor, adapted(0), (rollouts, None), (ALLOWED,)
    return critic, adapted(5, "value"), rollouts, ()


@cache
def run_step(name: str, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        update, params, data, fixed = case(name, mesh)
        placed = {part: on_mesh(tree, mesh) for part, tree in params.items()}
        state = with_learning_rate(init_state(placed, make_optimizer(OPTIM), mesh), 0.1)
        arguments = state, place_batch(data, mesh), placed["frozen"], *fixed
        program = update.lower(*arguments).compile(FAST)
        state, metrics = program(*arguments)
    return state, jax.device_get(metrics)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_step_equals_one_device_s(name, shape):
    (one, one_metrics), (many, metrics) = run_step(name, ONE), run_step(name, shape)
    trees_close(many.trainable, one.trainable, rtol=0, atol=1e-5)
    trees_close(many.opt_state, one.opt_state, rtol=0, atol=1e-5)
    metrics_close(metrics, one_metrics)


def test_the_cases_are_worth_comparing():
    """Every adapter moves, A and B, and the value head with them."""
    for name, (start, head) in {"sft": (0, "lm"), "reward": (0, "value"), "ppo_actor": (0, "lm")}.items():
        moved = jax.tree.map(
            lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
            run_step(name, ONE)[0].trainable,
            adapted(start, head)["trainable"],
        )
        assert min(jax.tree.leaves(moved)) > 1e-6, name


@cache
def scoring(shape: tuple[int, int, int], shared: bool) -> Any:
    """(PpoBatch, metrics), of which reference and reward model share what actor and critic hold frozen, or do not."""
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        actor, critic = ({part: on_mesh(tree, mesh) for part, tree in params.items()}
                         for params in (adapted(0), adapted(5, "value")))  # fmt: skip
        own_score = {"score": on_mesh(random_params(DECODER, 6, head="value"), mesh)["score"]}
        reference = frozen({} if shared else actor["frozen"])
        judge = frozen(own_score if shared else {**critic["frozen"], **own_score})
        score = compiled.make_score(MODEL, MODEL, PPO, mesh)
        joined, ended = place_batch((SAMPLES, ENDED[:, None]), mesh)
        arguments = (actor, reference), (critic, judge), joined, ended, ALLOWED, jnp.asarray(0.1)
        return jax.device_get(score.lower(*arguments).compile(FAST)(*arguments)[:2])


def test_shared_models_score_as_copies_do():
    (one, metrics), (copies, of_copies) = scoring(ONE, True), scoring(ONE, False)
    trees_close(one, copies, rtol=0, atol=0)
    metrics_close(metrics, of_copies)
    assert metrics["objective/kl"].value != 0


def test_scoring_equals_one_device_s():
    (one, one_metrics), (many, metrics) = scoring(ONE, True), scoring((2, 2, 2), True)
    trees_close(many, one, rtol=0, atol=1e-5)
    metrics_close(metrics, one_metrics)


def test_the_reference_is_the_actor_without_its_adapter():
    """Not the actor itself: its log-probabilities are those of the frozen weights alone."""
    (batch, _), actor = scoring(ONE, True), adapted(0)
    tokens = forward.join(jax.tree.map(jnp.asarray, SAMPLES))
    with jax.set_mesh(mesh_of(*ONE)):
        alone, _ = forward.token_logp(WHOLE, actor["frozen"], tokens, temperature=PPO.temperature, allowed_V=ALLOWED)
    np.testing.assert_allclose(batch.rollout.ref_logp, alone, rtol=0, atol=1e-5)
    assert np.abs(batch.rollout.ref_logp - batch.rollout.behavior_logp).max() > 1e-2
