"""An update on packed rows is the update on padded ones: loss, metrics and gradient, on one device and on meshes."""

import dataclasses
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpo_jax.config.schema import OptimConfig
from mpo_jax.data.batches import Widths, collate
from mpo_jax.data.packing import Packing, pack
from mpo_jax.data.tokens import Example
from mpo_jax.models import forward, packed_attention
from mpo_jax.models.forward import Model
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.stages import dpo, reward, sft
from mpo_jax.stages.dpo import DpoBatch
from mpo_jax.stages.preference import PreferenceLoss
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state, jit_update, make_update, state_sharding
from mpo_jax.types import Head, Mean, TrainState, trainable
from tests.covering import covering, the_rest_thorough
from tests.models.tiny import DECODER, FAST, mesh_of, random_params, trees_close

MODEL = Model(DECODER, logit_chunk=16)
"""A chunk of logits is shorter than the rows, so that some are left out."""
Lengths: TypeAlias = tuple[tuple[int, int, int], ...]
LENGTHS: Lengths = ((4, 9, 1), (3, 2, 2), (6, 1, 9), (5, 5, 4), (2, 8, 3), (6, 3, 8), (4, 6, 6), (1, 1, 1))
LONG: Lengths = (
    (150, 60, 90), (40, 70, 20), (200, 100, 60), (30, 20, 60), (90, 120, 80), (10, 5, 250), (100, 30, 30), (60, 60, 60),
)  # fmt: skip
"""In rows of 640 columns, which are five blocks of attention, they begin and end anywhere in a block."""
LOSS = PreferenceLoss(name="dpo", beta=0.1)
REF = np.random.default_rng(0).normal(-10, 3, (8, 2)).astype(np.float32)


def examples(num_responses: int, lengths: Lengths) -> list[Example]:
    draw = np.random.default_rng(0)
    ids = lambda n: draw.integers(0, DECODER.vocab_size, n, np.int32)  # noqa: E731
    return [Example(ids(p), [ids(n) for n in both[:num_responses]]) for p, *both in lengths]


OBJECTIVES = ("sft", "reward", "dpo_with_nll")


def objective_of(name: str, model: Model = MODEL) -> Any:
    if name == "sft":
        return partial(sft.objective, model)
    return (
        partial(reward.objective, model, "last_token") if name == "reward" else partial(dpo.objective, model, LOSS, 0.3)
    )


def head_of(name: str) -> Head:
    return "value" if name == "reward" else "lm"


def batch_of(name: str, packing: Packing | None, lengths: Lengths = LENGTHS) -> Any:
    """The objective's input of eight rows; with fewer lengths, the batch is filled up."""
    num_responses = 1 if name == "sft" else 2
    chosen = examples(num_responses, lengths)
    if packing is None:
        rows: Any = collate(chosen, Widths.of(chosen), num_responses=num_responses, size=8)
    else:
        rows = pack(chosen, packing, num_responses=num_responses, size=8)
    return DpoBatch(rows, REF) if name == "dpo_with_nll" else rows


@cache
def updated(
    name: str, packing: Packing | None, shape: tuple[int, int, int] = (1, 1, 1), lengths: Lengths = LENGTHS
) -> Any:
    """First moments (the gradient) and metrics of one update, and its program."""
    objective, head, mesh = objective_of(name), head_of(name), mesh_of(*shape)
    optimizer = make_optimizer(OptimConfig(clip_norm=None, beta1=0.0))
    with jax.set_mesh(mesh):
        shapes = forward.abstract_params(DECODER, head=head)
        placed = jax.device_put(random_params(DECODER, head=head), state_sharding(shapes, optimizer, mesh).trainable)
        state = with_learning_rate(init_state(trainable(placed), optimizer, mesh), 0.1)
        step = jit_update(objective, optimizer, shapes, mesh)
        arguments = state, place_batch(batch_of(name, packing, lengths), mesh)
        compiled = step.lower(*arguments).compile(FAST)
        after, metrics = compiled(*arguments)
        assert metrics.pop("skipped").count == 0
        gradient = optax.tree_utils.tree_get(after.opt_state, "mu")
    return jax.device_get((gradient, metrics)), compiled


def equal(actual: Any, expected: Any) -> None:
    (grads, metrics), (wanted_grads, wanted) = actual, expected
    trees_close(grads, wanted_grads, rtol=1e-4, atol=1e-5)
    assert metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        if name == "perf/padding":
            continue
        if isinstance(value, Mean):
            np.testing.assert_allclose(metrics[name].total, value.total, rtol=1e-5, atol=1e-5, err_msg=name)
            assert metrics[name].count == value.count, name
        else:
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("name", "packing"), the_rest_thorough(covering(OBJECTIVES, (Packing(1, 24), Packing(2, 40), Packing(4, 128))))
)
def test_a_packed_update_equals_the_padded_one(name, packing):
    """Whether a batch takes eight micro-batches or one, and rows one example or all."""
    equal(updated(name, packing)[0], updated(name, None)[0])


def test_an_objective_is_traced_once_for_its_gradient_and_once_for_its_counts():
    """Tracing is most of what a second start's first step waits for."""
    traced = []

    def objective(tree, rows):
        traced.append(rows)
        return sft.objective(MODEL, tree, rows)

    optimizer, params = make_optimizer(OptimConfig()), random_params(DECODER)
    state = init_state(trainable(params), optimizer, mesh_of(1, 1, 1))
    jax.jit(make_update(objective, optimizer)).trace(state, batch_of("sft", Packing(2, 40)))
    assert len(traced) == 2


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sft", "dpo_with_nll"])
def test_padding_rows_count_in_neither(name):
    equal(updated(name, Packing(2, 40), lengths=LENGTHS[:5])[0], updated(name, None, lengths=LENGTHS[:5])[0])


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "shape"), covering(OBJECTIVES, ((8, 1, 1), (1, 2, 4), (2, 2, 2))))
def test_a_packed_update_on_a_mesh_equals_one_devices(name, shape):
    """Rows are divided over the batch axes; micro-batches are not."""
    packing = Packing(max(2, shape[0] * shape[1]), 24)
    equal(updated(name, packing, shape)[0], updated(name, None)[0])


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "rows"), covering(OBJECTIVES, (2, 4)))
def test_keys_are_left_out_on_a_mesh_where_no_row_needs_them(name, rows):
    """Which keys attention leaves out is the same for all rows of a micro-batch, which are on several devices.

    By hand: prompts begin at columns 0 and 360 of the first row, 0 and 300 of the second, 0, 130, 240 and 400 of the
    third; the fourth is empty.
    """
    packing, shape = Packing(rows, 640), {2: (1, 2, 4), 4: (2, 2, 2)}[rows]
    packed = batch_of("reward", packing, LONG)
    assert packed.count == 4 // rows, "two micro-batches, and one with four rows"
    tokens = jax.tree.map(jnp.asarray, packed).rows(packed.count - 1).tokens
    each = [packed_attention.layout_of(jax.tree.map(lambda x, r=r: x[r : r + 1], tokens)).first for r in range(rows)]
    first = packed_attention.layout_of(tokens).first
    assert first.tolist() == np.min(each, 0).tolist() == ([0, 0, 1, 1, 3] if rows == 2 else [0, 0, 0, 1, 2])
    assert any(row.tolist() != first.tolist() for row in each)
    equal(updated(name, packing, shape, LONG)[0], updated(name, packing, lengths=LONG)[0])
    equal(updated(name, packing, shape, LONG)[0], updated(name, None, lengths=LONG)[0])


@pytest.fixture
def float64(monkeypatch) -> Iterator[Model]:
    """A model whose arithmetic is float64 everywhere, that of losses, norms and softmax too."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield dataclasses.replace(MODEL, dtype="float64")


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "lengths"), covering(OBJECTIVES, (LENGTHS, LONG)))
def test_what_is_left_between_packed_and_padded_is_rounding(name, lengths, float64):
    """In float64 they differ eight orders of magnitude less than the float32 tests above allow."""
    packing = Packing(2, 40) if lengths is LENGTHS else Packing(2, 640)

    def keep_gradient(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, updates

    optimizer = optax.GradientTransformation(lambda params: params, keep_gradient)
    update = make_update(objective_of(name, float64), optimizer)
    params = random_params(DECODER, head=head_of(name))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float64)}
    state = TrainState(jnp.zeros((), jnp.int32), params, params)
    found = [jax.jit(update)(state, batch_of(name, layout, lengths)) for layout in (packing, None)]
    (packed, metrics), (padded, wanted) = jax.device_get(found)
    trees_close(packed.opt_state, padded.opt_state, rtol=1e-12, atol=1e-13)
    for metric in wanted.keys() - {"perf/padding"}:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), metrics[metric], wanted[metric])


def test_one_program_runs_as_many_micro_batches_as_a_batch_takes():
    """Compiled once; a batch of half the tokens loops half as often, and the share of empty columns says so."""
    (_, metrics), compiled = updated("sft", Packing(1, 24))
    optimizer, mesh = make_optimizer(OptimConfig(clip_norm=None, beta1=0.0)), mesh_of(1, 1, 1)
    few = batch_of("sft", Packing(1, 24), LENGTHS[:3])
    with jax.set_mesh(mesh):
        state = with_learning_rate(init_state(trainable(random_params(DECODER)), optimizer, mesh), 0.1)
        _, fewer = compiled(state, place_batch(few, mesh))
    packed = batch_of("sft", Packing(1, 24))
    assert few.count == 1 + (sum(p + n for p, n, _ in LENGTHS[:3]) > 24) < packed.count < len(packed.ids) == 8
    for one, batch in ((metrics, packed), (fewer, few)):
        real = int((batch.segment > 0).sum())
        assert one["tokens"] == real and one["perf/padding"].count == 24 * batch.count
        assert one["perf/padding"].total == 24 * batch.count - real


@pytest.mark.thorough
def test_the_sums_of_gradients_are_divided_like_parameters():
    """Zeros in a loop's carry would otherwise be whole on every device."""
    _, compiled = updated("sft", Packing(4, 24), (2, 2, 2))
    D, F, L = DECODER.hidden_size, DECODER.intermediate_size, DECODER.num_layers
    (carried,) = {
        line for line in compiled.as_text().splitlines() if " while(" in line and f"f32[{L},{D // 2},{F // 2}]" in line
        and f"f32[{DECODER.vocab_size // 2},{D // 2}]" in line
    }  # fmt: skip
    assert f"f32[{L},{D},{F}]" not in carried and f"f32[{DECODER.vocab_size},{D}]" not in carried
