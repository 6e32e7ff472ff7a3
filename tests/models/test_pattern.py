"""Models whose layers differ: against NumPy in float64, through every path that reads a layer's spec."""

import dataclasses
import json
import shutil
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling, make_generate
from mpo_jax.models.spec import LayerSpec, RopeScaling, shortest_pattern
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.types import frozen
from tests.covering import covering, the_rest_thorough
from tests.models.tiny import (
    DECODER,
    FAST,
    RECORDED,
    batch,
    check_cached_decoding,
    close,
    load_folder,
    mesh_of,
    random_params,
    trees_close,
    with_layers,
)
from tests.reference import decoder as reference

LOCAL, FULL = LayerSpec(window=3), LayerSpec()
NORMED = LayerSpec(qkv_bias=True, qk_norm=True)
MODELS = {
    "local, full": with_layers(DECODER, LOCAL, FULL, num_layers=4),
    "local, local, full with another base": with_layers(
        DECODER,
        LayerSpec(window=2, rope_theta=100.0),
        LayerSpec(window=4, rope_theta=100.0),
        LayerSpec(rope_theta=1e6, rope_scaling=RopeScaling("linear", 4.0)),
        num_layers=6,
    ),
    "a period cut off": with_layers(DECODER, LOCAL, LayerSpec(window=2, rope_theta=100.0), FULL, num_layers=5),
    "all that may differ": with_layers(
        DECODER,
        dataclasses.replace(NORMED, window=3, scale=0.9, soft_cap=1.5),
        dataclasses.replace(NORMED, rope_theta=50.0, activation="gelu_tanh"),
        num_layers=4,
    ),
}

all_logits = jax.jit(forward.logits, static_argnums=0)


def plain_words(spec: LayerSpec) -> dict[str, Any]:
    stretch = spec.rope_scaling.factor if spec.rope_scaling else 1.0
    return {
        "window": spec.window, "theta": spec.rope_theta, "stretch": stretch, "scale": spec.scale,
        "cap": spec.soft_cap, "activation": spec.activation,
    }  # fmt: skip


@pytest.fixture(scope="module", params=the_rest_thorough(MODELS, 2))
def case(request):
    """Sizes, parameters, and prompts of unlike lengths with two responses each."""
    config = MODELS[request.param]
    return config, random_params(config), batch([5, 1, 7], [[6, 4], [3, 6], [6, 1]], width=(7, 6))


# ---- what a pattern is ---------------------------------------------------------------------------------------------


def test_layers_repeat_the_pattern():
    assert MODELS["local, full"].layers == (LOCAL, FULL, LOCAL, FULL)
    assert DECODER.layers == (FULL,) * DECODER.num_layers


@given(st.lists(st.sampled_from([LOCAL, FULL]), min_size=1, max_size=4), st.integers(1, 4))
def test_the_shortest_pattern_gives_the_layers_back(period, repeats):
    layers = period * repeats
    found = shortest_pattern(layers)
    assert [found[i % len(found)] for i in range(len(layers))] == layers and len(found) <= len(period)


@pytest.mark.parametrize(
    ("specs", "layers", "names"),
    [
        ((), 2, "pattern is empty"),
        ((LOCAL, FULL, FULL), 2, "the pattern's 3 layers are more than num_layers=2"),
        ((FULL, LayerSpec(qkv_bias=True)), 2, "must agree on qkv_bias"),
        ((FULL, LayerSpec(qk_norm=True)), 2, "must agree on qk_norm"),
    ],
)
def test_impossible_patterns(specs, layers, names):
    with pytest.raises(ValueError, match=names):
        with_layers(DECODER, *specs, num_layers=layers)


# ---- whole rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "implementation"), the_rest_thorough(covering(tuple(MODELS), ("blocked", "xla")), 2), indirect=["case"]
)
def test_logits_equal_numpy(case, implementation):
    """Two responses behind one prompt, of which NumPy gets each as a sequence of its own."""
    config, params, joined = case
    found = np.asarray(all_logits(Model(config, attention=implementation), params, forward.join(joined)))
    P, S = joined.prompt.shape[1], joined.response.shape[2]
    layers = [plain_words(spec) for spec in config.layers]
    for b, prompt_len in enumerate(joined.prompt_len):
        for n, size in enumerate(joined.response_len[b]):
            ids = np.concatenate([joined.prompt[b, :prompt_len], joined.response[b, n, :size]])
            wanted = reference.logits(params, ids, layers, eps=config.norm_eps)
            close(found[b, :prompt_len], wanted[:prompt_len], rtol=1e-4, atol=1e-4)
            begin = P + n * S
            close(found[b, begin : begin + size], wanted[prompt_len:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_checkpoint_with_layers_of_two_kinds(name, tmp_path):
    """transformers' recorded weights, under a config.json whose first layer has a window."""
    folder = shutil.copytree(RECORDED / name, tmp_path / name)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2, "use_sliding_window": True}
    (folder / "config.json").write_text(json.dumps(raw))
    config, params = load_folder(folder)
    assert [spec.window for spec in config.layers] == [2, None]
    joined = batch([7], [[5]])
    ids = np.concatenate([joined.prompt[0], joined.response[0, 0]])
    full = {**params, "head": forward.head_matrix(Model(config), params)}
    wanted = reference.logits(full, ids, [plain_words(spec) for spec in config.layers], eps=config.norm_eps)
    close(all_logits(Model(config), params, forward.join(joined))[0], wanted, rtol=1e-4, atol=1e-4)


@partial(jax.jit, static_argnums=0)
def gradients(model, params, joined):
    def total(params):
        logp, entropy = forward.token_logp(model, params, forward.join(joined), with_entropy=True)
        return (jnp.cos(jnp.arange(logp.size)).reshape(logp.shape) * logp + 0.3 * entropy).sum()

    return jax.grad(total)(params)


@pytest.mark.thorough
@pytest.mark.parametrize(("case", "remat"), covering(tuple(MODELS), ("none", "full")), indirect=["case"])
def test_gradients_equal_those_of_xlas_attention(case, remat):
    config, params, joined = case
    wanted = gradients(Model(config, attention="xla"), params, joined)
    trees_close(gradients(Model(config, remat=remat), params, joined), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_a_pattern_of_equal_layers_is_one_layer():
    """Scanned by twos, four equal layers give what they give one by one."""
    joined = batch([5, 1], [[6, 4], [3, 6]])
    one = with_layers(DECODER, LOCAL, num_layers=4)
    params = random_params(one)
    wanted, found = (
        gradients(Model(config, remat="dots"), params, joined) for config in (one, with_layers(one, LOCAL, LOCAL))
    )
    trees_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_program_grows_with_the_pattern_alone():
    def size(*specs, num_layers):
        config = with_layers(DECODER, *specs, num_layers=num_layers)
        tokens = forward.join(batch([5], [[6]]))
        lowered = jax.jit(forward.hidden_states, static_argnums=0).lower(
            Model(config), forward.abstract_params(config), tokens
        )
        return lowered.as_text().count("dot_general")

    assert size(LOCAL, FULL, num_layers=4) == size(LOCAL, FULL, num_layers=12) == 2 * size(FULL, num_layers=12)
    # a period that is cut off: with the kinds of layers
    five_to_one = [LOCAL] * 5 + [FULL]
    assert size(*five_to_one, num_layers=8) == size(*five_to_one, num_layers=26) == 2 * size(FULL, num_layers=12)


@pytest.mark.thorough
@pytest.mark.optimised
@pytest.mark.parametrize("specs", [(LOCAL, FULL), (LOCAL, LOCAL, LOCAL, LOCAL, FULL)])
def test_no_copy_of_the_weights_is_kept_for_the_backward_pass(specs):
    """Few tokens and large matrices: scratch memory holds some layers of them, never all."""
    config = with_layers(DECODER, *specs, hidden_size=64, intermediate_size=1024, num_layers=24)
    shapes, joined = forward.abstract_params(config), batch([2], [[2]])
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes["layers"]))
    for remat in ("dots", "full"):
        compiled = gradients.lower(Model(config, remat=remat), shapes, joined).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < weights / 3


@pytest.mark.thorough
def test_devices_change_nothing():
    config = MODELS["all that may differ"]
    joined = batch([5, 1, 7, 3], [[6, 4], [3, 6], [6, 1], [2, 2]])
    params, mesh = random_params(config), mesh_of(2, 2, 2)
    model = Model(config, remat="dots")
    wanted = gradients(model, params, joined)
    placed = jax.device_put(params, forward.param_shardings(params, mesh))
    with jax.set_mesh(mesh):
        divided = jax.jit(gradients.__wrapped__, static_argnums=0, compiler_options=FAST)
        found = divided(model, placed, place_batch(joined, mesh))
    trees_close(found, wanted, rtol=0, atol=1e-5)


# ---- cached decoding -----------------------------------------------------------------------------------------------


def test_decoding_with_a_cache_equals_the_full_forward(case):
    """Teacher-forced behind prompts of several lengths, with garbage in the slots still to be written."""
    config, params, _ = case
    check_cached_decoding(Model(config), params, batch([4, 7, 1], [[8], [8], [8]], width=(7, 8)))


def test_masks_and_rotations_are_made_once_for_equal_layers():
    config = with_layers(DECODER, LOCAL, LOCAL, FULL, num_layers=3)
    visible = forward.visible_slots(Model(config), jnp.asarray([4]), (4, 4, 4), jnp.asarray([2]), 0)
    assert visible[0] is visible[1] and visible[0] is not visible[2]
    assert (visible[0].sum(), visible[2].sum()) == (3, 7)


@pytest.mark.thorough
def test_greedy_samples_are_the_full_forwards_argmax():
    config = MODELS["local, local, full with another base"]
    params, joined = random_params(config), batch([5, 1, 7], [[1], [1], [1]])
    prompts = dataclasses.replace(joined, response=joined.response[..., :0], response_len=0 * joined.response_len)
    sample = make_generate(Model(config), Sampling(max_new_tokens=20, greedy=True), -1, mesh_of(1, 1, 1))
    drawn, _ = sample(
        frozen(params), prompts, jax.random.key(0), np.zeros(3, np.int32), jnp.ones(config.vocab_size, bool)
    )
    tokens = forward.join(drawn)
    logits = np.asarray(all_logits(Model(config), params, tokens))
    before = np.asarray(forward.predecessor(tokens))[:, tokens.scored_from :]
    best = np.take_along_axis(logits, before[..., None], 1).argmax(-1)
    np.testing.assert_array_equal(best, np.asarray(drawn.response)[:, 0])
