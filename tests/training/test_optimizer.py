"""mpo_jax.training.optimizer: schedules by hand and by optax, AdamW in NumPy, decay by name, moments placed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpo_jax.config.schema import MeshConfig, OptimConfig
from mpo_jax.models.forward import param_shardings
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.training.optimizer import (
    decay_mask,
    make_learning_rate,
    make_optimizer,
    make_schedule,
    with_learning_rate,
)
from mpo_jax.training.update import apply_if_finite, init_state
from mpo_jax.types import TrainState, trainable
from tests.models.tiny import random_params

DECODER = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
    max_positions=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return random_params(DECODER, head="value")


# the learning rate


@pytest.mark.parametrize(
    ("config", "num_steps", "expected"),
    [
        ({"warmup_steps": 4}, 12, {0: 0, 1: 0.25, 2: 0.5, 4: 1, 8: 0.5, 12: 0, 99: 0}),
        ({"warmup_steps": 0}, 10, {0: 1, 5: 0.5, 10: 0}),
        ({"warmup_steps": 4, "schedule": "constant"}, 12, {0: 0, 1: 0.25, 4: 1, 5: 1, 12: 1, 99: 1}),
        ({"schedule": "constant", "warmup_steps": 0}, 12, {0: 1, 12: 1}),
        ({"schedule": "constant"}, 20, {0: 0, 1: 0.5, 2: 1, 20: 1}),  # a tenth of the updates
        ({}, 20, {0: 0, 1: 0.5, 2: 1, 11: 0.5, 20: 0}),
        ({}, 9, {0: 1}),
        ({}, 50_000, {0: 0, 250: 0.5, 500: 1}),  # 500 at most
        ({"warmup_steps": 500}, 5, {0: 0, 2: 0.5, 4: 1, 5: 0}),  # a run shorter than its warm-up
        ({"warmup_steps": 500}, 1, {0: 1}),
    ],
)
def test_schedule_by_hand(config, num_steps, expected):
    schedule = make_schedule(OptimConfig(learning_rate=3e-4, **config), num_steps)
    for k, share in expected.items():
        np.testing.assert_allclose(float(schedule(k)), 3e-4 * share, rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize(("warmup", "total"), [(500, 3000), (100, 101), (1, 10)])
def test_schedule_is_the_paper_s(warmup, total):
    schedule = make_schedule(OptimConfig(learning_rate=5e-6, warmup_steps=warmup), total)
    reference = optax.warmup_cosine_decay_schedule(0, 5e-6, warmup, total, 0)
    for k in {0, 1, warmup - 1, warmup, warmup + 1, (warmup + total) // 2, total - 1, total}:
        assert float(schedule(k)) == float(reference(k))


def test_a_rate_of_zero_is_a_rate():
    schedule = make_schedule(OptimConfig(learning_rate=0.0, warmup_steps=2), 5)
    assert [float(schedule(k)) for k in range(6)] == [0.0] * 6


def test_the_rate_of_a_step_is_the_schedule_s_in_float32():
    optim = OptimConfig(learning_rate=3e-4, warmup_steps=2)
    rate = make_learning_rate(optim, 5)
    for k in range(6):
        assert rate(k).dtype == jnp.float32 and float(rate(k)) == np.float32(make_schedule(optim, 5)(k))


def test_a_rate_is_set_for_an_optimiser_that_takes_one_alone():
    params = {"norm": {"scale": jnp.ones(3)}}
    state = init_state(trainable(params), make_optimizer(OptimConfig()), make_mesh(MeshConfig()))
    rates = lambda state: float(state.opt_state.hyperparams["learning_rate"])  # noqa: E731
    assert (rates(state), rates(with_learning_rate(state, 0.25))) == (0.0, 0.25)
    own = init_state(trainable(params), optax.adam(0.1), make_mesh(MeshConfig()))
    with pytest.raises(ValueError, match=r"no injected learning_rate: wrap it in optax.inject_hyperparams"):
        with_learning_rate(own, 0.25)


# decay


def test_decay_is_chosen_by_name(params):
    """Stacked norms [L D] look like matrices, so the number of axes cannot tell."""
    mask = decay_mask(params)
    assert params["layers"]["attention_norm"]["scale"].ndim == 2
    undecayed = {jax.tree_util.keystr(path) for path, decays in jax.tree_util.tree_leaves_with_path(mask) if not decays}
    assert undecayed == {
        "['norm']['scale']", "['layers']['attention_norm']['scale']", "['layers']['mlp_norm']['scale']",
    }  # fmt: skip
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    biased = {"q": {"kernel": 1, "bias": 2}, "head": 3}
    assert decay_mask(biased) == {"q": {"kernel": True, "bias": False}, "head": True}


@partial(jax.jit, static_argnums=3)
def apply(state, grads, rate, tx):
    """The state after one update at this rate, and the gradient's norm."""
    state, metrics = apply_if_finite(with_learning_rate(state, rate), jnp.zeros(()), grads, {}, tx)
    return state, metrics["grad_norm"]


def test_without_a_gradient_only_decay_moves_parameters(params):
    optim = OptimConfig(weight_decay=0.1)
    tx = make_optimizer(optim)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    state, norm = apply(state, jax.tree.map(jnp.zeros_like, params), jnp.float32(0.5), tx)
    assert norm == 0 and state.step == 1
    leaves = map(jax.tree.leaves, (decay_mask(params), params, state.trainable))
    for decays, old, new in zip(*leaves, strict=True):
        np.testing.assert_allclose(new, old * (1 - 0.5 * 0.1) if decays else old, rtol=1e-6)


# one step


def numpy_adamw(params, grads_per_step, rates, *, beta1, beta2, eps, weight_decay, clip_norm):
    """AdamW (arXiv:1711.05101) with bias correction after global-norm clipping, in float64; `norm` is not decayed."""
    params = {name: p.astype(np.float64) for name, p in params.items()}
    mean = {name: np.zeros_like(p) for name, p in params.items()}
    square = {name: np.zeros_like(p) for name, p in params.items()}
    for t, (grads, rate) in enumerate(zip(grads_per_step, rates, strict=True), 1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        scale = 1.0 if clip_norm is None or norm < clip_norm else clip_norm / norm
        for name, p in params.items():
            g = grads[name].astype(np.float64) * scale
            mean[name] = beta1 * mean[name] + (1 - beta1) * g
            square[name] = beta2 * square[name] + (1 - beta2) * g**2
            direction = mean[name] / (1 - beta1**t) / (np.sqrt(square[name] / (1 - beta2**t)) + eps)
            decay = 0.0 if name == "norm" else weight_decay
            params[name] = p - rate * (direction + decay * p)
    return params


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip_norm", [None, 1.0, 100.0])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_steps_equal_a_float64_reference(weight_decay, clip_norm, num_steps):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 3), "norm": (2, 3)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    grads = [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(num_steps)]
    rates = [0.1, 0.05, 0.2, 0.0][:num_steps]
    optim = OptimConfig(weight_decay=weight_decay, clip_norm=clip_norm, beta1=0.8, beta2=0.95, eps=1e-3)
    tx = make_optimizer(optim)
    state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, params), tx.init(params))
    for step_grads, rate in zip(grads, rates, strict=True):
        state, norm = apply(state, jax.tree.map(jnp.asarray, step_grads), jnp.float32(rate), tx)
        np.testing.assert_allclose(norm, np.sqrt(sum((g**2).sum() for g in step_grads.values())), rtol=1e-6)
    options = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3}
    expected = numpy_adamw(params, grads, rates, weight_decay=weight_decay, clip_norm=clip_norm, **options)
    assert state.step == num_steps
    for name in shapes:
        np.testing.assert_allclose(state.trainable[name], expected[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("clip_norm", "share"), [(1.0, 0.2), (5.0, 1.0), (10.0, 1.0), (None, 1.0)])
def test_clipping_scales_the_whole_gradient_to_the_norm(clip_norm, share):
    """Read from the first moment, since Adam's direction hides the gradient's length."""
    grads = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    tx = make_optimizer(OptimConfig(clip_norm=clip_norm, beta1=0.0))
    _, state = tx.update(grads, tx.init(grads), grads)
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([moments["a"][0], moments["b"][0, 0]], [3 * share, 4 * share], rtol=1e-6)


# placement


@pytest.mark.parametrize("config", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_moments_are_sharded_like_their_parameters(params, config):
    mesh = make_mesh(config)
    state = init_state(trainable(params), make_optimizer(OptimConfig(weight_decay=0.1)), mesh)
    expected = param_shardings(params, mesh)
    adam = next(part for part in state.opt_state.inner_state if hasattr(part, "mu"))

    def check(leaf, sharding, value):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert leaf.addressable_shards[0].data.shape == sharding.shard_shape(leaf.shape)
        np.testing.assert_array_equal(leaf, value)

    zeros = jax.tree.map(jnp.zeros_like, params)
    for tree, values in ((state.trainable, params), (adam.mu, zeros), (adam.nu, zeros)):
        jax.tree.map(check, tree, expected, values)
    assert adam.mu["embedding"].addressable_shards[0].data.size == 32 * 16 // (config.fsdp * config.tensor)
    for counter in (adam.count, state.opt_state.count, state.opt_state.hyperparams["learning_rate"], state.step):
        assert counter.sharding.is_fully_replicated and len(counter.addressable_shards) == 8


def test_the_state_holds_copies(params):
    """The training steps donate their state, and its parameters may be another model's as well."""
    state = init_state(trainable(params), make_optimizer(OptimConfig()), make_mesh(MeshConfig()))
    for leaf in jax.tree.leaves(state.trainable):
        leaf.delete()
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(params))
