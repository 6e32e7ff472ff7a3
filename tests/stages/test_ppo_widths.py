"""PPO on the columns that its responses reach: the widths, and that a narrower iteration computes the same."""

import dataclasses
from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config.schema import OptimConfig, PpoExtrasConfig, TrainConfig
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.stages.ppo import compiled
from mpo_jax.stages.ppo.widths import make_narrow
from mpo_jax.stages.widths import few_widths
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state
from mpo_jax.types import Mean, Moments, PromptBatch, frozen, trainable
from tests.models.tiny import DECODER, batch, mesh_of, random_params, trees_close
from tests.stages.test_ppo_objective import ALLOWED, MODEL, method_of
from tests.stages.test_ppo_programs import bare_state, make_loop, rows_of

pytestmark = pytest.mark.unoptimised

COLUMNS = 100
OPTIM = OptimConfig(beta1=0.5, clip_norm=None, eps=1.0)
"""Gradients can be read off the moments."""


def samples(lengths=(6, 2, 1, 9), columns: int = COLUMNS) -> PromptBatch:
    """Samples of ids that may be sampled, garbage behind their ends; the third row only fills the batch."""
    found = batch([4, 3, 6, 5], np.asarray(lengths)[:, None], width=(6, columns))
    return dataclasses.replace(
        found, response=np.maximum(found.response, 2), prompt_len=np.asarray([4, 3, 0, 5], np.int32)
    )


def test_widths_are_few_multiples_of_64_and_the_last_holds_everything():
    assert few_widths(16) == (16,) and few_widths(64) == (64,) and few_widths(65) == (64, 65)
    assert few_widths(128) == (64, 128) and few_widths(256) == (64, 128, 192, 256)
    assert few_widths(257) == (128, 256, 257) and few_widths(512) == (128, 256, 384, 512)
    for columns in range(1, 1200):
        widths = few_widths(columns)
        assert 1 <= len(widths) <= 4 and widths[-1] == columns and list(widths) == sorted(set(widths))
        assert not any(width % 64 for width in widths[:-1])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_the_longest_response_decides(shape):
    """ds_chat keeps the column behind it; responses, lengths and prompts stay, each on its own devices."""
    mesh = mesh_of(*shape)
    plain, ds_chat = (make_narrow(method_of(reward_at=at), mesh) for at in ("last_valid", "ds_chat"))
    with jax.set_mesh(mesh):
        for longest, wanted in ((1, (64, 64)), (63, (64, 64)), (64, (64, 100)), (65, (100, 100)), (100, (100, 100))):
            given = samples((3, longest, 1, 1))
            placed = place_batch(given, mesh)
            for narrow, width in zip((plain, ds_chat), wanted, strict=True):
                found = narrow(placed)
                assert found.response.sharding.is_equivalent_to(placed.response.sharding, 3)
                wanted_rows = dataclasses.replace(given, response=given.response[:, :, :width])
                chex.assert_trees_all_equal(jax.device_get(found), wanted_rows)
        few = place_batch(samples(columns=64), mesh)
        assert plain(few) is few, "one width: nothing to wait for"


# ---- the same numbers ----------------------------------------------------------------------------------------------

WHOLE_BATCH: dict[str, Any] = {
    "reward_at": "ds_chat", "temperature": 0.7, "score": "normalised",
    "extras": PpoExtrasConfig(whiten_advantages=True, whiten_rewards=True, missing_eos="replace"),
}  # fmt: skip
"""All that looks at a whole batch or behind a response's end."""


def inputs(width: int, garbage: int = 0) -> tuple[Any, ...]:
    """Samples cut to `width` columns, with other ids behind their ends; which ended; allowed ids; the KL's weight."""
    given = samples()
    ids = np.where(np.arange(COLUMNS) < given.response_len[..., None], given.response, given.response + garbage)
    given = dataclasses.replace(given, response=ids[:, :, :width])
    return given, np.asarray([[True], [True], [False], [False]]), ALLOWED, jnp.asarray(0.1)


def others() -> tuple[Any, Any]:
    return frozen(random_params(DECODER, 1)), frozen(random_params(DECODER, 6, head="value"))


@cache
def scored(width: int) -> Any:
    """Rollouts with advantages, and metrics, on the host."""
    policies, value_models = (
        (trainable(random_params(DECODER, seed, head=head)), other)
        for seed, head, other in zip((0, 5), ("lm", "value"), others(), strict=True)
    )
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        score = compiled.make_score(MODEL, MODEL, method_of(**WHOLE_BATCH), mesh)
        found = score(policies, value_models, *inputs(width), Moments(*jnp.zeros((3,))))
    return jax.device_get(found[:2])


@cache
def updated(width: int, garbage: int = 0) -> Any:
    """The same and both new states, of one pass in two micro-batches: everything that training differentiates."""
    train, mesh = TrainConfig(batch_size=4, accumulation=2, optim=OPTIM), mesh_of(1, 1, 1)
    method = method_of(train=train, critic_optim=OPTIM, one_pass=True, reward_at="ds_chat")
    start = lambda seed, head: with_learning_rate(  # noqa: E731
        init_state(trainable(random_params(DECODER, seed, head=head)), make_optimizer(OPTIM), mesh), 0.01
    )
    with jax.set_mesh(mesh):
        run = compiled.make_one_pass(MODEL, MODEL, method, mesh)
        actor, critic, batch, metrics = run(
            start(0, "lm"), start(5, "value"), ({}, {}), others(), *inputs(width, garbage)
        )
    return jax.device_get((batch, metrics, (actor, critic)))


def same(found: Any, wanted: Any, width: int) -> None:
    """Token arrays are 0 behind `width`; the rest of rollouts and metrics is equal to rounding."""
    (narrow, metrics), (whole, whole_metrics) = found, wanted
    for name in ("behavior_logp", "ref_logp", "value", "mask"):
        assert not getattr(whole.rollout, name)[:, width:].any()
    assert not whole.advantage[:, width:].any() and not whole.returns[:, width:].any()
    cut = jax.tree.map(lambda x: x[:, :width] if x.shape[1:] == (COLUMNS,) else x, whole)
    cut = dataclasses.replace(cut, rollout=dataclasses.replace(cut.rollout, joined=narrow.rollout.joined))
    trees_close(narrow, cut, rtol=1e-5, atol=1e-5)
    assert metrics.keys() == whole_metrics.keys()
    few, all_columns = (found["perf/padding"] for found in (metrics, whole_metrics))
    assert (
        all_columns.count - few.count
        == all_columns.total - few.total
        == whole.rollout.mask.shape[0] * (COLUMNS - width)
    ), "the columns behind `width` are padding"
    for name, mean in whole_metrics.items():
        if name == "perf/padding":
            continue
        values = [m.value if isinstance(m, Mean) else m for m in (metrics[name], mean)]
        chex.assert_trees_all_close(*values, rtol=1e-4, atol=1e-6)


def test_fewer_columns_give_the_same_rewards_and_advantages():
    """Whitened, normalised, with the score behind the end."""
    same(scored(64), scored(COLUMNS), 64)


def test_fewer_columns_give_the_same_losses_and_gradients():
    narrow, whole = updated(64), updated(COLUMNS)
    same(narrow[:2], whole[:2], 64)
    trees_close(narrow[2], whole[2], rtol=1e-4, atol=1e-6)


def test_masked_columns_change_no_bit():
    """Other ids behind the ends give the same gradients and moments to the bit: their own gradient is 0."""
    chex.assert_trees_all_equal(updated(COLUMNS)[1:], updated(COLUMNS, 5)[1:])


def test_an_iteration_has_one_width():
    """Scoring, every minibatch of both updates, and what is kept of a bad batch; utility sees whole responses."""
    loop, seen = make_loop(method_of(minibatches=2, epochs=2)), []
    given = jax.tree.map(jnp.asarray, samples((6, 60, 1, 2)))
    loop.generate = lambda *_: (given, None)
    loop.utility = lambda joined: {"objective/utility": joined.response_len.max()}

    def score(models: Any, trainable: Any, state: Any, joined: PromptBatch, *_: Any) -> Any:
        seen.append(joined.response.shape)
        return joined, {}, None

    def update(state: Any, part: Any, *_: Any) -> Any:
        seen.append(jax.tree.leaves(part, is_leaf=lambda x: isinstance(x, PromptBatch))[0].response.shape)
        return state, {}

    loop.score, loop.update_critic, loop.update_actor = score, update, update
    _, metrics, kept = loop.iteration(bare_state(), rows_of(0), None)
    assert seen == [(4, 1, 64)] + 8 * [(2, 1, 64)] and kept["rollouts"].response.shape == (4, 1, 64)
    assert metrics["objective/utility"] == 60
