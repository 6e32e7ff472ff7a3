"""mpo_jax.training.hashes: against plain loops, over any placement, sensitive to bits and places, without a gather."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import NamedSharding, PartitionSpec

from mpo_jax.config.schema import MeshConfig
from mpo_jax.runtime.offload import HOST
from mpo_jax.runtime.sharding import make_mesh, replicated
from mpo_jax.training.hashes import (
    KINDS,
    SEEDS,
    STRIDES,
    _adder,
    add_words,
    first_difference,
    leaf_hashes,
    sha256_hashes,
    state_hash,
)
from tests.reference import hashes as reference

TYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "int16", "bool")
add = jax.jit(add_words)


def bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random bits, so NaNs and infinities too."""
    rng, kind = np.random.default_rng(seed), jnp.dtype(dtype)
    if kind == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * kind.itemsize), kind).reshape(shape)


def lanes(array) -> list[int]:
    return np.asarray(add(jnp.asarray(array))).tolist()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_it_is_what_loops_over_elements_give(dtype, shape):
    array = bits(dtype, shape, 1)
    assert lanes(array) == reference.lanes(array)


def test_elements_of_eight_bytes_and_complex_ones_are_two_words():
    for dtype in ("float64", "int64", "uint64"):
        array = bits(dtype, (3, 5), 2)
        with jax.enable_x64(True):
            assert np.asarray(add_words(jnp.asarray(array))).tolist() == reference.lanes(array), dtype
    array = bits("float32", (3, 4), 3).view(np.complex64)
    assert lanes(array) == reference.lanes(array)


def test_an_empty_array_adds_nothing_and_nine_axes_are_refused():
    assert lanes(np.zeros((0, 3), np.float32)) == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="zip"):
        add_words(jnp.zeros((1,) * 9))


def test_constants_are_odd_and_different():
    """An odd stride maps the indices of an axis to different numbers, so no two places of an axis fall together."""
    strides = [stride for lane in STRIDES for stride in lane]
    assert all(stride % 2 for stride in strides) and len({*strides, *SEEDS}) == len(strides) + len(SEEDS)


SMALL = arrays.arrays(np.uint32, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.integers(0, 2**32 - 1))


@given(SMALL, st.data())
def test_a_flipped_bit_changes_every_lane(array, data):
    place = tuple(data.draw(st.integers(0, n - 1)) for n in array.shape)
    other = array.copy()
    other[place] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    assert all(a != b for a, b in zip(lanes(array), lanes(other), strict=True))


@given(SMALL, st.data())
def test_two_elements_that_change_places_change_it(array, data):
    flat = array.reshape(-1)
    i, j = (data.draw(st.integers(0, len(flat) - 1)) for _ in range(2))
    other = flat.copy()
    other[[i, j]] = flat[[j, i]]
    assert (lanes(array) == lanes(other.reshape(array.shape))) == (flat[i] == flat[j])


@given(SMALL)
def test_a_transposition_a_reversal_and_a_roll_change_it(array):
    for other in (array.T, array[::-1], np.roll(array, 1, 1)):
        same = other.shape == array.shape and (other == array).all()
        assert (lanes(array) == lanes(other)) == same or other.shape != array.shape
        if other.shape != array.shape and (array != array[0, 0]).any():
            assert lanes(array) != lanes(other)


def test_zeros_of_both_signs_and_every_nan_are_different():
    zeros, nans = np.zeros(4, np.float32), np.full(4, 0x7FC00000, np.uint32)
    minus, other = zeros.copy(), nans.copy()
    minus[2], other[1] = -0.0, 0x7FC00001
    assert lanes(zeros) != lanes(minus)
    assert lanes(nans.view(np.float32)) != lanes(other.view(np.float32))
    assert lanes(zeros.astype(jnp.bfloat16)) != lanes(minus.astype(jnp.bfloat16))


MESHES = {"fsdp": (1, 8, 1), "all": (2, 2, 2), "tensor": (1, 2, 4)}
SPECS = [(), ("fsdp",), (None, "tensor"), ("tensor", "fsdp"), (("data", "fsdp"), "tensor"), (None, ("fsdp", "tensor"))]


@pytest.mark.optimised
@pytest.mark.parametrize("mesh", MESHES)
def test_placement_does_not_matter(mesh):
    """To the bit, and without a gather: what passes between devices is the four lanes alone."""
    data, fsdp, tensor = MESHES[mesh]
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    array = bits("float32", (8, 16, 1024), 5)
    expected = lanes(array)
    for spec in SPECS:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        x = jax.device_put(array, sharding)
        program = _adder(sharding).lower(x).compile()
        assert np.asarray(program(x)).tolist() == expected, spec
        text = program.as_text()
        assert not re.search("all-gather|all-to-all|collective-permute|reduce-scatter", text), spec
        shapes = [line.split(" = ")[1].split(" all-reduce")[0] for line in text.splitlines() if " all-reduce(" in line]
        assert all(re.match(r"u32\[4\]", shape) for shape in shapes), shapes
        assert len(shapes) <= 1, "one small sum over the devices"
        memory = program.memory_analysis()
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 4096 < array.nbytes // 8


def test_a_state_s_leaves_wherever_they_lie():
    """On one device, sharded, and offloaded; a PRNG key by its data."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    state = {"key": jax.random.key(3), "step": jnp.asarray(7), "w": jnp.asarray(bits("bfloat16", (16, 4), 6))}
    expected = leaf_hashes(state)
    assert list(expected) == ["['key']", "['step']", "['w']"]
    assert all(re.fullmatch("[0-9a-f]{32}", digest) for digest in expected.values())
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    placed = {**{k: jax.device_put(state[k], replicated(mesh)) for k in ("key", "step")}, "w": state["w"]}
    for sharding in (rows, rows.with_memory_kind(HOST)):
        placed["w"] = jax.device_put(state["w"], sharding)
        assert leaf_hashes(placed) == expected
        assert placed["w"].sharding == sharding
    with jax.set_mesh(mesh):
        assert leaf_hashes(placed) == expected == leaf_hashes(state)
    assert leaf_hashes({**state, "key": jax.random.key(4)})["['key']"] != expected["['key']"]


@pytest.mark.parametrize("kind", KINDS)
def test_name_type_and_shape_are_part_of_it(kind):
    hash_of = KINDS[kind]
    a = {"x": jnp.zeros(4), "y": jnp.asarray(1)}
    others = [
        {"x": jnp.zeros(4).at[2].set(-0.0), "y": a["y"]}, {"x": jnp.zeros(4, jnp.int32), "y": a["y"]},
        {"x": jnp.zeros((2, 2)), "y": a["y"]}, {"x2": jnp.zeros(4), "y": a["y"]},
    ]  # fmt: skip
    assert len({state_hash(hash_of(tree)) for tree in [a, *others]}) == 5
    assert [first_difference(hash_of(a), hash_of(tree)) for tree in others] == ["['x']"] * 4
    assert first_difference(hash_of(a), hash_of({"x": a["x"]})) == "['y']"


def test_everything_is_fetched_at_once(monkeypatch):
    fetched, device_get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or device_get(tree))
    state = {"a": jnp.zeros((64, 64)), "b": jnp.zeros(3)}
    leaf_hashes(state)
    assert len(fetched) == 1 and all(leaf.shape == (4,) for leaf in jax.tree.leaves(fetched))


def test_sha256_is_of_the_bytes():
    """By `sha256sum` of the line `['x'] int32[2]` and the bytes. Checkpoints of earlier versions have these hashes."""
    found = sha256_hashes({"x": jnp.asarray([1, 2], jnp.int32)})
    assert found == {"['x']": "91f87a387f3628215394d8eb595cc6841037c5c2ac5dfebac9e15e994d6ed77d"}
