"""The update is exact whatever the portions, and the host loop resumes where it was."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config import OptimConfig, TrainConfig
from mpo_jax.model.functional import Model
from mpo_jax.stages import dpo, reward, sft
from mpo_jax.train import fit, gradients, init_state, make_update, state_sharding
from mpo_jax.types import Mean
from tests.model.tiny import DECODER, batch, mesh_of, random_params, trees_close

MODEL = Model(DECODER)
LENGTHS = [[9, 1], [2, 2], [1, 9], [5, 4], [8, 3], [3, 8], [6, 6], [1, 1]]
"""Uneven on purpose: a mean of micro-batch means would weigh tokens wrongly."""


def cases():
    one = batch([4, 3, 6, 5, 2, 6, 4, 1], [[a] for a, _ in LENGTHS])
    two = batch([4, 3, 6, 5, 2, 6, 4, 1], LENGTHS)
    ref = np.random.default_rng(0).normal(-10, 3, (8, 2)).astype(np.float32)
    loss = dpo.DpoLoss("dpo", 0.1, 0.0, False, 0.3)
    return {
        "sft": (partial(sft.objective, MODEL), random_params(DECODER), one),
        "reward": (partial(reward.objective, MODEL, "last_token"), random_params(DECODER, scalar=True), two),
        "reward_ds_span": (partial(reward.objective, MODEL, "ds_span"), random_params(DECODER, scalar=True), two),
        "dpo_with_nll": (partial(dpo.objective, MODEL, loss), random_params(DECODER), (two, ref)),
    }


@pytest.mark.parametrize("name", cases())
def test_accumulation_equals_the_whole_batch(name):
    objective, params, data = cases()[name]
    data = jax.tree.map(jnp.asarray, data)
    run = jax.jit(partial(gradients, objective), static_argnames="accumulation")
    whole_grads, whole_metrics = run(params, data, accumulation=1)
    for accumulation in (2, 4, 8):
        grads, metrics = run(params, data, accumulation=accumulation)
        trees_close(grads, whole_grads, rtol=2e-5, atol=2e-6)
        for key, value in whole_metrics.items():
            if isinstance(value, Mean):
                np.testing.assert_allclose(metrics[key].total, value.total, rtol=1e-5, atol=1e-5)
                assert metrics[key].count == value.count
            else:
                assert metrics[key] == value


def test_uneven_masks_would_tell_a_mean_of_means_apart():
    """Guards the test above: the micro-batches' own means do differ from the whole batch's."""
    objective, params, data = cases()["sft"]
    whole = objective(params, data)[0]["loss"].value
    halves = [objective(params, jax.tree.map(lambda x, s=s: x[s::2], data))[0]["loss"].value for s in (0, 1)]
    assert abs(np.mean(halves) - whole) > 1e-3


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo_with_nll"])
def test_update_on_a_mesh_equals_one_device(shape, name):
    """Updated parameters and moments agree to rounding, and the optimiser's state lies like its parameters."""
    from mpo_jax.sharding import place_batch

    objective, params, data = cases()[name]
    # eps large against rounding: Adam's first step is sign(g), which amplifies the rounding of tiny gradients
    optim = OptimConfig(learning_rate=0.1, eps=1e-2, weight_decay=0.1)
    results = []
    for mesh in (mesh_of(1, 1, 1), mesh_of(*shape)):
        with jax.set_mesh(mesh):
            shardings = state_sharding(MODEL, optim, mesh, scalar=name == "reward")
            placed = jax.device_put(params, shardings.params)
            state = init_state(placed, optim, mesh)
            assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state.opt_state, shardings.opt_state))
            step = jax.jit(make_update(objective, optim, accumulation=1), out_shardings=(shardings, None))
            state, metrics = step(state, place_batch(data, mesh), jnp.asarray(0.1))
            moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
            sharded = [x for x in moments if not x.sharding.is_fully_replicated]
            assert bool(sharded) == (mesh.size > 1 and shape != (8, 1, 1))
            results.append((jax.device_get(state.params), float(metrics["grad_norm"])))
    trees_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-5)


def test_fit_resumes_and_ends_equal_to_an_uninterrupted_run(tmp_path):
    """Killed between two checkpoints: the same call again ends bit-identical, and metrics hold each step once."""
    objective, params, data = cases()["sft"]
    mesh, optim = mesh_of(1, 1, 1), OptimConfig(learning_rate=0.01)
    config = TrainConfig(steps=7, batch_size=8, log_every=1, checkpoint_every=2, optim=optim)
    with jax.set_mesh(mesh):
        update = jax.jit(make_update(objective, optim, accumulation=1))

        def run(folder, die_at=None):
            def step(state, k):
                if k == die_at:
                    raise RuntimeError("killed")
                rolled = jax.tree.map(lambda x: jnp.roll(x, k, 0), data)
                return update(state, rolled, jnp.asarray(0.01 * (k + 1)))

            start = init_state(params, optim, mesh)
            return fit(start, step, config=config, num_steps=7, folder=folder, stage="sft", tensorboard=False)

        whole, last = run(tmp_path / "whole")
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "killed", die_at=5)
        resumed, resumed_last = run(tmp_path / "killed")
    assert int(resumed.step) == 7
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(resumed))
    assert last["loss"] == resumed_last["loss"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    steps = [[line.split(",")[0] for line in text] for text in lines]
    assert steps[0] == steps[1] and len(steps[0]) == 7


def test_init_state_leaves_the_given_parameters_usable():
    """Steps donate their state; the caller's own copy of the parameters must survive that."""
    objective, params, data = cases()["sft"]
    mesh, optim = mesh_of(1, 1, 1), OptimConfig()
    with jax.set_mesh(mesh):
        before = jax.device_get(params)
        step = jax.jit(make_update(objective, optim, accumulation=1), donate_argnums=0)
        step(init_state(params, optim, mesh), jax.tree.map(jnp.asarray, data), jnp.asarray(0.1))
        chex.assert_trees_all_equal(before, jax.device_get(params))
