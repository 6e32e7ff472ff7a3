"""The decode loop as it is compiled: what groups of devices exchange for every token, and what attention reads."""

import dataclasses
import math
import re
from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.data.batches import Buckets, Widths, collate
from mpo_jax.data.tokens import Example
from mpo_jax.models import forward, generate
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Decoder, Sampling, make_generate
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.tools.plan.collectives import KINDS
from mpo_jax.training import refill
from mpo_jax.types import frozen
from tests.covering import EVERY_CASE
from tests.models.tiny import DECODER, FAST, batch, mesh_of, random_params

MODEL, EOS, V = Model(DECODER), 6, 40
ALLOWED = np.arange(V) % 4 != 3
LONG = Sampling(max_new_tokens=300)
"""Of two parts, 160 and 144 slots."""

END = 10
"""An id that the model seldom draws: responses of 2 to 234 tokens."""

CASES = [((2, 2, 2), "finish"), ((8, 1, 1), "finish"), ((1, 8, 1), "advance"), ((1, 2, 4), "advance")]
if EVERY_CASE:
    CASES = [(shape, program) for shape in {shape for shape, _ in CASES} for program in ("finish", "advance")]


def parts(max_new_tokens: int, chunk: int = 16) -> tuple[int, ...]:
    return Decoder(MODEL, Sampling(max_new_tokens), EOS, chunk).parts


def test_a_room_has_one_or_two_parts_of_whole_chunks():
    assert parts(1) == (0,) and parts(2) == (1,) and parts(64) == (64,) and parts(240) == (240,)
    assert parts(257) == (128, 128) and parts(300) == (160, 144) and parts(512) == (256, 256)
    assert parts(1024) == (512, 512) and parts(300, 10) == (150, 150)


# ---- what devices exchange -----------------------------------------------------------------------------------------


@cache
def compiled(shape: tuple[int, int, int], program: str, sampling: Sampling = LONG) -> Any:
    """The compiled `finish` of make_generate, or `advance` of refilled rows."""
    mesh, empty = mesh_of(*shape), np.zeros((8, 1))
    params = random_params(DECODER)
    with jax.set_mesh(mesh):
        placed = frozen(jax.device_put(params, forward.param_shardings(params, mesh)))
        prompts = place_batch(batch([5, 1, 7, 3, 2, 6, 4, 7], empty, width=(7, 0)), mesh)
        weights, key, allowed = generate.make_for_decoding(MODEL)(placed), jax.random.key(0), jnp.asarray(ALLOWED)
        if program == "finish":
            made = make_generate(MODEL, sampling, EOS, mesh)
            state = made.begin(placed, prompts, key, jnp.zeros_like(prompts.key), allowed)
            begun = dataclasses.replace(state, caches=())
            return made.finish.lower(weights, begun, state.caches, prompts, allowed).compile(FAST)
        start, _, advance = refill.programs(MODEL, sampling, EOS, mesh)
        return advance.lower(weights, start(placed, prompts, key, allowed, 16), allowed).compile(FAST)


def in_loops(text: str) -> list[str]:
    """The collectives of all computations that loops run, conditions included."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    called = {
        name: re.findall(r"(?:calls|to_apply|condition|body)=%?([\w.\-]+)", body) for name, body in bodies.items()
    }
    waiting = re.findall(r"(?:condition|body)=%?([\w.\-]+)", text)
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += called[name]
    kinds = "|".join(KINDS)
    return [line for name in found for line in bodies[name].splitlines() if re.search(rf" ({kinds})(-start)?\(", line)]


def groups(line: str) -> list[list[int]]:
    """The replica groups of a collective, as numbers of devices in the mesh's order."""
    if explicit := re.search(r"replica_groups=\{(\{[\d,{} ]+\})\}", line):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", explicit[1])]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert iota is not None, line
    dims = [int(n) for n in iota[3].split(",")]
    order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(dims)))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(int(iota[1]), int(iota[2])).tolist()


@pytest.mark.optimised
@pytest.mark.thorough
@pytest.mark.parametrize(("shape", "program"), CASES)
def test_a_token_is_exchanged_over_tensor_alone(shape, program, monkeypatch):
    """Two sums a layer and one of the embedding, and the logits come together once; nothing for weights or ends.

    Groups that differ along `data` or `fsdp` never wait for each other, so each stops on its own.
    """
    data, fsdp, tensor = shape
    # compiled as for accelerators, and not run
    monkeypatch.setattr(generate, "simulated", lambda _: False)
    found = in_loops(compiled(shape, program).as_text())
    kinds = Counter(re.search(rf" ({'|'.join(KINDS)})", line)[1] for line in found)
    if tensor == 1:
        assert not found
        return
    loops = len(Decoder(MODEL, LONG, EOS).parts)
    assert kinds == {"all-reduce": loops * (2 * DECODER.num_layers + 1), "all-gather": loops}
    rows = (8 if program == "finish" else 16) // (data * fsdp)
    assert all(f" f32[{rows},{V}]" in line for line in found if " all-gather" in line), "only logits are gathered"
    wanted = np.arange(8).reshape(-1, tensor).tolist()
    assert all(sorted(map(sorted, groups(line))) == wanted for line in found)


@pytest.mark.thorough
def test_the_measure_sees_what_groups_exchange():
    """The loop without groups asks all rows for every token whether one goes on."""
    mesh = mesh_of(2, 2, 2)
    decoder = Decoder(MODEL, Sampling(10), EOS)
    params = random_params(DECODER)
    with jax.set_mesh(mesh):
        placed = frozen(jax.device_put(params, forward.param_shardings(params, mesh)))
        prompts = place_batch(batch([5, 1, 7, 3, 2, 6, 4, 7], np.zeros((8, 1)), width=(7, 0)), mesh)
        state = jax.jit(decoder.begin)(placed, prompts, jax.random.key(0), jnp.zeros_like(prompts.key), None)
        weights = generate.make_for_decoding(MODEL)(placed)
        text = jax.jit(decoder.advance).lower(weights, state, None).compile(FAST).as_text()
    assert any(" pred[] all-reduce" in line for line in in_loops(text))


def test_groups_go_on_together_where_heads_do_not_divide(monkeypatch):
    """Two key/value heads on four devices are moved by collective-permutes, which wait for all devices."""
    few = Decoder(Model(dataclasses.replace(DECODER, num_kv_heads=2)), LONG, EOS)
    assert few.by_group(few.advance, mesh_of(2, 2, 2)) == few.advance, "simulated devices share their threads"
    assert few.by_group(few.advance, mesh_of(2, 4, 1)) != few.advance
    monkeypatch.setattr(generate, "simulated", lambda _: False)
    assert few.by_group(few.advance, mesh_of(2, 1, 4)) == few.advance
    assert few.by_group(few.advance, mesh_of(2, 2, 2)) != few.advance
    for alone in ((1, 1, 1), (1, 1, 4)):
        assert few.by_group(few.advance, mesh_of(*alone)) == few.advance, "one group"


# ---- parts of the caches -------------------------------------------------------------------------------------------


@pytest.mark.optimised
@pytest.mark.thorough
def test_no_second_copy_of_the_caches():
    """They are donated and written in place, in parts as in one piece."""
    wide = dataclasses.replace(DECODER, num_kv_heads=8, head_dim=32)
    model, mesh = Model(wide), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        made = make_generate(model, LONG, EOS, mesh)
        prompts = batch(np.full(64, 7), np.zeros((64, 1)), width=(7, 0))
        params, key = frozen(forward.abstract_params(wide)), jax.random.key(0)
        state = jax.eval_shape(made.begin, params, prompts, key, prompts.key, None)
        weights = jax.eval_shape(made.for_decoding, params)
        begun = dataclasses.replace(state, caches=())
        memory = made.finish.lower(weights, begun, state.caches, prompts, None).compile().memory_analysis()
    size = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state.caches))
    assert size == 2 * 2 * 64 * 8 * (7 + 304) * 32 * 4
    assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < size / 4


@pytest.mark.thorough
@pytest.mark.optimised
def test_parts_that_are_not_read_change_no_bit():
    """One token of rows that have stored nothing beyond the first part, with the second part and without."""
    rng, params = np.random.default_rng(0), random_params(DECODER)
    weights, B, widths = forward.for_decoding(MODEL, params), 5, (7, 160, 144)

    def caches(slots):
        draw = lambda: jnp.asarray(rng.normal(size=(B, 4, slots, 6)), jnp.float32)  # noqa: E731
        return tuple((draw(), draw()) for _ in range(2))

    stored, recent = tuple(map(caches, widths)), caches(16)
    prompt_len, count = jnp.asarray([7, 1, 3, 5, 2]), jnp.asarray([160, 0, 16, 80, 160])
    visible = forward.visible_slots(MODEL, prompt_len, (7, 304, 16), count, 5)

    @jax.jit
    def step(stored):
        ids, slot = jnp.arange(B, dtype=jnp.int32), jnp.asarray(5)
        return forward.decode_step(MODEL, weights, ids, prompt_len + count + 5, stored, recent, visible, slot)

    for whole, less in zip(jax.tree.leaves(step(stored)), jax.tree.leaves(step(stored[:2])), strict=True):
        np.testing.assert_array_equal(whole, less)
    assert (np.asarray(step(stored)[0]) != np.asarray(step(stored[:1])[0])).any(), "the first part counts"


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, V, rng.integers(1, 8)).astype(np.int32), []) for _ in range(8)]


def drawn(examples, shape=(1, 1, 1)):
    """Ids and lengths of one batch."""
    mesh, params = mesh_of(*shape), random_params(DECODER)
    rows = collate(examples, Widths.of(examples), num_responses=0)
    with jax.set_mesh(mesh):
        placed = frozen(jax.device_put(params, forward.param_shardings(params, mesh)))
        function = make_generate.__wrapped__(MODEL, LONG, END, mesh)
        index = np.zeros(len(examples), np.uint32)
        joined, _ = function(placed, place_batch(rows, mesh), jax.random.key(0), index, jnp.asarray(ALLOWED))
    return np.asarray(joined.response), np.asarray(joined.response_len)


@pytest.fixture(scope="module")
def reference(examples):
    return drawn(examples)


@pytest.mark.thorough
def test_parts_draw_the_samples_of_one_piece(examples, reference, monkeypatch):
    assert 160 < reference[1].max() < 300 and reference[1].min() < 20, "the case needs both parts, and rows of all ages"
    monkeypatch.setattr(generate, "MAX_PARTS", 1)
    for found, wanted in zip(drawn(examples), reference, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_rows_of_other_ages_do_not_matter(examples, reference, shape):
    """Refilled rows of a group read as many parts as the oldest of them needs."""
    mesh, params = mesh_of(*shape), random_params(DECODER)
    with jax.set_mesh(mesh):
        found = refill.sample_all(
            MODEL, frozen(jax.device_put(params, forward.param_shardings(params, mesh))), examples, sampling=LONG,
            eos_id=END, allowed_V=jnp.asarray(ALLOWED), key=jax.random.key(0), buckets=Buckets.of(examples, 1),
            batch_size=4, mesh=mesh,
        )  # fmt: skip
    np.testing.assert_array_equal(found.ids, reference[0])
    np.testing.assert_array_equal(found.length, reference[1])
