"""mpo_jax.training.update: exact whatever the portions, the mesh, the optimiser, and the part that trains."""

from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpo_jax.config.schema import OptimConfig
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.stages import dpo, reward, sft
from mpo_jax.stages.preference import PreferenceLoss
from mpo_jax.training.optimizer import make_learning_rate, make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state, jit_update, make_update, state_sharding
from mpo_jax.types import Mean, TrainState, merge, trainable
from tests.covering import covering, the_rest_thorough
from tests.models.tiny import DECODER, FAST, batch, mesh_of, random_params, trees_close

MODEL = Model(DECODER)
LENGTHS = [[9, 1], [2, 2], [1, 9], [5, 4], [8, 3], [3, 8], [6, 6], [1, 1]]
"""Uneven on purpose: a mean of micro-batch means would weigh tokens wrongly."""


def cases():
    """By name: an objective, parameters and a batch."""
    one = batch([4, 3, 6, 5, 2, 6, 4, 1], [[a] for a, _ in LENGTHS])
    two = batch([4, 3, 6, 5, 2, 6, 4, 1], LENGTHS)
    ref = np.random.default_rng(0).normal(-10, 3, (8, 2)).astype(np.float32)
    loss = PreferenceLoss(name="dpo", beta=0.1)
    return {
        "sft": (partial(sft.objective, MODEL), random_params(DECODER), one),
        "reward": (partial(reward.objective, MODEL, "last_token"), random_params(DECODER, head="value"), two),
        "reward_ds_span": (partial(reward.objective, MODEL, "ds_span"), random_params(DECODER, head="value"), two),
        "dpo_with_nll": (partial(dpo.objective, MODEL, loss, 0.3), random_params(DECODER), dpo.DpoBatch(two, ref)),
    }


@cache
def accumulated(name: str, accumulation: int) -> tuple[Any, Any, dict[str, Any]]:
    """The gradient of one update, its norm, and the metrics."""
    objective, params, data = cases()[name]
    data = jax.tree.map(jnp.asarray, data)
    optimizer = make_optimizer(OptimConfig(clip_norm=None, beta1=0.0))  # the first moment is the gradient
    state = with_learning_rate(init_state(trainable(params), optimizer, mesh_of(1, 1, 1)), 0.1)
    update = jax.jit(make_update(objective, optimizer, accumulation=accumulation))
    after, metrics = update.lower(state, data).compile(FAST)(state, data)
    assert metrics.pop("skipped").count == 0
    return optax.tree_utils.tree_get(after.opt_state, "mu"), metrics.pop("grad_norm"), metrics


@pytest.mark.parametrize(("name", "accumulation"), the_rest_thorough(covering(tuple(cases()), (2, 4, 8))))
def test_accumulation_equals_the_whole_batch(name, accumulation):
    whole_grads, whole_norm, whole_metrics = accumulated(name, 1)
    grads, norm, metrics = accumulated(name, accumulation)
    trees_close(grads, whole_grads, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(norm, whole_norm, rtol=1e-5)
    for key, value in whole_metrics.items():
        if isinstance(value, Mean):
            np.testing.assert_allclose(metrics[key].total, value.total, rtol=1e-5, atol=1e-5)
            assert metrics[key].count == value.count
        else:
            assert metrics[key] == value


@pytest.mark.thorough
def test_uneven_masks_would_tell_a_mean_of_means_apart():
    """Guards the test above: the micro-batches' own means do differ from the whole batch's."""
    objective, params, data = cases()["sft"]
    whole = objective(params, data)[0]["loss"].value
    halves = [objective(params, jax.tree.map(lambda x, s=s: x[s::2], data))[0]["loss"].value for s in (0, 1)]
    assert abs(np.mean(halves) - whole) > 1e-3


@cache
def updated(name: str, shape: tuple[int, int, int]) -> tuple[Any, float]:
    """Parameters after one update on a mesh, and the gradient's norm; the state lies where state_sharding says."""
    objective, params, data = cases()[name]
    mesh = mesh_of(*shape)
    # eps large against rounding: Adam's first step is sign(g), which amplifies the rounding of tiny gradients
    optimizer = make_optimizer(OptimConfig(eps=1e-2, weight_decay=0.1))
    with jax.set_mesh(mesh):
        shapes = forward.abstract_params(DECODER, head="value" if name == "reward" else "lm")
        shardings = state_sharding(shapes, optimizer, mesh)
        state = init_state(trainable(jax.device_put(params, shardings.trainable)), optimizer, mesh)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state.opt_state, shardings.opt_state))
        step = jit_update(objective, optimizer, shapes, mesh)
        arguments = with_learning_rate(state, 0.1), place_batch(data, mesh)
        state, metrics = step.lower(*arguments).compile(FAST)(*arguments)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
    sharded = [x for x in moments if not x.sharding.is_fully_replicated]
    assert bool(sharded) == (shape not in ((1, 1, 1), (8, 1, 1)))
    return jax.device_get(state.trainable), float(metrics["grad_norm"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "shape"), covering(("sft", "reward", "dpo_with_nll"), ((8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)))
)
def test_update_on_a_mesh_equals_one_device(shape, name):
    """Updated parameters and moments agree to rounding, and the optimiser's state lies like its parameters."""
    (one, one_norm), (many, many_norm) = updated(name, (1, 1, 1)), updated(name, shape)
    trees_close(many, one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(many_norm, one_norm, rtol=1e-5)


@pytest.mark.parametrize("accumulation", the_rest_thorough([1, 4]))
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_an_update_that_is_not_finite_changes_nothing(what, accumulation):
    """Not the parameters, moments or counts; and the next update is as if the bad one had never been."""
    objective, params, data = cases()["sft"]
    optimizer = make_optimizer(OptimConfig())

    def poisoned(params, batch):
        rows, poison_B = batch
        terms, metrics = objective(params, rows)
        loss = terms["loss"]
        # an infinite loss whose gradient is the usual one
        total = loss.total * poison_B[0] if what == "gradient" else loss.total + jax.lax.stop_gradient(poison_B[0] - 1)
        return {"loss": Mean(total, loss.count)}, metrics

    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        step = jax.jit(make_update(poisoned, optimizer, accumulation=accumulation))
        one = lambda state, value: step(state, (data, np.full(8, value, np.float32)))  # noqa: E731
        first, metrics = one(with_learning_rate(init_state(trainable(params), optimizer, mesh), 0.01), 1.0)
        assert (int(metrics["skipped"].count), int(metrics["skipped"].in_a_row)) == (0, 0)
        state = first
        for number, value in enumerate((np.nan, np.inf) if what == "gradient" else (np.inf, np.nan), 1):
            state, metrics = one(state, value)
            assert (int(metrics["skipped"].count), int(metrics["skipped"].in_a_row)) == (1, number)
            assert metrics["loss"].count == 0 == metrics["loss"].total
        chex.assert_trees_all_equal(
            (first.step, first.trainable, first.opt_state), (state.step, state.trainable, state.opt_state)
        )
        assert (int(state.skipped), int(state.skipped_in_a_row)) == (2, 2)
        (after, metrics), (expected, _) = one(state, 1.0), one(first, 1.0)
    chex.assert_trees_all_equal(after.trainable, expected.trainable)
    chex.assert_trees_all_equal(after.opt_state, expected.opt_state)
    assert (int(after.skipped), int(after.skipped_in_a_row), int(after.step)) == (2, 0, 2)
    assert metrics["loss"].count > 0
    assert not np.array_equal(after.trainable["embedding"], first.trainable["embedding"])


def test_init_state_leaves_the_given_parameters_usable():
    """Steps donate their state; the caller's own copy of the parameters must survive that."""
    objective, params, data = cases()["sft"]
    mesh, optimizer = mesh_of(1, 1, 1), make_optimizer(OptimConfig())
    with jax.set_mesh(mesh):
        before = jax.device_get(params)
        step = jax.jit(make_update(objective, optimizer), donate_argnums=0)
        state = with_learning_rate(init_state(trainable(params), optimizer, mesh), 0.1)
        step(state, jax.tree.map(jnp.asarray, data))
        chex.assert_trees_all_equal(before, jax.device_get(params))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1)])
def test_init_state_can_take_over_the_memory(shape):
    """The same state, in the given arrays' own memory; they are gone."""
    _, params, _ = cases()["sft"]
    mesh, optimizer = mesh_of(*shape), make_optimizer(OptimConfig())
    with jax.set_mesh(mesh):
        expected = init_state(trainable(params), optimizer, mesh)
        given = jax.tree.map(jnp.copy, expected.trainable)
        where = [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(given)]
        state = init_state(trainable(given), optimizer, mesh, donate=True)
        chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
    leaves = jax.tree.leaves(state.trainable)
    assert [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in leaves] == where
    assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, expected)


# ---- any optax transformation --------------------------------------------------------------------------------------


def quadratic(tree: Any, target_B: jax.Array) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Half the squared distance of all parameters from each row's number: the gradient is p - mean(target)."""
    row = lambda target: sum(0.5 * ((leaf - target) ** 2).sum() for leaf in jax.tree.leaves(tree))  # noqa: E731
    return {"loss": Mean.of(jax.vmap(row)(target_B))}, {}


def gradient(tree: Any, target_B: np.ndarray) -> Any:
    """Of `quadratic`, in closed form."""
    return jax.tree.map(lambda leaf: leaf - target_B.mean(), tree)


TARGETS = np.linspace(-1, 1, 24).reshape(3, 8).astype(np.float32)
OPTIMIZERS: dict[str, Any] = {
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "lion": optax.lion(0.01),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=8),
    "schedule": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, 0.1, 3))),
    "multisteps": optax.MultiSteps(optax.adam(0.01), every_k_schedule=2),
    "partition": optax.partition(
        {"decay": optax.adamw(0.01), "none": optax.set_to_zero()},
        lambda tree: {name: "none" if name == "norm" else "decay" for name in tree},
    ),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=0.01),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optax_transformation_does_what_it_does_by_hand(name):
    """Three updates on a mesh against the transformation itself on one device, gradients known in closed form."""
    optimizer, mesh = OPTIMIZERS[name], mesh_of(1, 2, 4)
    wanted = random_params(DECODER)
    by_hand, direct = optimizer.init(wanted), jax.jit(optimizer.update)
    with jax.set_mesh(mesh):
        state = init_state(trainable(wanted), optimizer, mesh)
        step = jit_update(quadratic, optimizer, wanted, mesh, accumulation=2)
        for number, targets in enumerate(TARGETS, 1):
            grads = gradient(wanted, targets)
            updates, by_hand = direct(grads, by_hand, wanted)
            wanted = optax.apply_updates(wanted, updates)
            state, metrics = step(state, place_batch(targets, mesh))
            np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
            trees_close(jax.device_get(state.trainable), wanted, rtol=1e-5, atol=1e-5)
            assert int(state.step) == number
    trees_close(jax.device_get(state.opt_state), by_hand, rtol=1e-4, atol=1e-5)
    assert np.abs(state.trainable["embedding"] - random_params(DECODER)["embedding"]).max() > 1e-3


def under_a_parameter(tree: Any, params: Any) -> list[tuple[Any, Any]]:
    """(leaf, parameter) of a state's leaves that have a parameter's path at their end, and its shape."""
    known = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        own = next((known[end] for i in range(len(path)) if (end := jax.tree_util.keystr(path[i:])) in known), None)
        if own is not None and own.shape == leaf.shape:
            found.append((leaf, own))
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimiser_s_moments_are_sharded_like_their_parameters(name):
    """Before the first update and after it; counters, and Adafactor's rows and columns, are on every device."""
    optimizer, mesh, params = OPTIMIZERS[name], mesh_of(2, 2, 2), random_params(DECODER)
    state = init_state(trainable(params), optimizer, mesh)
    after, _ = jit_update(quadratic, optimizer, params, mesh)(state, place_batch(TARGETS[0], mesh))
    for state in (init_state(trainable(params), optimizer, mesh), after):
        wanted = forward.param_shardings(params, mesh)
        for leaf, sharding in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        alike = under_a_parameter(state.opt_state, state.trainable)
        for leaf, param in alike:
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)
        others = {id(leaf) for leaf in jax.tree.leaves(state.opt_state)} - {id(leaf) for leaf, _ in alike}
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state) if id(leaf) in others)
        sharded = [leaf for leaf, _ in alike if not leaf.sharding.is_fully_replicated]
        factored = [leaf for leaf in jax.tree.leaves(state.opt_state) if id(leaf) in others and leaf.ndim > 1]
        assert sharded or (name == "adafactor" and factored)


# ---- a frozen part -------------------------------------------------------------------------------------------------


def parted(tree: Any) -> dict[str, Any]:
    """Attention and the last norm train; embedding, head, the other norms and the MLPs do not."""
    layers = {name: part for name, part in tree["layers"].items() if name != "attention"}
    rest = {name: part for name, part in tree.items() if name not in ("layers", "norm")}
    return {
        "trainable": {"layers": {"attention": tree["layers"]["attention"]}, "norm": tree["norm"]},
        "frozen": {**rest, "layers": layers},
    }


@cache
def full_update() -> tuple[TrainState, Any]:
    """The state and metrics after an update of all parameters on one device."""
    return updated_from(trainable(random_params(DECODER)), (1, 1, 1), 1)


def updated_from(params: Any, shape: tuple[int, int, int], accumulation: int) -> tuple[TrainState, Any]:
    """One SFT update at a rate of 0.1, of which the first moment is the gradient."""
    objective, _, data = cases()["sft"]
    optimizer, mesh = (
        make_optimizer(OptimConfig(clip_norm=None, beta1=0.0, weight_decay=0.1, eps=1e-2)),
        mesh_of(*shape),
    )
    with jax.set_mesh(mesh):
        state = with_learning_rate(init_state(params, optimizer, mesh), 0.1)
        arguments = state, place_batch(data, mesh), params["frozen"]
        step = jit_update(objective, optimizer, params["trainable"], mesh, accumulation=accumulation)
        return step.lower(*arguments).compile(FAST)(*arguments)


@pytest.mark.thorough
@pytest.mark.parametrize(("shape", "accumulation"), [((1, 1, 1), 1), ((2, 2, 2), 2)])
def test_a_frozen_part_is_left_alone_and_changes_no_gradient(shape, accumulation):
    """The trainable part's gradient and update are those of full training; a state holds nothing of the frozen part."""
    whole, mesh = random_params(DECODER), mesh_of(*shape)
    params = parted(jax.device_put(whole, forward.param_shardings(whole, mesh)))
    assert jax.tree.structure(merge(params)) == jax.tree.structure(whole)
    before = jax.device_get(params["frozen"])
    state, metrics = updated_from(params, shape, accumulation)
    full, full_metrics = full_update()
    found, wanted = (optax.tree_utils.tree_get(state.opt_state, "mu") for state in (state, full))
    trees_close(found, parted(wanted)["trainable"], rtol=2e-5, atol=1e-5)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(found))
    trees_close(state.trainable, parted(full.trainable)["trainable"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value, full_metrics["loss"].value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(found), rtol=1e-5)
    chex.assert_trees_all_equal(before, jax.device_get(params["frozen"]))
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)  # noqa: E731
    assert jax.tree.structure(state.trainable) == jax.tree.structure(params["trainable"])
    assert size(state) == 3 * size(params["trainable"]), "parameters and two moments"


# ---- one compiled step ---------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_runs_of_every_length_and_rate_share_one_compiled_step():
    """The rate is a number in the state, and the length of a run is no part of the program."""
    mesh, params = mesh_of(1, 2, 1), random_params(DECODER)
    optimizer = make_optimizer(OptimConfig())
    compiled: list[str] = []

    def on_compilation(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(about["fun_name"]))

    step = jit_update(quadratic, optimizer, params, mesh)
    jax.monitoring.register_event_duration_secs_listener(on_compilation)
    try:
        with jax.set_mesh(mesh):
            for steps, peak in ((2, 1e-3), (3, 1e-3), (4, 1e-2)):
                rate = make_learning_rate(OptimConfig(learning_rate=peak, warmup_steps=0), steps)
                state: TrainState = init_state(trainable(params), optimizer, mesh)
                for k in range(steps):
                    state, _ = step(with_learning_rate(state, rate(k)), place_batch(TARGETS[0], mesh))
                assert float(state.opt_state.hyperparams["learning_rate"]) == float(rate(steps - 1))
    finally:
        jax.monitoring.unregister_event_duration_listener(on_compilation)
    assert compiled.count("jit(update)") == 1 == step._cache_size()
    one, other = (
        jit_update(quadratic, make_optimizer(OptimConfig(learning_rate=peak)), params, mesh).lower(state, TARGETS[0])
        for peak in (1e-3, 1e-2)
    )
    assert one.as_text() == other.as_text(), "the persistent cache finds another rate's program"
