"""mpo_jax.models.decoder: each part against NumPy in float64, and relations between the parts."""

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from mpo_jax.config.schema import AdapterConfig
from mpo_jax.models import attention, decoder, forward, quantised, rope
from mpo_jax.models.adapter import Adapter
from mpo_jax.models.decoder import MLP, PARAM_AXES, Block, LayerNorm, RMSNorm, ValueHead
from mpo_jax.models.forward import Model
from mpo_jax.models.spec import LayerSpec, RopeScaling
from tests.covering import the_rest_thorough
from tests.models.tiny import (
    DECODER,
    RECORDED,
    batch,
    check_cached_decoding,
    close,
    join,
    load_folder,
    logits,
    random_params,
    with_layers,
)

SPEC = LayerSpec()
GEMMA = LayerSpec(scale=0.3, soft_cap=1.5, activation="gelu_tanh")

B, T, D, H, G, K = 2, 7, DECODER.hidden_size, DECODER.num_heads, DECODER.num_kv_heads, DECODER.head_dim


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def layer_params(seed=0):
    return jax.tree.map(lambda x: x[0], random_params(DECODER, seed)["layers"])


def block(params, spec) -> Block:
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Block(DECODER, spec, rngs=nnx.Rngs(0)))), params)


def part(module, params) -> Any:
    return nnx.merge(nnx.graphdef(module), params)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm(size):
    x, scale = size * normal(B, T, D), normal(D, seed=1)
    norm = part(RMSNorm(D, 1e-3), {"scale": f32(scale)})
    close(norm(f32(x)), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale)


def test_rms_norm_is_float32_inside():
    """Squares that overflow float16 do no harm: only the result is rounded."""
    norm = part(RMSNorm(D, 1e-5), {"scale": jnp.ones(D)})
    x = f32(300 * normal(B, T, D)).astype(jnp.float16)
    out = norm(x)
    assert out.dtype == jnp.float16 and jnp.isfinite(out).all()
    np.testing.assert_array_equal(out, norm(x.astype(jnp.float32)).astype(jnp.float16))


def test_rope_rotates_each_pair_of_halves():
    """Component j and j + K/2 are one complex number, turned by position * theta^(-2j / K)."""
    x, position = normal(B, T, 3, 8), np.array([[0, 1, 2, 3, 4, 5, 6], [60, 3, 0, 0, 9, 1, 2]])
    angle = position[..., None] * 500.0 ** (-2 * np.arange(4) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, :, None]
    cos, sin = rope.rope_tables(LayerSpec(rope_theta=500.0), 8, jnp.asarray(position))
    assert cos.dtype == sin.dtype == jnp.float32
    close(rope.rotate(f32(x), cos, sin), np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_rope_sees_distances_alone():
    """Products of queries and keys do not change when all positions move."""
    q, k = f32(normal(1, T, 1, K)), f32(normal(1, T, 1, K, seed=1))

    def products(offset):
        tables = rope.rope_tables(SPEC, K, jnp.arange(T)[None] + offset)
        return jnp.einsum("btk,bsk->bts", rope.rotate(q, *tables)[:, :, 0], rope.rotate(k, *tables)[:, :, 0])

    close(products(20), products(0), atol=1e-5)
    assert not np.allclose(products(0), jnp.einsum("btk,bsk->bts", q[:, :, 0], k[:, :, 0]), atol=0.1)


@pytest.mark.parametrize("shape", [(D, 5), (D, 4, 3)])
def test_linear_and_its_gradients(shape):
    x, kernel, weight = f32(normal(B, T, D)), f32(normal(*shape)), f32(normal(B, T, *shape[1:], seed=2))
    close(decoder.linear(x, kernel), jnp.tensordot(x, kernel, 1), atol=1e-5)
    grads = jax.grad(lambda *xs: (decoder.linear(*xs) * weight).sum(), argnums=(0, 1))(x, kernel)
    wanted = jax.grad(lambda *xs: (jnp.tensordot(*xs, 1) * weight).sum(), argnums=(0, 1))(x, kernel)
    for actual, expected in zip(grads, wanted, strict=True):
        close(actual, expected, atol=1e-4)
    assert decoder.linear(x.astype(jnp.bfloat16), kernel).dtype == jnp.bfloat16


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh, "gelu": gelu}


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_mlp(activation):
    params = layer_params()["mlp"]
    x = normal(B, T, D)
    gate, up, down = (np.asarray(params[name], np.float64) for name in ("gate", "up", "down"))
    wanted = (ACTIVATIONS[activation](x @ gate) * (x @ up)) @ down
    mlp = part(MLP(DECODER, LayerSpec(activation=activation), rngs=nnx.Rngs(0)), params)
    close(mlp(f32(x)), wanted, atol=1e-4)
    fused = part(MLP(DECODER, LayerSpec(activation=activation), rngs=nnx.Rngs(0), fused=True), fused_mlp(params))
    close(fused(f32(x)), wanted, atol=1e-4)


def fused_mlp(params):
    return {"gate_up": jnp.stack([params["gate"], params["up"]], 1), "down": params["down"]}


def test_value_head_starts_at_zero_and_is_float32():
    head = ValueHead(DECODER)
    x = f32(normal(B, T, D)).astype(jnp.bfloat16)
    assert not head(x).any()
    kernel = normal(D, 1)
    out = part(head, {"kernel": f32(kernel)})(x)
    assert out.dtype == jnp.float32 and out.shape == (B, T)
    close(out, np.asarray(x, np.float64) @ kernel[:, 0], atol=1e-5)


def reference_block(params, spec, x, cos, sin, mask):
    """One layer in plain NumPy: every query head reads key/value head h // (H / G)."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + DECODER.norm_eps) * scale

    def rotate(x):
        first, second = x[..., : K // 2], x[..., K // 2 :]
        c, s = cos[:, :, None], sin[:, :, None]
        return np.concatenate([first * c - second * s, second * c + first * s], -1)

    normed = norm(x, p["attention_norm"]["scale"])
    q, k = (rotate(np.einsum("btd,dhk->bthk", normed, p["attention"][name])) for name in ("q", "k"))
    v = np.einsum("btd,dhk->bthk", normed, p["attention"]["v"])
    for h in range(H):
        logits = np.einsum("btk,bsk->bts", q[:, :, h], k[:, :, h // (H // G)])
        logits = logits / np.sqrt(K) if spec.scale is None else logits * spec.scale
        logits = logits if spec.soft_cap is None else spec.soft_cap * np.tanh(logits / spec.soft_cap)
        weights = softmax(np.where(mask[:, 0], logits, -1e300))
        x = x + weights @ v[:, :, h // (H // G)] @ p["attention"]["o"][h]
    normed = norm(x, p["mlp_norm"]["scale"])
    gate = ACTIVATIONS[spec.activation](normed @ p["mlp"]["gate"])
    return x + (gate * (normed @ p["mlp"]["up"])) @ p["mlp"]["down"], k, v


@pytest.fixture(scope="module")
def layer_case():
    x = normal(B, T, D)
    cos, sin = rope.rope_tables(SPEC, K, jnp.asarray([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 2, 3, 4]]))
    visible = np.tril(np.ones((T, T), bool))[None].repeat(B, 0)
    visible[1, 4:, 2:4] = False
    return layer_params(), x, np.asarray(cos, np.float64), np.asarray(sin, np.float64), visible[:, None]


def masked(mask, spec):
    """One softmax over the row, capped where the spec says so."""
    if spec.soft_cap is None:
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask), scale=spec.scale)
    return partial(attention._capped, mask=jnp.asarray(mask), scale=spec.scale, soft_cap=spec.soft_cap)


@pytest.mark.parametrize("spec", [SPEC, GEMMA])
def test_block_equals_numpy(layer_case, spec):
    params, x, cos, sin, mask = layer_case
    out, (key, value) = block(params, spec).full(f32(x), f32(cos), f32(sin), masked(mask, spec))
    wanted, wanted_key, wanted_value = reference_block(params, spec, x, cos, sin, mask)
    close(out, wanted, atol=1e-4)
    close(key, wanted_key, atol=1e-5)
    close(value, wanted_value, atol=1e-5)


@pytest.mark.parametrize(("spec", "edges"), [(SPEC, [5]), (GEMMA, [5]), (GEMMA, [2, 5])])
def test_cached_layer_equals_the_full_one(layer_case, spec, edges):
    """Token by token, three of them stored and the others recent, with garbage in the slots still to be written.

    The stored ones lie in one part, or in two.
    """
    params, x, cos, sin, mask = layer_case
    wanted, wanted_key, wanted_value = (f32(y) for y in reference_block(params, spec, x, cos, sin, mask))
    fill = lambda size, seed: f32(50 * normal(B, G, size, K, seed=seed))  # noqa: E731
    stored = tuple(
        fill(5, seed).at[:, :, :3].set(cache[:, :3].swapaxes(1, 2))
        for seed, cache in ((3, wanted_key), (4, wanted_value))
    )
    stored = tuple(tuple(x[:, :, a:b] for x in stored) for a, b in itertools.pairwise([0, *edges]))
    recent = (fill(6, 5), fill(6, 6))
    step = jax.jit(lambda *args: block(params, spec).cached(*args))
    for t in range(3, T):
        seen = mask[:, 0, t]
        visible = np.concatenate([np.pad(seen[:, :3], ((0, 0), (0, 2))), np.pad(seen[:, 3:], ((0, 0), (0, 2)))], 1)
        row = slice(t, t + 1)
        out, recent = step(
            f32(x)[:, row], f32(cos)[:, row], f32(sin)[:, row], stored, recent, jnp.asarray(visible), jnp.asarray(t - 3)
        )
        close(out[:, 0], wanted[:, t], atol=1e-4)
    close(recent[0][:, :, : T - 3], wanted_key[:, 3:].swapaxes(1, 2), atol=1e-5)


def test_grouped_queries_equal_repeated_heads():
    """G key/value heads give what H do when each is repeated H / G times, in order."""
    many = dataclasses.replace(DECODER, num_kv_heads=H)
    params = random_params(DECODER)
    kernels = params["layers"]["attention"]
    repeated = {name: jnp.repeat(kernels[name], H // G, axis=2) for name in ("k", "v")}
    wide = {**params, "layers": {**params["layers"], "attention": {**kernels, **repeated}}}
    tokens = join(batch([4], [[3]]))
    few_logits = logits(forward.Model(DECODER), params, tokens)
    close(logits(forward.Model(many), wide, tokens), few_logits, atol=1e-5)


@pytest.mark.parametrize("name", the_rest_thorough(["mistral", "qwen2_score", "qwen3"]))
def test_decoding_with_a_cache_equals_the_full_forward(name):
    """Token by token behind prompts of several lengths, with garbage in the slots still to be written."""
    config, params = load_folder(RECORDED / name)
    check_cached_decoding(forward.Model(config), params, batch([4, 9, 1], [[8], [8], [8]], width=(9, 8)))


@pytest.mark.parametrize("window", [1, 3, 5])
def test_window_is_counted_by_position(window):
    """Changing a token moves exactly the answers at most window - 1 positions later, through one layer."""
    config = with_layers(DECODER, LayerSpec(window=window), num_layers=1)
    model, params = forward.Model(config), random_params(config)
    joined = batch([6], [[5, 5]], width=(9, 5))  # a gap of padding between the prompt and its two responses
    tokens = join(joined)
    position, branch = np.asarray(tokens.position)[0], np.asarray(tokens.branch)[0]
    hidden = jax.jit(forward.hidden_states, static_argnums=0)
    before = hidden(model, params, tokens)
    for changed in (2, 5, 10):
        other = dataclasses.replace(tokens, ids=tokens.ids.at[0, changed].add(1))
        moved = np.abs(np.asarray(hidden(model, params, other) - before)[0]).max(-1) > 1e-6
        distance = position - position[changed]
        seen = (branch[changed] == 0) | (branch == branch[changed])
        reached = seen & (distance >= 0) & (distance < window)
        real = np.asarray(tokens.segment)[0] > 0
        np.testing.assert_array_equal(moved[real], reached[real])


def test_stretched_frequencies():
    """By hand: turns within the pre-trained length decide; the ends stay or are divided, the middle blends."""
    plain = np.array([1.0, 0.1, 0.01, 0.001])
    close(rope.rope_frequencies(LayerSpec(rope_theta=1e4), 8), plain)
    linear = LayerSpec(rope_theta=1e4, rope_scaling=RopeScaling("linear", 4.0))
    close(rope.rope_frequencies(linear, 8), plain / 4)
    # 200 / wavelength: 31.8, 3.18, 0.318, 0.0318
    llama3 = LayerSpec(rope_theta=1e4, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 200))
    kept = (20 / (2 * np.pi) - 1) / 3
    close(rope.rope_frequencies(llama3, 8), [1.0, 0.1 * (kept + (1 - kept) / 8), 0.01 / 8, 0.001 / 8])


def test_frequencies_stretched_by_yarn():
    """By hand: 8 turns within 4096 positions at index 1.911, 1 turn at 2.814, by which the blend begins and ends.

    4096 / (2 pi 10^index) turns, for 8 components of base 10000.
    """
    plain = np.array([1.0, 0.1, 0.01, 0.001])
    yarn = RopeScaling("yarn", 4.0, 1.0, 8.0, 4096, attention_factor=1.2)
    # from index 1 to 3: the one at 2 is kept by half
    whole = [1.0, 0.1, 0.01 * (0.5 + 0.5 / 4), 0.001 / 4]
    close(rope.rope_frequencies(LayerSpec(rope_scaling=yarn), 8), whole)
    begin, end = (np.log10(4096 / (turns * 2 * np.pi)) for turns in (8, 1))
    assert begin == pytest.approx(1.911, abs=1e-3) and end == pytest.approx(2.814, abs=1e-3)
    kept = 1 - np.clip((np.arange(4) - begin) / (end - begin), 0, 1)
    exact = dataclasses.replace(yarn, truncate=False)
    close(rope.rope_frequencies(LayerSpec(rope_scaling=exact), 8), plain * (kept + (1 - kept) / 4))
    position = jnp.arange(5)[None]
    cos, sin = rope.rope_tables(LayerSpec(rope_scaling=yarn), 8, position)
    close(jnp.square(cos) + jnp.square(sin), np.full(cos.shape, 1.44))


def test_dynamic_scaling_leaves_the_models_positions_alone():
    dynamic = LayerSpec(rope_scaling=RopeScaling("dynamic", 8.0))
    np.testing.assert_array_equal(rope.rope_frequencies(dynamic, 8), rope.rope_frequencies(LayerSpec(), 8))


def test_a_part_of_each_head_is_rotated():
    """The first quarter as a head of its own; the rest stays to the bit."""
    spec, x, position = LayerSpec(rope_fraction=0.25, rope_theta=500.0), f32(normal(B, T, 3, 16)), jnp.arange(T)[None]
    tables = rope.rope_tables(spec, 16, position)
    assert tables[0].shape == (1, T, 2)
    out = rope.rotate(x, *tables)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    whole = rope.rope_tables(LayerSpec(rope_theta=500.0), 4, position)
    np.testing.assert_array_equal(out[..., :4], rope.rotate(x[..., :4], *whole))


def test_norm_with_an_offset():
    x, scale = f32(normal(B, T, D)), f32(normal(D, seed=1))
    offset = part(RMSNorm(D, 1e-3, offset=True), {"scale": scale - 1})
    close(offset(x), part(RMSNorm(D, 1e-3), {"scale": scale})(x))
    assert not RMSNorm(D, 1e-3, offset=True).scale[...].any(), "it begins as a norm without a scale"


def test_layer_norm():
    x, scale, bias = 3 + normal(B, T, D), normal(D, seed=1), normal(D, seed=2)
    norm = part(LayerNorm(D, 1e-3), {"scale": f32(scale), "bias": f32(bias)})
    centred = x - x.mean(-1, keepdims=True)
    close(norm(f32(x)), centred / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * scale + bias, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "names"),
    [({"mlp_bias": True}, "mlp_bias=True needs gated=False"), ({"qk_norm_joint": True}, "needs qk_norm=True")],
)
def test_impossible_layers(options, names):
    with pytest.raises(ValueError, match=names):
        LayerSpec(**options)


def test_biases_and_norms_of_queries_and_keys():
    """In NumPy: bias first, then the norm of each head, then the rotation; values have the bias alone."""
    spec = LayerSpec(qkv_bias=True, qk_norm=True)
    config = with_layers(DECODER, spec)
    params = jax.tree.map(lambda x: x[0], random_params(config)["layers"]["attention"])
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    module = part(decoder.Attention(config, spec, rngs=nnx.Rngs(0)), params)
    x, position = normal(B, T, D), np.arange(T)[None].repeat(B, 0)
    cos, sin = rope.rope_tables(spec, K, jnp.asarray(position))
    q, k, v = module.project(f32(x), cos, sin)

    def reference(name, heads):
        y = np.einsum("btd,dhk->bthk", x, p[name]) + p[f"{name}_bias"]
        if name == "v":
            return y
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + config.norm_eps) * p[f"{name}_norm"]["scale"]
        return np.asarray(rope.rotate(f32(y), cos, sin))

    for name, ours in zip("qkv", (q, k, v), strict=True):
        close(ours, reference(name, ours.shape[2]), atol=1e-4)


PLAIN = LayerSpec(qkv_bias=True, qk_norm=True, norm_places="around")
NEOX = LayerSpec(qkv_bias=True, output_bias=True, gated=False, mlp_bias=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["lm", "value"])
def test_every_parameter_has_axes(tied, head):
    """And every entry of the table is a parameter of some model."""
    found = {"score.kernel"}
    for config in (
        with_layers(DECODER, PLAIN, tie_embeddings=tied),
        with_layers(DECODER, NEOX, norm="layer", tie_embeddings=tied),
    ):
        params = forward.abstract_params(config, head=head)
        flat: dict[str, Any] = flatten_dict(params, sep=".")
        assert all(leaf.dtype == jnp.float32 for leaf in flat.values())
        assert ("head" in flat) == (not tied and head == "lm")
        assert ("score.kernel" in flat) == (head == "value")
        adapted = dataclasses.replace(Model(config), adapter=Adapter.of(AdapterConfig(), config))
        trained = forward.abstract_split(adapted, head=head)["trainable"]
        for tree in (params, trained, jax.eval_shape(quantised.quantised, params)):
            leaves: dict[str, Any] = flatten_dict(tree, sep=".")
            for path, leaf in leaves.items():
                assert len(PARAM_AXES[path]) == leaf.ndim, path
            found |= leaves.keys()
    if not tied and head == "lm":
        assert found == PARAM_AXES.keys()


def test_initial_parameters():
    """Standard deviations as stated, norms at one, and no two layers alike."""
    config = dataclasses.replace(DECODER, num_layers=8, init_std=0.1)
    params = jax.jit(forward.init_params, static_argnums=0)(config, jax.random.key(0))
    flat: dict[Any, Any] = flatten_dict(jax.device_get(params), sep=".")
    for name, leaf in flat.items():
        if name.endswith("scale"):
            assert (leaf == 1).all()
            continue
        std = 0.1 / 4 if name.endswith((".o", ".down")) else 0.1
        assert leaf.std() == pytest.approx(std, rel=0.1) and abs(leaf.mean()) < std / 10, name
        if name.startswith("layers."):
            assert len(np.unique(leaf.reshape(8, -1)[:, 0])) == 8, name
    assert not np.array_equal(flat["layers.attention.k"], flat["layers.attention.v"])
