"""mpo_jax.models.adapter: adapters beside the kernels, folded into them, and split from what is frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.models import adapter, forward
from mpo_jax.models.adapter import Adapter
from mpo_jax.models.forward import Model
from mpo_jax.models.kernels import KERNELS
from mpo_jax.models.spec import DecoderConfig, LayerSpec
from mpo_jax.types import Tree, merge

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
    from mpo_jax.types import PromptBatch

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
    wanted = forward.logits(Model(CONFIG), {**tree, "layers": layers}, tokens())
    found = forward.logits(model, merge({"trainable": low, "frozen": tree}), tokens())
    assert float(jnp.abs(found - wanted).max()) < 1e-4 * float(jnp.abs(wanted).max())
    plain = forward.logits(Model(CONFIG), tree, tokens())
    assert float(jnp.abs(found - plain).max()) > 0.1
