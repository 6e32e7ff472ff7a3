"""mpo_jax.types: means that add, and pytrees that survive jax's transformations."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpo_jax.types import Artifact, Mean, Tokens, TrainState


@given(
    hnp.arrays(np.int16, (9,), elements=st.integers(-1000, 1000)),
    hnp.arrays(np.bool_, (9,)),
    st.lists(st.integers(0, 9), max_size=3).map(sorted),
)
def test_means_of_any_split_add_up_to_the_whole(x, mask, cuts):
    """Whole numbers, so that float32 sums are exact and the split must change no bit."""
    x_B, mask_B = jnp.asarray(x, jnp.float32), jnp.asarray(mask)
    whole = Mean.of(x_B, mask_B)
    edges = [0, *cuts, 9]
    total = Mean(jnp.zeros(()), jnp.zeros(()))
    for start, end in itertools.pairwise(edges):
        total += Mean.of(x_B[start:end], mask_B[start:end])
    assert (total.total, total.count) == (whole.total, whole.count) == (x[mask].sum(), mask.sum())
    assert total.value == np.float32(x[mask].sum()) / np.float32(max(mask.sum(), 1))


def test_mean_of_counts_elements_and_drops_garbage():
    x = jnp.array([[1.0, jnp.nan], [4.0, jnp.inf]])
    kept = Mean.of(x, ~jnp.array([[False, True], [False, True]]))
    assert (kept.total, kept.count, kept.value) == (5.0, 2.0, 2.5)
    everything = Mean.of(jnp.ones((3, 4)))
    assert (everything.total, everything.count, everything.value) == (12.0, 12.0, 1.0)


def test_mean_of_nothing_is_zero():
    assert Mean.of(jnp.ones(3), jnp.zeros(3, bool)).value == 0


def test_mean_sums_in_float32():
    """bfloat16 cannot count past 256."""
    mean = Mean.of(jnp.ones(1000, jnp.bfloat16))
    assert (mean.total, mean.count, mean.total.dtype, mean.count.dtype) == (1000, 1000, jnp.float32, jnp.float32)


def test_mean_does_not_depend_on_the_number_of_devices():
    x_BT, mask_BT = jnp.arange(48.0).reshape(16, 3), jnp.arange(48).reshape(16, 3) % 5 > 0
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    assert sharding.num_devices == 8
    sharded = jax.jit(Mean.of)(*jax.device_put((x_BT, mask_BT), sharding))
    alone = Mean.of(x_BT, mask_BT)
    assert (sharded.total, sharded.count) == (alone.total, alone.count)


def test_mean_is_a_pytree():
    """Accumulation carries means through a scan."""
    x_BT = jnp.arange(12.0).reshape(4, 3)

    def add(carry, x_T):
        return jax.tree.map(jnp.add, carry, {"loss": Mean.of(x_T)}), None

    carry, _ = jax.lax.scan(add, {"loss": Mean(jnp.zeros(()), jnp.zeros(()))}, x_BT)
    assert (carry["loss"].total, carry["loss"].count) == (66.0, 12.0)


def test_tokens_keep_scored_from_static():
    ids = jnp.zeros((2, 4), jnp.int32)
    tokens = Tokens(ids, ids, ids, ids, ids > 0, scored_from=3)
    assert len(jax.tree.leaves(tokens)) == 5
    sliced = jax.jit(lambda t: t.ids[:, t.scored_from :])(tokens)  # a traced start would not compile
    assert sliced.shape == (2, 1)
    assert jax.tree.map(lambda x: x[:1], tokens).scored_from == 3
    other = dataclasses.replace(tokens, scored_from=0)
    assert jax.tree.structure(other) != jax.tree.structure(tokens)


def test_train_state_round_trips_and_is_frozen():
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(2)}, ())
    stepped = jax.jit(lambda s: dataclasses.replace(s, step=s.step + 1))(state)
    assert isinstance(stepped, TrainState)
    assert stepped.step == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = 1


def test_artifact_is_named_by_its_folder():
    artifact = Artifact(Path("runs") / "sft-0a1b2c", {})
    assert (artifact.id, artifact.model) == ("sft-0a1b2c", Path("runs") / "sft-0a1b2c" / "model")
