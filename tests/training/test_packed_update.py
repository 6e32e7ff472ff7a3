"""An update on packed rows is the update on padded ones: loss, metrics and gradient, on one device and on meshes."""

from functools import cache, partial
from typing import Any

import jax
import numpy as np
import optax
import pytest

from mpo_jax.config.schema import OptimConfig
from mpo_jax.data.batches import Widths, collate
from mpo_jax.data.packing import Packing, pack
from mpo_jax.data.tokens import Example
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.stages import dpo, reward, sft
from mpo_jax.stages.dpo import DpoBatch
from mpo_jax.stages.preference import PreferenceLoss
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state, jit_update, state_sharding
from mpo_jax.types import Mean, trainable
from tests.models.tiny import DECODER, FAST, mesh_of, random_params, trees_close

pytestmark = pytest.mark.unoptimised

MODEL = Model(DECODER, logit_chunk=16)
"""A chunk of logits is shorter than the rows, so that some are left out."""
LENGTHS = [(4, 9, 1), (3, 2, 2), (6, 1, 9), (5, 5, 4), (2, 8, 3), (6, 3, 8), (4, 6, 6), (1, 1, 1)]
LOSS = PreferenceLoss(name="dpo", beta=0.1)
REF = np.random.default_rng(0).normal(-10, 3, (8, 2)).astype(np.float32)


def examples(num_responses: int, *, seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    ids = lambda n: draw.integers(0, DECODER.vocab_size, n, np.int32)  # noqa: E731
    return [Example(ids(p), [ids(n) for n in both[:num_responses]]) for p, *both in LENGTHS]


OBJECTIVES: dict[str, tuple[Any, int, Any]] = {
    "sft": (partial(sft.objective, MODEL), 1, lambda rows: rows),
    "reward": (partial(reward.objective, MODEL, "last_token"), 2, lambda rows: rows),
    "dpo_with_nll": (partial(dpo.objective, MODEL, LOSS, 0.3), 2, lambda rows: DpoBatch(rows, REF)),
}


@cache
def updated(name: str, packing: Packing | None, shape: tuple[int, int, int] = (1, 1, 1), count: int = 8) -> Any:
    """Parameters, first moments (the gradient) and metrics of one update; with fewer rows, the batch is filled up."""
    objective, num_responses, data = OBJECTIVES[name]
    chosen = examples(num_responses)[:count]
    if packing is None:
        rows = collate(chosen, Widths.of(chosen), num_responses=num_responses, size=8)
    else:
        rows = pack(chosen, packing, num_responses=num_responses, size=8)
    head, mesh = "value" if name == "reward" else "lm", mesh_of(*shape)
    optimizer = make_optimizer(OptimConfig(clip_norm=None, beta1=0.0))
    with jax.set_mesh(mesh):
        shapes = forward.abstract_params(DECODER, head=head)
        placed = jax.device_put(random_params(DECODER, head=head), state_sharding(shapes, optimizer, mesh).trainable)
        state = with_learning_rate(init_state(trainable(placed), optimizer, mesh), 0.1)
        step = jit_update(objective, optimizer, shapes, mesh)
        arguments = state, place_batch(data(rows), mesh)
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


@pytest.mark.parametrize("packing", [Packing(1, 24), Packing(2, 40), Packing(4, 128)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_packed_update_equals_the_padded_one(name, packing):
    """Whether a batch takes eight micro-batches or one, and rows one example or all."""
    equal(updated(name, packing)[0], updated(name, None)[0])


@pytest.mark.parametrize("name", ["sft", "dpo_with_nll"])
def test_padding_rows_count_in_neither(name):
    equal(updated(name, Packing(2, 40), count=5)[0], updated(name, None, count=5)[0])


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_packed_update_on_a_mesh_equals_one_devices(name, shape):
    """Rows are divided over the batch axes; micro-batches are not."""
    packing = Packing(max(2, shape[0] * shape[1]), 24)
    equal(updated(name, packing, shape)[0], updated(name, None)[0])


def test_one_program_runs_as_many_micro_batches_as_a_batch_takes():
    """Compiled once; a batch of half the tokens loops half as often, and the share of empty columns says so."""
    (_, metrics), compiled = updated("sft", Packing(1, 24))
    optimizer, mesh = make_optimizer(OptimConfig(clip_norm=None, beta1=0.0)), mesh_of(1, 1, 1)
    few = pack(examples(1)[:3], Packing(1, 24), num_responses=1, size=8)
    with jax.set_mesh(mesh):
        state = with_learning_rate(init_state(trainable(random_params(DECODER)), optimizer, mesh), 0.1)
        _, fewer = compiled(state, place_batch(few, mesh))
    packed = pack(examples(1), Packing(1, 24), num_responses=1)
    assert few.count == 1 + (sum(p + n for p, n, _ in LENGTHS[:3]) > 24) < packed.count < len(packed.ids) == 8
    for one, batch in ((metrics, packed), (fewer, few)):
        real = int((batch.segment > 0).sum())
        assert one["tokens"] == real and one["perf/padding"].count == 24 * batch.count
        assert one["perf/padding"].total == 24 * batch.count - real


def test_the_sums_of_gradients_are_divided_like_parameters():
    """Zeros in a loop's carry would otherwise be whole on every device."""
    _, compiled = updated("sft", Packing(4, 24), (2, 2, 2))
    D, F, L = DECODER.hidden_size, DECODER.intermediate_size, DECODER.num_layers
    (carried,) = {
        line for line in compiled.as_text().splitlines() if " while(" in line and f"f32[{L},{D // 2},{F // 2}]" in line
        and f"f32[{DECODER.vocab_size // 2},{D // 2}]" in line
    }  # fmt: skip
    assert f"f32[{L},{D},{F}]" not in carried and f"f32[{DECODER.vocab_size},{D}]" not in carried
