"""An update is exact however it is cut up: accumulation, clipping after it, decay by name, and float32 masters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpo_jax.config.schema import OptimConfig
from mpo_jax.models.forward import Model
from mpo_jax.models.spec import LayerSpec
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.stages import sft
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state, make_update
from mpo_jax.types import Mean, Tree, trainable
from tests.models.tiny import DECODER, FAST, mesh_of, random_params, trees_close, with_layers
from tests.stages.test_sharded import MODEL, ONE, OPTIM, SINGLES, metrics_close, run_step

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize(
    ("name", "accumulation", "devices"),
    [
        ("sft", 4, 2),  # tests/training/test_update.py has these two on one device
        ("dpo", 4, 2),
        ("ppo_actor", 8, 1),
        ("ppo_actor", 4, 2),
        ("ppo_critic", 8, 1),
        ("ppo_critic", 4, 2),
    ],
)
def test_eight_rows_at_once_equal_eight_of_one_and_four_of_two(name, accumulation, devices):
    """The real steps on uneven rows; DPO with its NLL term, whose count is another one than the pairs'."""
    whole, parts = run_step(name, ONE), run_step(name, (devices, 1, 1), accumulation)
    assert parts.state.trainable["embedding"].sharding.num_devices == devices
    trees_close(parts.gradients, whole.gradients, rtol=0, atol=1e-5)
    trees_close(parts.state.trainable, whole.state.trainable, rtol=0, atol=1e-5)
    metrics_close(parts.metrics, whole.metrics)


# ---- the order of accumulation and clipping ------------------------------------------------------------------------


def linear(params: Tree, batch: tuple[jax.Array, jax.Array]) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean of x_i . scale over the rows that the mask keeps: the gradient is the mean of those x_i."""
    x_BD, mask_B = batch
    return {"loss": Mean.of((x_BD * params["norm"]["scale"][None]).sum(-1), mask_B)}, {}


ROWS = np.array([[30.0, 0.0], [0.0, 0.2], [50.0, 0.0], [0.0, 0.4], [0.0, 0.0], [0.0, 0.1], [0.0, 0.0], [0.0, 40.0]])
KEPT = np.array([True, True, True, True, False, True, False, True])
"""Alternating: a micro-batch of every other row is either long along the first axis or along the second."""


def clipped_gradient(clip_norm: float | None, accumulation: int) -> np.ndarray:
    """What reaches Adam, read from its first moment."""
    optimizer = make_optimizer(OptimConfig(clip_norm=clip_norm, beta1=0.0))
    state = init_state(trainable({"norm": {"scale": jnp.ones(2)}}), optimizer, mesh_of(*ONE))
    update = jax.jit(make_update(linear, optimizer, accumulation=accumulation))
    state, metrics = update(with_learning_rate(state, 0.1), (jnp.asarray(ROWS, jnp.float32), jnp.asarray(KEPT)))
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(ROWS[KEPT].mean(0)), rtol=1e-6)
    return np.asarray(optax.tree_utils.tree_get(state.opt_state, "mu")["norm"]["scale"])


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_the_accumulated_gradient_is_clipped_once(accumulation):
    whole = ROWS[KEPT].mean(0)
    np.testing.assert_allclose(clipped_gradient(None, accumulation), whole, rtol=1e-6)
    np.testing.assert_allclose(clipped_gradient(100.0, accumulation), whole, rtol=1e-6)
    np.testing.assert_allclose(clipped_gradient(1.0, accumulation), whole / np.linalg.norm(whole), rtol=1e-6)


def test_clipping_each_micro_batch_would_point_elsewhere():
    """Guards the test above."""
    whole = ROWS[KEPT].mean(0)
    parts = [ROWS[i::2][KEPT[i::2]].mean(0) for i in (0, 1)]
    early = np.mean([part / max(np.linalg.norm(part), 1.0) for part in parts], 0)
    assert np.abs(early / np.linalg.norm(early) - whole / np.linalg.norm(whole)).max() > 0.1


# ---- what an update leaves alone -----------------------------------------------------------------------------------

BIASED = with_layers(DECODER, LayerSpec(qkv_bias=True, qk_norm=True))
UNDECAYED = {
    "norm.scale", "layers.attention_norm.scale", "layers.mlp_norm.scale",
    "layers.attention.q_norm.scale", "layers.attention.k_norm.scale",
    "layers.attention.q_bias", "layers.attention.k_bias", "layers.attention.v_bias",
}  # fmt: skip


def no_gradient(params: Tree, _: jax.Array) -> tuple[dict[str, Mean], dict[str, Mean]]:
    return {"loss": Mean.of(jnp.stack([0.0 * leaf.sum() for leaf in jax.tree.leaves(params)]))}, {}


def test_without_a_gradient_decay_leaves_norms_and_biases_alone():
    """Of a model with every kind of parameter; scalar heads and embeddings do shrink."""
    scalar = random_params(BIASED, 1, head="value")["score"]
    params = random_params(BIASED) | {"score": scalar}
    optimizer = make_optimizer(OptimConfig(weight_decay=0.1))
    state = with_learning_rate(init_state(trainable(params), optimizer, mesh_of(*ONE)), 0.5)
    state, _ = jax.jit(make_update(no_gradient, optimizer))(state, jnp.zeros(1))
    assert int(state.step) == 1
    unchanged = set()

    def check(path, old, new):
        name = ".".join(part.key for part in path)
        if np.array_equal(new, old):
            unchanged.add(name)
        else:
            np.testing.assert_allclose(new, old * (1 - 0.5 * 0.1), rtol=1e-6, err_msg=name)

    jax.tree_util.tree_map_with_path(check, params, state.trainable)
    assert unchanged == UNDECAYED


# ---- types ---------------------------------------------------------------------------------------------------------


def test_bfloat16_arithmetic_keeps_float32_parameters_and_moments():
    """A real step: the master stays float32, moves by less than bfloat16 could show, and the loss is near float32's."""
    mesh = mesh_of(*ONE)
    half = Model(DECODER, dtype="bfloat16", logit_chunk=MODEL.logit_chunk)
    params = random_params(DECODER)
    with jax.set_mesh(mesh):
        state = init_state(trainable(params), make_optimizer(OPTIM), mesh)
        arguments = with_learning_rate(state, 1e-4), place_batch(SINGLES, mesh)
        state, metrics = sft.make_step(half, OPTIM, 1, mesh).lower(*arguments).compile(FAST)(*arguments)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) == 3 * len(jax.tree.leaves(params)) + 1, "parameters, two moments, and the learning rate"
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    moved = np.asarray(state.trainable["norm"]["scale"] - params["norm"]["scale"])
    assert (moved != 0).mean() > 0.9 and np.abs(moved).max() < 2**-9 * np.abs(params["norm"]["scale"]).min()
    full = run_step("sft", ONE)
    loss, wanted = metrics["loss"].value, full.metrics["loss"].value
    assert metrics["loss"].total.dtype == jnp.float32
    assert 0 < abs(loss - wanted) < 0.03 * wanted
    for name, grad in full.gradients["layers"]["mlp"].items():
        found = optax.tree_utils.tree_get(state.opt_state, "mu")["layers"]["mlp"][name] / (1 - OPTIM.beta1)
        assert np.linalg.norm(found - grad) < 0.05 * np.linalg.norm(grad)
