"""mpo_jax.models.adapter: adapters beside the kernels, folded into them, and split from what is frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.models import adapter, forward, quantised
from mpo_jax.models.adapter import Adapter
from mpo_jax.models.forward import Model
from mpo_jax.models.kernels import KERNELS
from mpo_jax.models.spec import DecoderConfig, LayerSpec
from mpo_jax.types import PromptBatch, Tree, merge
from tests.models.tiny import logits

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=64, init_std=0.3, pattern=(LayerSpec(qkv_bias=True),),
)  # fmt: skip
ALL = Adapter(rank=3, alpha=1.5, targets=tuple(KERNELS))


def pair(adapted: Adapter) -> tuple[Model, Tree, Tree]:
    """A model, its parameters, and adapters whose B is not zero."""
    tree = forward.init_params(CONFIG, jax.random.key(0))
    low = adapter.init(adapted, tree["layers"], jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 99))
    low = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), low)
    return Model(CONFIG, adapter=adapted), tree, low


def tokens():
    ids = np.random.default_rng(0).integers(1, 64, (2, 12)).astype(np.int32)
    batch = PromptBatch(ids[:, :5], np.array([5, 3]), ids[:, None, 5:], np.array([[7], [4]]), np.zeros(2, np.uint32))
    return forward.join(jax.tree.map(jnp.asarray, batch))


@pytest.mark.parametrize("name", KERNELS)
def test_an_adapter_adds_its_product(name):
    """The model with one adapter agrees with the one whose kernel is W + s B A, made by numpy in float64."""
    adapted = dataclasses.replace(ALL, targets=(name,))
    model, tree, low = pair(adapted)
    module = KERNELS[name].module
    kernel, (a, b) = (
        np.asarray(tree["layers"][module][name], np.float64),
        (np.asarray(low["layers"][module][f"{name}_lora"][part], np.float64) for part in "ab"),
    )
    product = (
        np.tensordot(a[0], b[0], 1)[None]
        if len(a) == 1
        else np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b, strict=True)])
    )
    layers = {**tree["layers"], module: {**tree["layers"][module], name: jnp.asarray(kernel + 0.5 * product)}}
    wanted = logits(Model(CONFIG), {**tree, "layers": layers}, tokens())
    found = logits(model, merge({"trainable": low, "frozen": tree}), tokens())
    assert float(jnp.abs(found - wanted).max()) < 1e-4 * float(jnp.abs(wanted).max())
    plain = logits(Model(CONFIG), tree, tokens())
    assert float(jnp.abs(found - plain).max()) > 0.1


def test_a_new_adapter_changes_no_bit():
    tree = forward.init_params(CONFIG, jax.random.key(0))
    low = adapter.init(ALL, tree["layers"], jax.random.key(1))
    found = logits(Model(CONFIG, adapter=ALL), merge({"trainable": low, "frozen": tree}), tokens())
    assert np.array_equal(found, logits(Model(CONFIG), tree, tokens()))
    bound = 1 / np.sqrt(CONFIG.hidden_size)
    a = np.asarray(low["layers"]["attention"]["q_lora"]["a"])
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.9 * bound and len(np.unique(a)) > 0.9 * a.size


def test_folding_agrees_with_the_layers():
    model, tree, low = pair(ALL)
    params = merge({"trainable": low, "frozen": tree})
    whole = adapter.folded(params, ALL, "float32")
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    wanted = logits(model, params, tokens())
    found = logits(Model(CONFIG), whole, tokens())
    assert float(jnp.abs(found - wanted).max()) < 1e-4 * float(jnp.abs(wanted).max())


def test_folding_rounds_once_to_the_stored_type():
    _, tree, low = pair(ALL)
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    whole = adapter.folded(merge({"trainable": low, "frozen": stored}), ALL, "bfloat16")
    q, lora = stored["layers"]["attention"]["q"], low["layers"]["attention"]["q_lora"]
    a, b = np.asarray(lora["a"], np.float64), np.asarray(lora["b"], np.float64)
    exact = np.asarray(q, np.float64) + 0.5 * np.einsum("ldr,lrhk->ldhk", a, b)
    found = np.asarray(whole["layers"]["attention"]["q"])
    assert found.dtype == jnp.bfloat16
    # half a unit in the last of bfloat16's 8 bits
    assert (np.abs(found.astype(np.float64) - exact) <= np.abs(exact) * 2.0**-8 * 1.01).all()


def test_only_adapters_and_the_head_train():
    tree = forward.with_score_head(forward.init_params(CONFIG, jax.random.key(0)), CONFIG)
    low = adapter.init(dataclasses.replace(ALL, targets=("q", "v")), tree["layers"], jax.random.key(1))
    params = adapter.split(tree, low, "value")
    assert set(params["trainable"]) == {"layers", "score"} and "score" not in params["frozen"]
    assert set(params["trainable"]["layers"]["attention"]) == {"q_lora", "v_lora"}
    # the very arrays, not copies
    assert params["frozen"]["layers"]["attention"]["q"] is tree["layers"]["attention"]["q"]
    assert params["frozen"]["embedding"] is tree["embedding"]


def test_the_abstract_split_is_the_real_one():
    model = Model(CONFIG, adapter=ALL)
    for head in ("lm", "value"):
        tree = forward.init_params(CONFIG, jax.random.key(0))
        if head == "value":
            tree = forward.with_score_head(tree, CONFIG)
        real = adapter.split(tree, adapter.init(ALL, tree["layers"], jax.random.key(1)), head)
        shapes = forward.abstract_split(model, head=head)
        assert jax.tree.map(jnp.shape, real) == jax.tree.map(lambda x: x.shape, shapes)


def test_a_target_that_is_not_there_is_an_error():
    tree = forward.init_params(CONFIG, jax.random.key(0))
    layers = {**tree["layers"], "mlp": {"up": tree["layers"]["mlp"]["up"]}}
    with pytest.raises(ValueError, match=r"no kernel mlp\.gate"):
        adapter.init(ALL, layers, jax.random.key(1))


# ---- int8 ------------------------------------------------------------------------------------------------------------


def test_quantised_kernels_are_off_by_half_a_step_at_most():
    tree = forward.init_params(CONFIG, jax.random.key(0))
    stored = quantised.quantised(tree)
    back = quantised.restored(stored["layers"], "float32")
    for name, kernel in KERNELS.items():
        parts = stored["layers"][kernel.module][name]
        exact, found = tree["layers"][kernel.module][name], back[kernel.module][name]
        assert parts["int8"].dtype == jnp.int8 and parts["int8"].shape == exact.shape
        assert parts["scale"].shape == exact.shape[:1] + exact.shape[1 + kernel.inputs :]
        step = jnp.expand_dims(parts["scale"], tuple(range(1, 1 + kernel.inputs)))
        assert bool((jnp.abs(found - exact) <= 0.501 * step).all())
        # no column is spared: the largest element of each has the last level
        assert bool((jnp.abs(parts["int8"].astype(int)).max(tuple(range(1, 1 + kernel.inputs))) == 127).all())


def test_a_quantised_model_reads_restored_kernels():
    tree = forward.init_params(CONFIG, jax.random.key(0))
    stored = quantised.quantised(tree)
    restored = {**tree, "layers": quantised.restored(stored["layers"], "float32")}
    found = logits(Model(CONFIG), stored, tokens())
    wanted = logits(Model(CONFIG), restored, tokens())
    assert float(jnp.abs(found - wanted).max()) < 1e-5
    exact = logits(Model(CONFIG), tree, tokens())
    error = float(jnp.abs(found - exact).max() / jnp.abs(exact).max())
    assert 1e-5 < error < 0.05


def test_columns_of_zeros_stay_zeros():
    kernel = jnp.zeros((3, 4)).at[:, 1].set(jnp.asarray([1.0, -2.0, 0.5]))
    parts = quantised.quantise(KERNELS["gate"], kernel)
    assert parts["int8"].tolist() == [[0, 64, 0, 0], [0, -127, 0, 0], [0, 32, 0, 0]]
    assert np.isfinite(np.asarray(parts["scale"])).all()
