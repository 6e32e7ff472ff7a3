"""mpo_jax.training.checkpoints: what is saved comes back bit by bit, where it was, and only into its own shapes."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mpo_jax.config.schema import MeshConfig, OptimConfig
from mpo_jax.errors import UserError
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.training.hashes import first_difference, leaf_hashes, sha256_hashes, sha256_of
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.types import TrainState
from tests.covering import the_rest_thorough

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
    # moments that are not 0; in one program: eager reductions over eight devices, many at once, can starve two cores
    _, opt_state = jax.jit(tx.update)(params, tx.init(params), params)
    return jax.tree.map(
        lambda x: x if len(x.sharding.device_set) == 8 else jax.device_put(x, NamedSharding(mesh, PartitionSpec())),
        TrainState(jnp.asarray(seed, jnp.int32), params, opt_state),
    )


def check_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, b.ndim)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(folder, states: dict[int, TrainState], keep: int = 1, recipe: dict | None = None) -> None:
    checkpoints = Checkpoints(folder, keep=keep, recipe=recipe)
    for step, state in states.items():
        checkpoints.save(step, state)
    checkpoints.close()


def restore(folder, state, recipe: dict | None = None):
    checkpoints = Checkpoints(folder, keep=1, recipe=recipe, clean=True)
    try:
        return checkpoints.restore(state)
    finally:
        checkpoints.close()


def test_a_folder_as_seen_from_here(tmp_path, monkeypatch):
    """As a workdir in a configuration usually is."""
    monkeypatch.chdir(tmp_path)
    state = make_state(0)
    save(Path("runs"), {2: state})
    assert (tmp_path / "runs" / "2").is_dir()
    step, found = restore(Path("runs"), make_state(1))
    assert step == 2
    check_same(found, state)


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
    assert found.trainable["kernel"].addressable_shards[0].data.shape == (2, 3)


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
    assert [path.name for path in tmp_path.iterdir()] == ["10"], "what a kill left is cleared away"


@pytest.mark.parametrize(
    ("other", "leaf", "there", "here", "count"),
    [
        ({"rows": 24}, r"\.trainable\['kernel'\]", r"float32\[16, 3\]", r"float32\[24, 3\]", 3),
        ({"dtype": jnp.float32}, r"\.trainable\['layers'\]\['half'\]", r"bfloat16\[2, 8\]", r"float32\[2, 8\]", 3),
    ],
)
def test_other_shapes_are_refused_by_name(tmp_path, other, leaf, there, here, count):
    save(tmp_path, {7: make_state(1)})
    differs = rf"{leaf} is {there} in the checkpoint and {here} now \({count} differ\)"
    message = rf"7: the checkpoint does not fit .*: {differs}; delete"
    with pytest.raises(UserError, match=message):
        restore(tmp_path, make_state(1, **other))


def test_another_tree_is_refused_by_name(tmp_path):
    state = make_state(1)
    save(tmp_path, {7: {"a": state.step, "b": state.step}})
    with pytest.raises(UserError, match=r"\['b'\] is int32\[\] in the checkpoint and absent now \(1 differ\)"):
        restore(tmp_path, {"a": state.step})
    with pytest.raises(UserError, match=r"\['c'\] is absent in the checkpoint and int32\[\] now \(1 differ\)"):
        restore(tmp_path, {"a": state.step, "b": state.step, "c": state.step})


def newest(folder, pattern: str):
    """The only file of checkpoint 20 that matches."""
    (path,) = (folder / "20").glob(pattern)
    return path


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS = {
    "arrays deleted": lambda folder: newest(folder, "state/d/*").unlink(),
    "arrays cut": lambda folder: os.truncate(path := newest(folder, "state/d/*"), path.stat().st_size // 2),
    "a bit turned": lambda folder: flip(newest(folder, "state/d/*")),
    "manifest emptied": lambda folder: os.truncate(newest(folder, "state/manifest.ocdbt"), 0),
    "record cut": lambda folder: os.truncate(newest(folder, "record/metadata"), 9),
    "no record": lambda folder: shutil.rmtree(folder / "20" / "record"),
    "all deleted": lambda folder: [shutil.rmtree(path) for path in (folder / "20").iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("name", the_rest_thorough(HARMS, 2))
def test_a_broken_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, name):
    save(tmp_path, {10: make_state(10), 20: make_state(20)}, keep=2)
    HARMS[name](tmp_path)
    step, found = restore(tmp_path, make_state(0))
    assert step == 10
    check_same(found, make_state(10))
    assert "20 is broken and is removed" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["10"]
    save(tmp_path, {20: make_state(21)}, keep=2)
    check_same(restore(tmp_path, make_state(0))[1], make_state(21))


def test_bytes_that_orbax_reads_without_complaint_are_checked(tmp_path, capsys, monkeypatch):
    """As after a fault in memory while saving: the file is whole, and is not what was trained."""
    state = make_state(20)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(10, make_state(10))
    checkpoints.save(20, make_state(21), hashes=leaf_hashes(state))
    checkpoints.close()
    assert restore(tmp_path, make_state(0))[0] == 10
    assert ".step has other bytes than were saved" in " ".join(capsys.readouterr().out.split())


def test_without_a_sound_checkpoint_the_state_is_the_given_one(tmp_path, capsys):
    save(tmp_path, {10: make_state(10), 20: make_state(20)}, keep=2)
    for step in ("10", "20"):
        shutil.rmtree(tmp_path / step / "record")
    state = make_state(0)
    step, found = restore(tmp_path, state)
    assert step == 0 and found is state and not list(tmp_path.iterdir())
    assert "no checkpoint is left: the stage starts anew" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_broken(tmp_path, monkeypatch):
    save(tmp_path, {10: make_state(10)})

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Checkpoints, "record", refuse)
    with pytest.raises(PermissionError):
        restore(tmp_path, make_state(0))
    assert [path.name for path in tmp_path.iterdir()] == ["10"]


RECIPE = {
    "stage": "sft",
    "settings": {"seed": 0, "sft": {"train": {"steps": 3, "optim": {"eps": 1e-8}}}},
    "parents": {},
}


def test_a_checkpoint_of_another_recipe_is_refused_with_the_differing_keys(tmp_path):
    save(tmp_path, {7: make_state(1)}, recipe=RECIPE)
    assert restore(tmp_path, make_state(0), recipe=RECIPE)[0] == 7
    settings = {"seed": 0, "sft": {"train": {"steps": 4, "optim": {"eps": 1e-8}}, "more": True}}
    message = (
        r"7: the checkpoint does not fit .*: settings.sft.train.steps is 3 in the checkpoint and 4 now, "
        r"settings.sft.more is absent in the checkpoint and True now; delete"
    )
    with pytest.raises(UserError, match=message):
        restore(tmp_path, make_state(0), recipe={**RECIPE, "settings": settings})
    assert (tmp_path / "7").is_dir()


@pytest.mark.parametrize(("mode", "left"), [("min", ["10", "40", "50"]), ("max", ["30", "40", "50"])])
def test_the_best_is_kept_besides_the_last(tmp_path, mode, left):
    """Also by a process that goes on from checkpoints of an earlier one."""
    values = {10: 0.5, 20: 2.0, 30: 3.0, 40: 1.0, 50: 1.5}

    def go_on(steps):
        checkpoints = Checkpoints(tmp_path, keep=2, best=mode)
        checkpoints.restore(make_state(0))
        for step in steps:
            checkpoints.save(step, make_state(step), value=values[step])
        checkpoints.close()

    go_on((10, 20, 30))
    go_on((40, 50))
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_what_is_carried_comes_back_with_the_state(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(10, make_state(1), carried={"loss": [0.1, 3.0]})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.carried == {}
    checkpoints.restore(make_state(0))
    checkpoints.close()
    assert checkpoints.carried == {"loss": [0.1, 3.0]}


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (ValueError("NOT_FOUND: Error writing local file [os_error_code='2']"), errno.ENOENT, "No such file"),
        (ValueError('NOT_FOUND: Error writing "a/.zarray" in OCDBT database'), errno.ENOENT, "No such file"),
        (ValueError("INTERNAL: Error writing [os_error_code='28']"), errno.ENOSPC, "No space left"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "8a9096dd"), errno.ENOENT, "No such file"),
    ],
)
def test_an_error_of_the_writing_threads_names_the_folder(tmp_path, monkeypatch, raised, code, says):
    """TensorStore's are ValueErrors, and an entry of a folder that is removed has its bare name."""
    checkpoints = Checkpoints(tmp_path / "c", keep=1)

    def fail(*_, **__):
        raise raised

    for method, call in {"save": lambda: checkpoints.save(1, {"x": jnp.zeros(2)}), "close": checkpoints.close}.items():
        monkeypatch.setattr(checkpoints._manager, method, fail)
        with pytest.raises(OSError, match=says) as error:
            call()
        assert (error.value.errno, error.value.filename) == (code, str(tmp_path / "c"))


def test_files_that_orbax_misses_are_no_fault_of_ours(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)

    def fail(*_, **__):
        raise ValueError("No ArrayMetadata found")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(UserError, match=r"checkpoint in .*/c: No ArrayMetadata found\. If something in it was deleted"):
        checkpoints.save(1, {"x": jnp.zeros(2)})


def test_the_hash_is_of_the_values_wherever_they_lie():
    """One device and eight give one hash."""
    state = make_state(3)
    hashes = leaf_hashes(state)
    assert next(iter(hashes)) == ".step" and len(hashes) == len(jax.tree.leaves(state))
    single = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), state)
    assert leaf_hashes(single) == hashes and first_difference(hashes, leaf_hashes(single)) is None


def change_record(step: Path, **changes) -> None:
    """Changes the JSON beside a checkpoint's arrays; None removes a key."""
    (path,) = (p for p in (step / "record").rglob("*") if p.is_file() and b"hashes" in p.read_bytes())
    whole = json.loads(path.read_text())
    dropped = [name for name, value in changes.items() if value is None]
    record = {k: v for k, v in {**json.loads(whole["json"]), **changes}.items() if k not in dropped}
    path.write_text(json.dumps({"json": json.dumps(record)}))


def test_a_checkpoint_of_an_earlier_version_is_checked_by_its_sha256(tmp_path, capsys):
    """Its record does not say what its hashes are."""
    for step in (10, 20):
        save(tmp_path, {step: make_state(step)}, keep=2)
        change_record(tmp_path / str(step), hash=None, hashes=sha256_hashes(make_state(step)))
    step, found = restore(tmp_path, make_state(0))
    assert step == 20
    check_same(found, make_state(20))
    change_record(tmp_path / "20", hashes=sha256_hashes(make_state(21)))
    assert restore(tmp_path, make_state(0))[0] == 10
    assert ".step has other bytes than were saved" in " ".join(capsys.readouterr().out.split())


def test_a_kind_of_hash_that_is_not_known_is_refused_and_the_checkpoint_left_alone(tmp_path):
    save(tmp_path, {10: make_state(10)})
    change_record(tmp_path / "10", hash="of tomorrow")
    with pytest.raises(UserError, match="a newer version saved it, with hashes of the kind 'of tomorrow'"):
        restore(tmp_path, make_state(0))
    assert (tmp_path / "10").is_dir()


def test_sha256_of_the_arrays_on_disk(tmp_path):
    """By the names in the files, each as if it were a leaf of that name."""
    state = make_state(3)
    save(tmp_path, {10: state})
    checkpoints = Checkpoints(tmp_path, keep=1)
    found = checkpoints.sha256(10)
    checkpoints.close()
    assert len(found) == len(jax.tree.leaves(state))
    for name, leaf in (("trainable.layers.half", state.trainable["layers"]["half"]), ("step", state.step)):
        assert found[name] == sha256_of(name, np.asarray(leaf))
    shutil.rmtree(tmp_path / "10" / "state")
    with pytest.raises(UserError, match="10 cannot be read"):
        checkpoints.sha256(10)
