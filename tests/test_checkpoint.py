"""mpo_jax.checkpoint: what is saved comes back bit by bit, where it was, and only into the shapes it came from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mpo_jax.checkpoint import Checkpoints
from mpo_jax.config import MeshConfig, OptimConfig
from mpo_jax.errors import UserError
from mpo_jax.optim import make_optimizer
from mpo_jax.sharding import make_mesh
from mpo_jax.types import TrainState

SPECS = {"kernel": PartitionSpec("fsdp"), "layers": {"norm": PartitionSpec(), "half": PartitionSpec(None, "fsdp")}}


def make_state(seed: int, rows: int = 16, dtype=jnp.bfloat16) -> TrainState:
    """A training state as the stages have: nested parameters, AdamW's moments, a step; sharded over eight devices."""
    rng = np.random.default_rng(seed)
    mesh = make_mesh(MeshConfig(fsdp=8))
    params = {
        "kernel": rng.normal(size=(rows, 3)).astype(np.float32),
        "layers": {"norm": rng.normal(size=(2,)).astype(np.float32), "half": rng.normal(size=(2, 8)).astype(dtype)},
    }
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    params = jax.tree.map(jax.device_put, params, shardings)
    tx = make_optimizer(OptimConfig(weight_decay=0.1))
    _, opt_state = tx.update(params, tx.init(params), params)  # moments that are not 0
    return jax.tree.map(
        lambda x: x if len(x.sharding.device_set) == 8 else jax.device_put(x, NamedSharding(mesh, PartitionSpec())),
        TrainState(jnp.asarray(seed, jnp.int32), params, opt_state),
    )


def check_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, b.ndim)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(folder, states: dict[int, TrainState], keep: int = 1) -> None:
    checkpoints = Checkpoints(folder, keep=keep)
    for step, state in states.items():
        checkpoints.save(step, state)
    checkpoints.close()


def restore(folder, state):
    checkpoints = Checkpoints(folder, keep=1)
    try:
        return checkpoints.restore(state)
    finally:
        checkpoints.close()


def test_without_a_checkpoint_the_state_is_the_given_one(tmp_path):
    state = make_state(1)
    step, found = restore(tmp_path / "checkpoints", state)
    assert step == 0 and found is state


def test_a_state_comes_back_bit_by_bit_and_where_it_was(tmp_path):
    state = make_state(3)
    save(tmp_path, {12: state})
    step, found = restore(tmp_path, make_state(4))
    assert step == 12
    check_same(found, state)
    assert found.params["kernel"].addressable_shards[0].data.shape == (2, 3)


def test_a_state_comes_back_into_another_placement(tmp_path):
    state = make_state(3)
    save(tmp_path, {1: state})
    single = jax.tree.map(lambda x: jax.device_put(jnp.zeros_like(x), jax.devices()[0]), state)
    _, found = restore(tmp_path, single)
    check_same(found, jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), state))


@pytest.mark.parametrize(("keep", "left"), [(1, ["30"]), (2, ["20", "30"])])
def test_the_latest_wins_and_the_oldest_go(tmp_path, keep, left):
    save(tmp_path, {step: make_state(step) for step in (9, 20, 30)}, keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    step, found = restore(tmp_path, make_state(0))
    assert step == 30
    check_same(found, make_state(30))


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    state, expected = make_state(5), make_state(5)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state)
    after = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    jax.block_until_ready(after)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # on the CPU a donated array may live on while something reads it
    checkpoints.close()
    check_same(restore(tmp_path, make_state(0))[1], expected)


def test_a_run_goes_on_saving_after_it_resumed(tmp_path):
    save(tmp_path, {10: make_state(10)})
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.restore(make_state(0))[0] == 10
    checkpoints.save(20, make_state(20))
    checkpoints.close()
    step, found = restore(tmp_path, make_state(0))
    assert step == 20
    check_same(found, make_state(20))


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    """A kill while writing leaves a folder under a temporary name."""
    save(tmp_path, {10: make_state(10)})
    (tmp_path / "20.orbax-checkpoint-tmp").mkdir()
    assert restore(tmp_path, make_state(0))[0] == 10


@pytest.mark.parametrize(
    ("other", "leaf", "there", "here", "count"),
    [
        ({"rows": 24}, r"\.params\['kernel'\]", r"float32\[16, 3\]", r"float32\[24, 3\]", 3),
        ({"dtype": jnp.float32}, r"\.params\['layers'\]\['half'\]", r"bfloat16\[2, 8\]", r"float32\[2, 8\]", 3),
    ],
)
def test_other_shapes_are_refused_by_name(tmp_path, other, leaf, there, here, count):
    save(tmp_path, {7: make_state(1)})
    message = rf"7: the checkpoint does not fit .*: {leaf} is {there} there and {here} here \({count} differ\); delete"
    with pytest.raises(UserError, match=message):
        restore(tmp_path, make_state(1, **other))


def test_another_tree_is_refused_by_name(tmp_path):
    state = make_state(1)
    save(tmp_path, {7: {"a": state.step, "b": state.step}})
    with pytest.raises(UserError, match=r"\['b'\] is int32\[\] there and absent here \(1 differ\)"):
        restore(tmp_path, {"a": state.step})
    with pytest.raises(UserError, match=r"\['c'\] is absent there and int32\[\] here \(1 differ\)"):
        restore(tmp_path, {"a": state.step, "b": state.step, "c": state.step})
