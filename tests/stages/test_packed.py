"""mpo_jax.stages.packed: the shape of a stage's packed rows."""

import numpy as np
import pytest

from mpo_jax.config.schema import DpoConfig
from mpo_jax.data.batches import Buckets, TrainBatches, Widths
from mpo_jax.data.packing import pack
from mpo_jax.data.tokens import Example
from mpo_jax.models.flops import Rows
from mpo_jax.stages.packed import packing_in_order, packing_of, packing_of_samples, planned_packing
from mpo_jax.stages.settings import TrainSettings
from tests.models.tiny import mesh_of

DRAW = np.random.default_rng(0)
EXAMPLES = [Example(range(DRAW.integers(1, 200)), [range(DRAW.integers(1, 90)) for _ in range(2)]) for _ in range(100)]


def training(**given) -> TrainSettings:
    return TrainSettings.of(DpoConfig().train.model_copy(update={"batch_size": 32, **given}))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_no_device_holds_more_than_a_padded_micro_batch_or_than_is_planned(shape, accumulation):
    mesh, train = mesh_of(*shape), training(accumulation=accumulation)
    groups = shape[0] * shape[1]
    batches = TrainBatches(EXAMPLES, Buckets.of(EXAMPLES, 4), 32, seed=0)
    planned = planned_packing(Rows(32, 256, 2, 96), train, mesh)
    assert planned.columns == 256 + 2 * 96 and planned.rows % groups == 0
    widest = Widths.of(EXAMPLES)
    for packing in (packing_of(batches, train, mesh), packing_in_order(EXAMPLES, train, mesh)):
        assert packing is not None and packing.rows % groups == 0
        assert packing.columns >= max(len(e.prompt) + sum(map(len, e.responses)) for e in EXAMPLES)
        tokens = packing.rows * packing.columns
        assert tokens <= 32 // accumulation * (widest.prompt + 2 * widest.response)
        assert tokens <= planned.rows * planned.columns


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_samples_fit_however_long_they_get(shape, accumulation):
    """A shape for prompts with samples of any length up to the width, and no larger than is planned."""
    mesh, train = mesh_of(*shape), training(accumulation=accumulation)
    prompts = [Example(example.prompt, ()) for example in EXAMPLES]
    packing = packing_of_samples(TrainBatches(prompts, Buckets.of(prompts, 4), 32, seed=0), 96, train, mesh)
    longest = max(len(example.prompt) for example in prompts)
    assert packing.columns >= longest + 96 and packing.rows % (shape[0] * shape[1]) == 0
    planned = planned_packing(Rows(32, -(-longest // 8) * 8, 1, 96), train, mesh)
    assert packing.rows * packing.columns <= planned.rows * planned.columns
    full = pack([Example(example.prompt, [range(96)]) for example in prompts[:32]], packing, num_responses=1, size=32)
    assert (full.response_len == 96).all() and full.micro.min() == 0


def test_rows_of_one_length_are_all_filled():
    """What an untrained policy draws that never ends a sample: no row has room that two do not share."""
    prompts = [Example(range(128), ())] * 64
    packing = packing_of_samples(
        TrainBatches(prompts, Buckets.of(prompts, 1), 32, seed=0), 128, training(), mesh_of(1, 1, 1)
    )
    assert packing.columns % 256 == 0
    assert (
        packing.holding(packing.columns) == packing and packing.holding(packing.columns + 1).columns > packing.columns
    )


def test_without_examples_there_is_no_shape():
    assert packing_in_order([], training(), mesh_of(1, 1, 1)) is None
