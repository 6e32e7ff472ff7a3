"""How PPO's models read samples: in few widths, or packed; and that the numbers are the same either way."""

import dataclasses
from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config.schema import OptimConfig, PpoConfig, PpoExtrasConfig, TrainConfig
from mpo_jax.data.packing import Packing
from mpo_jax.models import forward
from mpo_jax.runtime.sharding import packed_sharding, place_batch, replicated
from mpo_jax.stages.ppo import compiled
from mpo_jax.stages.ppo.layout import Samples, make_lay_out, make_narrow
from mpo_jax.stages.ppo.settings import Method
from mpo_jax.stages.widths import few_widths
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state
from mpo_jax.types import Mean, Moments, PpoBatch, PromptBatch, frozen, trainable
from tests.models.tiny import DECODER, batch, close, mesh_of, random_params, trees_close
from tests.stages.test_ppo_objective import ALLOWED, MODEL, method_of
from tests.stages.test_ppo_programs import bare_state, make_loop, rows_of

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


@pytest.mark.thorough
def test_fewer_columns_give_the_same_rewards_and_advantages():
    """Whitened, normalised, with the score behind the end."""
    same(scored(64), scored(COLUMNS), 64)


@pytest.mark.thorough
def test_fewer_columns_give_the_same_losses_and_gradients():
    narrow, whole = updated(64), updated(COLUMNS)
    same(narrow[:2], whole[:2], 64)
    trees_close(narrow[2], whole[2], rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_masked_columns_change_no_bit():
    """Other ids behind the ends give the same gradients and moments to the bit: their own gradient is 0."""
    chex.assert_trees_all_equal(updated(COLUMNS)[1:], updated(COLUMNS, 5)[1:])


def test_an_iteration_has_one_width():
    """Scoring, every minibatch of both updates, and what is kept of a bad batch; utility sees whole responses."""
    loop, seen = make_loop(method_of(minibatches=2, epochs=2)), []
    given = jax.tree.map(jnp.asarray, samples((6, 60, 1, 2)))
    loop.generate = lambda *_: (given, None)
    loop.utility = lambda joined: {"objective/utility": joined.response_len.max()}

    def score(models: Any, trainable: Any, state: Any, read: Samples, *_: Any) -> Any:
        seen.append(read.joined.response.shape)
        return read.joined, {}, None

    def update(state: Any, part: Any, *_: Any) -> Any:
        seen.append(jax.tree.leaves(part, is_leaf=lambda x: isinstance(x, PromptBatch))[0].response.shape)
        return state, {}

    loop.score, loop.update_critic, loop.update_actor = score, update, update
    _, metrics, kept = loop.iteration(bare_state(), rows_of(0), None)
    assert seen == [(4, 1, 64)] + 8 * [(2, 1, 64)] and kept["rollouts"].response.shape == (4, 1, 64)
    assert metrics["objective/utility"] == 60 and kept["samples"] is given


# ---- packed --------------------------------------------------------------------------------------------------------

MESHES = [(1, 1, 1), (2, 2, 2)]
PROMPTS = np.random.default_rng(1).integers(2, DECODER.vocab_size, (4, 6), np.int32)
"""Of ids that tell places apart."""
LENGTHS = (6, 2, 0, 9)


def laid_out(shape: tuple[int, int, int]) -> tuple[PromptBatch, Samples]:
    """The samples on a mesh, and as the models read them: two rows do not fit into one of 16 columns."""
    mesh = mesh_of(*shape)
    placed = place_batch(dataclasses.replace(samples(LENGTHS), prompt=PROMPTS), mesh)
    return placed, make_lay_out(method_of(), Packing(4 if mesh.size > 1 else 1, 16), mesh)(placed)


@pytest.mark.parametrize("shape", MESHES)
def test_packed_samples_are_the_samples(shape):
    """Every prompt and response whole in one row, in as many micro-batches as they take; some of the rows too."""
    mesh, order = mesh_of(*shape), (3, 1) if shape == (1, 1, 1) else (3, 1, 0, 2)
    with jax.set_mesh(mesh):
        _, found = laid_out(shape)
        assert found.packed is not None and found.pack is not None
        assert found.packed.ids.sharding.is_equivalent_to(packed_sharding(mesh).ids, 3)
        some = found.pack(np.asarray(order))
    assert found.joined.prompt.shape == (4, 0), "prompts of all widths are read by one program"
    given = samples(LENGTHS)
    for packed, rows in ((found.packed, (0, 1, 2, 3)), (some, order)):
        packed = jax.device_get(packed)
        assert packed.prompt_len.tolist() == [given.prompt_len[row] for row in rows]
        for place, row in enumerate(rows):
            inside = packed.segment == place + 1
            prompt, response = PROMPTS[row][: given.prompt_len[row]], given.response[row, 0]
            response = response[: given.response_len[row, 0]] if len(prompt) else response[:0]
            np.testing.assert_array_equal(packed.ids[inside], [*prompt, *response])
            np.testing.assert_array_equal(packed.branch[inside], [0] * len(prompt) + [1] * len(response))
            np.testing.assert_array_equal(packed.position[inside], np.arange(inside.sum()))
        assert not packed.ids[packed.segment == 0].any()
    if mesh.size == 1:
        assert int(found.packed.count) == 2, "in one row a micro-batch"


@cache
def read(shape: tuple[int, int, int], packed: bool, outside: bool = False) -> Any:
    """Scores, one update of each model, and an update in one pass, from samples that are read packed or padded.

    Returns:
      Outputs of each of the three: rollouts, states and metrics, on the host.
    """
    mesh, train = mesh_of(*shape), TrainConfig(batch_size=4, optim=OPTIM)
    method = method_of(train=train, critic_optim=OPTIM, reward_at="ds_chat", temperature=0.7, one_pass=True)
    whole = Method.of(PpoConfig(train=train, **WHOLE_BATCH))
    drawn: Any = ((0, "lm"), (5, "value"), (1, "lm"), (6, "value"))
    trees = [random_params(DECODER, seed, head=head) for seed, head in drawn]
    actor, critic, ref, judge = (jax.device_put(tree, forward.param_shardings(tree, mesh)) for tree in trees)
    ended, kl_coef = np.asarray([[True], [True], [False], [False]]), jnp.asarray(0.1)
    score = jnp.asarray([0.3, -1.0, 0.0, 2.0])
    with jax.set_mesh(mesh):
        placed, found = laid_out(shape)
        joined, rows = (found.joined, found.packed) if packed else (placed, None)
        given = (joined, place_batch(ended, mesh), ALLOWED)
        policies, value_models = (trainable(actor), frozen(ref)), (trainable(critic), frozen(judge))
        moments = jax.device_put(Moments(*jnp.zeros((3,))), replicated(mesh))
        if outside:
            rollout, entropy = compiled.make_unscored(MODEL, MODEL, whole, mesh)(
                policies, value_models[0], *given, rows
            )
            batch, metrics, _ = compiled.make_scored(whole, mesh)(rollout, entropy, score, kl_coef, moments, rows)
        else:
            batch, metrics, _ = compiled.make_score(MODEL, MODEL, whole, mesh)(
                policies, value_models, *given, kl_coef, moments, rows
            )
        start = lambda params: with_learning_rate(  # noqa: E731
            init_state(trainable(params), make_optimizer(OPTIM), mesh), 0.01
        )
        update_actor, update_critic = compiled.make_updates(MODEL, MODEL, method, mesh)
        part = dataclasses.replace(batch, packed=rows)
        updated = update_actor(start(actor), (part, None), {}, ALLOWED), update_critic(start(critic), part, {})
        joint = compiled.make_one_pass(MODEL, MODEL, method, mesh)(
            start(actor), start(critic), ({}, {}), (frozen(ref), frozen(judge)), *given, kl_coef,
            score if outside else None, rows,
        )  # fmt: skip
    return jax.device_get(((batch, metrics), updated, joint))


def close_to(found: Any, wanted: Any) -> None:
    """Means by value. What only one layout has is left out: prompts, and the score of the row that fills the batch."""

    def shown(node: Any) -> Any:
        if isinstance(node, PpoBatch):
            made = node.rollout
            tokens = (made.mask, made.behavior_logp, made.ref_logp, made.value, node.advantage, node.returns)
            return (*tokens, made.score[[0, 1, 3]])
        if isinstance(node, Mean):
            return node.value
        return {k: shown(v) for k, v in node.items() if k != "perf/padding"} if isinstance(node, dict) else node

    found, wanted = (
        jax.tree.map(shown, tree, is_leaf=lambda x: isinstance(x, PpoBatch | Mean | dict)) for tree in (found, wanted)
    )
    chex.assert_trees_all_equal_structs(found, wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # a mean of scores may be 0 but for rounding; a small gradient is not
        close(a, b, rtol=1e-4, atol=2e-5 * (np.abs(b).max() if np.ndim(b) else 1.0))


@pytest.mark.thorough
@pytest.mark.parametrize("outside", [False, True])
def test_packed_samples_give_the_same_rollouts_losses_and_gradients(outside):
    close_to(read((1, 1, 1), True, outside), read((1, 1, 1), False, outside))


@pytest.mark.thorough
def test_a_mesh_reads_packed_samples_as_one_device_does():
    close_to(read((2, 2, 2), True), read((1, 1, 1), True))


@pytest.mark.thorough
def test_packed_samples_leave_fewer_columns_empty():
    padding = {packed: read((1, 1, 1), packed)[0][1]["perf/padding"] for packed in (True, False)}
    tokens = 4 + 3 + 5 + sum(LENGTHS)
    assert padding[True].count == 32 and padding[True].total == 32 - tokens
    assert padding[False].count == 4 * (6 + COLUMNS) and padding[False].total == padding[False].count - tokens


def test_a_packed_first_iteration_has_kl_0_and_ratio_1():
    """The reference is the actor: exactly 0, whichever program is asked."""
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        _, found = laid_out((1, 1, 1))
        actor = random_params(DECODER)
        batch, metrics, _ = compiled.make_score(MODEL, MODEL, method_of(), mesh)(
            (trainable(actor), frozen(actor)),
            (trainable(random_params(DECODER, 5, head="value")), frozen(random_params(DECODER, 6, head="value"))),
            found.joined, jnp.ones((4, 1), bool), ALLOWED, jnp.asarray(0.1), None, found.packed,
        )  # fmt: skip
        update, _ = compiled.make_updates(MODEL, MODEL, method_of(), mesh)
        state = with_learning_rate(init_state(trainable(actor), make_optimizer(method_of().actor_optim), mesh), 0.0)
        _, updated = update(state, (dataclasses.replace(batch, packed=found.packed), None), {}, ALLOWED)
    assert metrics["objective/kl"].total == 0 and metrics["objective/kl_k3"].total == 0
    assert updated["val/ratio"].value == 1 and updated["policy/approxkl_avg"].total == 0


def test_minibatches_of_packed_samples_are_packed_anew():
    """Each update reads the rows of its minibatch, and no others."""
    loop, seen = make_loop(method_of(minibatches=2, epochs=2), packing=Packing(1, 16)), []
    given = jax.tree.map(jnp.asarray, dataclasses.replace(samples((6, 7, 1, 2)), prompt=PROMPTS))
    loop.generate, loop.utility = lambda *_: (given, None), lambda joined: {}
    batch = PpoBatch(jnp.arange(4), jnp.zeros((4, COLUMNS)), jnp.zeros((4, COLUMNS)))  # type: ignore[arg-type]
    loop.score = lambda *_: (batch, {}, None)

    def update(state: Any, part: Any, *_: Any) -> Any:
        part = part[0] if isinstance(part, tuple) else part
        seen.append((part.rollout.tolist(), part.packed.prompt_len.tolist()))
        return state, {}

    loop.update_critic = loop.update_actor = update
    loop.iteration(bare_state(), rows_of(0), None)
    assert len(seen) == 8 and all(lengths == given.prompt_len[jnp.asarray(rows)].tolist() for rows, lengths in seen)
    for epoch in (seen[:4:2], seen[4::2]):
        assert sorted(row for rows, _ in epoch for row in rows) == [0, 1, 2, 3]
