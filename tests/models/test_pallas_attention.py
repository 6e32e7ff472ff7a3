"""mpo_jax.models.pallas_attention: the kernels, interpreted on the CPU, against one softmax over the row in float64."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_jax.config.schema import MeshConfig
from mpo_jax.data.packing import Packing, pack
from mpo_jax.data.tokens import Example
from mpo_jax.errors import UserError
from mpo_jax.models import attention, forward, pallas_attention
from mpo_jax.models.forward import Model
from mpo_jax.models.spec import LayerSpec
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.types import Tokens, frozen
from tests.models.tiny import DECODER, batch, close, random_params

pytestmark = pytest.mark.thorough

WIDTH = 16


def packed(packing: Packing, lengths: list[tuple[int, int, int]]) -> Tokens:
    """One micro-batch that holds examples of these lengths."""
    found = pack([Example([1] * p, [[2] * a, [3] * b]) for p, a, b in lengths], packing, num_responses=2)
    assert found.count == 1
    return found.rows(jnp.asarray(0)).tokens


def shifted(tokens: Tokens, columns: int) -> Tokens:
    """The rows with padding on their left."""
    wide = lambda x: jnp.pad(x, ((0, 0), (columns, 0)))  # noqa: E731
    return jax.tree.map(wide, tokens)


LAYOUTS = {
    "several examples a block": packed(Packing(2, 61), [(5, 3, 4), (4, 2, 2), (9, 9, 9), (1, 7, 1), (3, 3, 3)]),
    "an example over all blocks": packed(Packing(2, 64), [(30, 20, 14), (21, 1, 30)]),
    "padding left, right and alone": shifted(packed(Packing(3, 50), [(10, 20, 5), (30, 9, 8)]), 18),
    "shared prompt": forward.join(batch([19, 3], [[20, 9, 33], [33, 0, 1]], width=(19, 33))),
}


class Wanted(NamedTuple):
    """What queries read, and the gradients of its weighted sum to queries, keys and values."""

    out: np.ndarray
    d_q: np.ndarray
    d_k: np.ndarray
    d_v: np.ndarray


def reference(q, k, v, weight, tokens: Tokens, spec: LayerSpec) -> Wanted:
    """One softmax over the row and its derivative by hand, in float64; queries that see nothing read 0."""
    q, k, v, weight = (np.asarray(x, np.float64) for x in (q, k, v, weight))
    scale, R = spec.scale or q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    keys, values = k.repeat(R, 2), v.repeat(R, 2)
    logits = np.einsum("bthk,bshk->bhts", q, keys) * scale
    bend = 1.0
    if spec.soft_cap is not None:
        logits = spec.soft_cap * np.tanh(logits / spec.soft_cap)
        bend = 1 - (logits / spec.soft_cap) ** 2
    seen = np.asarray(attention.sees(tokens, tokens, spec.window))[:, None]
    highest = np.where(seen, logits, -1e9).max(-1, keepdims=True)
    p = np.where(seen, np.exp(np.minimum(logits - highest, 0)), 0)
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    d_p = np.einsum("bthk,bshk->bhts", weight, values)
    d_logits = p * (d_p - (p * d_p).sum(-1, keepdims=True)) * bend * scale
    grouped = lambda x: x.reshape(*x.shape[:2], -1, R, x.shape[-1]).sum(3)  # noqa: E731
    return Wanted(
        np.einsum("bhts,bshk->bthk", p, values),
        np.einsum("bhts,bshk->bthk", d_logits, keys),
        grouped(np.einsum("bhts,bthk->bshk", d_logits, q)),
        grouped(np.einsum("bhts,bthk->bshk", p, weight)),
    )


def draw(tokens: Tokens, heads: int, groups: int, K: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Queries, keys, values, and weights of what is read."""
    B, T = tokens.ids.shape
    return [
        jax.random.normal(jax.random.key(seed), (B, T, n, K), dtype)
        for seed, n in enumerate((heads, groups, groups, heads))
    ]


def attend(tokens: Tokens, spec: LayerSpec, width: int = WIDTH) -> Any:
    plan = lambda K: (spec.window, attention.logit_scale(spec.scale, K), spec.soft_cap)  # noqa: E731
    return pallas_attention.make_attend(tokens, plan, width=width)


@partial(jax.jit, static_argnums=(0, 1))
def run(spec: LayerSpec, width: int, tokens: Tokens, q, k, v, weight) -> Wanted:
    def total(q, k, v):
        out = attend(tokens, spec, width)(q, k, v)
        return (out.astype(jnp.float32) * weight).sum(), out

    (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return Wanted(out, *grads)


CASES: dict[str, tuple[str, LayerSpec, tuple[int, int, int], int]] = {
    "grouped heads": ("several examples a block", LayerSpec(), (4, 2, 64), WIDTH),
    "one kv head": ("shared prompt", LayerSpec(), (4, 1, 80), WIDTH),
    "a head each": ("an example over all blocks", LayerSpec(), (2, 2, 96), WIDTH),
    "window": ("an example over all blocks", LayerSpec(window=7, scale=0.2), (4, 2, 128), 8),
    "window, shared prompt": ("shared prompt", LayerSpec(window=11), (2, 1, 64), 8),
    "soft cap": ("several examples a block", LayerSpec(soft_cap=1.5), (2, 1, 256), WIDTH),
    "soft cap, window, padding": ("padding left, right and alone", LayerSpec(window=9, soft_cap=1.5), (4, 2, 80), 8),
    "a block a row": ("shared prompt", LayerSpec(), (2, 1, 64), 128),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_softmax_over_the_row(name):
    layout, spec, sizes, width = CASES[name]
    tokens = LAYOUTS[layout]
    inputs = draw(tokens, *sizes)
    found, wanted = run(spec, width, tokens, *inputs), reference(*inputs, tokens, spec)
    jax.tree.map(partial(close, rtol=1e-5, atol=1e-5), found, wanted)


def test_bfloat16_keeps_its_type_and_sums_in_float32():
    tokens, spec = LAYOUTS["several examples a block"], LayerSpec()
    inputs = draw(tokens, 4, 2, 64, jnp.bfloat16)
    found, wanted = run(spec, WIDTH, tokens, *inputs), reference(*inputs, tokens, spec)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    for x, y in zip(found, wanted, strict=True):
        assert np.abs(np.asarray(x, np.float32) - y).max() < 2e-2 * np.abs(y).max()


@partial(jax.jit, static_argnums=(1, 2))
def pairs_of(tokens: Tokens, width: int, window: int | None) -> jax.Array:
    return pallas_attention.block_pairs(pallas_attention.runs_of(tokens), tokens.position, width, window)


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4),
    st.sampled_from([4, 16]),
    st.sampled_from([None, 9]),
    st.sampled_from([0, 5]),
)
def test_pairs_of_blocks_are_those_with_a_seen_key(lengths, width, window, left):
    """By the whole mask; under a window a pair may be listed in vain, and none is left out."""
    tokens = jax.tree.map(lambda x: np.pad(x, ((0, 0), (left, 288 - 280 - left))), packed(Packing(1, 280), lengths))
    seen = np.asarray(attention.sees(tokens, tokens, window)).reshape(288 // width, width, -1, width).any((1, 3))
    pairs = np.asarray(pairs_of(tokens, width, window))[0]
    assert not (seen & ~pairs).any()
    if window is None:
        assert (seen == pairs).all()


def test_lists_of_blocks_by_hand():
    """Blocks of 16 columns: a prompt of 19, then responses of 33 columns, of which 9 and 33 are real."""
    tokens = forward.join(batch([19], [[9, 33]], width=(19, 33)))
    layout = jax.jit(pallas_attention.layout_of, static_argnums=(1, 2))(tokens, 16, None)
    listed = lambda rows: [row[1 : 1 + row[0]].tolist() for row in np.asarray(rows)[0]]  # noqa: E731
    # block 1 holds the prompt's end and the first response; the second one begins at 52, in block 3
    assert listed(layout.keys) == [[0], [0, 1], [], [0, 1, 3], [0, 1, 3, 4], [0, 1, 3, 4, 5]]
    assert listed(layout.queries) == [[0, 1, 3, 4, 5], [1, 3, 4, 5], [], [3, 4, 5], [4, 5], [5]]


def test_blocks_that_are_not_listed_are_not_read():
    """Not a number where nobody of the second segment may look: in keys and values of the first, and in its queries."""
    ones = jnp.ones((1, 64), jnp.int32)
    segment = jnp.asarray([[1] * 32 + [2] * 32])
    tokens = Tokens(ones, jnp.arange(64)[None] % 32, segment, 0 * ones, ones > 0, packed=True)
    inputs = draw(tokens, 2, 1, 64)
    poisoned = [x.at[:, :32].set(jnp.nan) for x in inputs]
    found, clean = (run(LayerSpec(), WIDTH, tokens, *x) for x in (poisoned, inputs))
    for x, y in zip(found, clean, strict=True):
        assert np.isnan(x[:, :32]).all() and (x[:, 32:] == y[:, 32:]).all()


def test_a_checkpointed_layer_does_not_attend_again():
    """Output and log-sum are saved by name: one kernel forward and two backward, none between."""
    tokens = LAYOUTS["several examples a block"]
    *qkv, weight = draw(tokens, 2, 1, 64)

    def count(policy: Any) -> int:
        saving = jax.checkpoint(attend(tokens, LayerSpec()), policy=policy)
        gradient = jax.grad(lambda *x: (saving(*x) ** 2 * weight).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(*qkv).as_text().count("stablehlo.exponential")

    # two in the forward kernel, one in each of the others
    assert count(jax.checkpoint_policies.save_only_these_names(attention.SAVED)) == 4
    assert count(jax.checkpoint_policies.nothing_saveable) == 6


@pytest.mark.parametrize(("tensor", "kv_heads"), [(2, 4), (4, 2)])
def test_a_model_on_a_mesh_equals_blocked_attention_on_one_device(tensor, kv_heads):
    """Log-probabilities and gradients of packed rows; the second mesh has more devices along `tensor` than kv heads."""
    config = MeshConfig(data=1, fsdp=8 // tensor, tensor=tensor)
    layer = LayerSpec(window=9, soft_cap=4.0)
    decoder = dataclasses.replace(DECODER, num_kv_heads=kv_heads, pattern=(layer,), num_layers=1)
    params = random_params(decoder)
    tokens = packed(Packing(4, 40), [(5, 3, 4), (4, 2, 2), (9, 9, 9), (1, 7, 1), (3, 3, 3), (20, 10, 5)])

    def total(model, params, tokens):
        return (forward.token_logp(model, params, tokens)[0]).sum()

    blocked, pallas = (Model(decoder, remat="dots", attention=name) for name in ("blocked", "pallas"))
    wanted = jax.jit(jax.value_and_grad(partial(total, blocked)))(params, tokens)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, forward.param_shardings(params, mesh))
        found = jax.jit(jax.value_and_grad(partial(total, pallas)))(placed, tokens)
    jax.tree.map(partial(close, rtol=2e-4, atol=2e-5), found, wanted)


@pytest.mark.parametrize(
    ("mesh", "grid"),
    [
        (MeshConfig(data=2, fsdp=1, tensor=2), "(1, 2, 1)"),
        (MeshConfig(data=4, fsdp=1, tensor=2), "(2, 2, 1)"),
        (MeshConfig(data=2, fsdp=1, tensor=4), "(1, 1, 1)"),
        (MeshConfig(data=1, fsdp=1, tensor=8), "(2, 4, 1)"),
    ],
)
def test_devices_divide_rows_and_heads(mesh, grid):
    """Two rows of four heads; where an axis does not divide them, every device has them all."""
    tokens = LAYOUTS["shared prompt"]
    q, k, v, _ = draw(tokens, 4, 2, 64)
    with jax.set_mesh(make_mesh(mesh)):
        assert f"grid={grid}" in str(jax.make_jaxpr(attend(tokens, LayerSpec(), 128))(q, k, v))


def test_scores_of_rows_under_vmap_are_those_of_the_batch():
    """The scoring pass maps over rows; its kernel has the whole batch."""
    decoder = dataclasses.replace(DECODER, num_layers=1)
    model, params = Model(decoder, attention="pallas"), random_params(decoder, head="value")
    joined = batch([19, 3, 7, 5], [[20, 9], [30, 0], [4, 4], [1, 2]], width=(19, 30))
    with jax.set_mesh(mesh := make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        found = forward.make_score_pairs(model, mesh)(frozen(params), joined)
    blocked = dataclasses.replace(model, attention="blocked")
    wanted = forward.response_scores(forward.scores(blocked, params, forward.join(joined)), joined)
    close(found, wanted, rtol=1e-4, atol=1e-5)


def test_rows_beyond_a_tpus_memory_are_refused_by_key():
    wide = jax.ShapeDtypeStruct((1, 16384, 8, 128), jnp.bfloat16)
    message = r"model\.attention=pallas .* rows of 16384 tokens .* model\.attention=auto or blocked"
    with pytest.raises(UserError, match=message):
        pallas_attention.check_fits("tpu", 16384, wide)
    pallas_attention.check_fits("cuda", 16384, wide)
    pallas_attention.check_fits("tpu", 8192, wide)


@pytest.mark.parametrize(("T", "runs"), [(8192, "pallas"), (16384, "blocked")])
def test_auto_takes_blocked_attention_for_rows_beyond_a_tpus_memory(monkeypatch, T, runs):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "make_attend", lambda *_, **__: lambda q, k, v: "blocked")
    monkeypatch.setattr(pallas_attention, "make_attend", lambda *_, **__: lambda q, k, v: "pallas")
    row = jnp.ones((1, T), jnp.int32)
    q = jax.ShapeDtypeStruct((1, T, 8, 128), jnp.bfloat16)
    attend = attention.for_layer(Tokens(row, row, row, row, row > 0), LayerSpec(), "pallas_or_blocked")
    assert attend(q, q, q) == runs


def test_auto_s_choice_gives_the_kernels_numbers_where_rows_fit():
    tokens = LAYOUTS["shared prompt"]
    q, k, v, _ = draw(tokens, 4, 2, 64)
    for implementation in ("pallas", "pallas_or_blocked"):
        found = attention.for_layer(tokens, LayerSpec(), implementation)(q, k, v)
        close(found, attention.for_layer(tokens, LayerSpec(), "pallas")(q, k, v))
