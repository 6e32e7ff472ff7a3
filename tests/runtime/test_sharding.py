"""mpo_jax.runtime.sharding: the table of logical axes, refusals, and where arrays end up on eight devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mpo_jax.config.schema import MeshConfig
from mpo_jax.errors import UserError
from mpo_jax.runtime.sharding import (
    BATCH_AXES,
    batch_sharding,
    by_device,
    by_group,
    check_batch,
    constrain,
    make_mesh,
    mesh_of,
    place_batch,
    platform,
    replicated,
    shardings_for,
    spec_for,
)

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "mesh", "expected"),
    [
        (("vocab", "embed"), (32, 16), MESH, P("tensor", "fsdp")),
        ((None, "embed", "heads", None), (2, 16, 4, 8), MESH, P(None, "fsdp", "tensor", None)),
        ((None, "mlp", "embed"), (2, 24, 16), MESH, P(None, "tensor", "fsdp")),
        (("batch", None), (8, 5), MESH, P(BATCH_AXES, None)),
        (("batch", "act_heads"), (8, 4), MESH, P(BATCH_AXES, "tensor")),
        # an axis that does not divide is whole on every device; the others are not affected
        (("vocab", "embed"), (33, 16), MESH, P(None, "fsdp")),
        (("vocab", "embed"), (32, 15), MESH, P("tensor", None)),
        ((None, "embed", "kv_heads", None), (2, 16, 1, 8), MESH, P(None, "fsdp", None, None)),
        (("batch", None), (6, 4), MESH, P(None, None)),  # divides over data alone, but not over data x fsdp
        # mesh axes of size 1, absent ones, and logical axes without a rule
        (("vocab", "embed"), (32, 16), {"data": 8, "fsdp": 1, "tensor": 1}, P(None, None)),
        (("batch", "embed"), (8, 16), {"data": 1, "fsdp": 8, "tensor": 1}, P(BATCH_AXES, "fsdp")),
        (("vocab", "embed"), (32, 16), {"fsdp": 4}, P(None, "fsdp")),
        (("nonsense", "embed"), (32, 16), MESH, P(None, "fsdp")),
        ((), (), MESH, P()),
    ],
)
def test_spec_for(axes, shape, mesh, expected):
    assert spec_for(axes, shape, mesh) == expected


def test_spec_for_needs_a_name_an_axis():
    with pytest.raises(ValueError, match="zip"):
        spec_for(("vocab",), (32, 16), MESH)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 8, 1), (3, 1, 2)])
def test_a_mesh_takes_the_first_devices(sizes):
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()[: int(np.prod(sizes))]}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_slices_are_divided_along_data():
    """Stand-ins for the devices of two TPU slices; tests/plan has the mesh over real descriptions."""
    devices = [SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    with pytest.raises(UserError, match=r"2 TPU slices, but mesh.data=1: make it a multiple of 2"):
        mesh_of(MeshConfig(fsdp=8), devices)


def test_a_mesh_larger_than_the_machine_says_how_to_mend_it():
    with pytest.raises(UserError) as caught:
        make_mesh(MeshConfig(data=2, fsdp=4, tensor=2))
    for part in ("mesh.data=2 x mesh.fsdp=4 x mesh.tensor=2", "needs 16 devices", "there are 8 (cpu)",
                 "runtime.cpu_devices=16"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize(("size", "fits"), [(8, True), (16, True), (4, False), (12, False)])
def test_check_batch(size, fits):
    mesh = AbstractMesh((2, 4, 3), ("data", "fsdp", "tensor"))
    if fits:
        check_batch(size, mesh, "sft.train.batch_size")
    else:
        with pytest.raises(UserError, match=rf"sft\.train\.batch_size={size} does not divide .* multiple of 8"):
            check_batch(size, mesh, "sft.train.batch_size")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"minibatches": 4}, "=8 in 4 minibatches gives minibatches of 2, which do not divide over"),
        ({"accumulation": 4}, "=8 in 4 micro-batches gives micro-batches of 2, which do not divide over"),
        ({"minibatches": 2, "accumulation": 2}, "=8 in 2 minibatches of 2 micro-batches gives micro-batches of 2, "),
    ],
)
def test_check_batch_names_the_multiple_that_its_parts_need(parts, said):
    mesh, key = AbstractMesh((1, 4, 1), ("data", "fsdp", "tensor")), "ppo.train.batch_size"
    with pytest.raises(UserError) as caught:
        check_batch(8, mesh, key, **parts)
    assert key + said in str(caught.value) and "= 4 devices: make it a multiple of 16," in str(caught.value)
    check_batch(16, mesh, key, **parts)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_place_batch_puts_each_row_on_its_devices(data, fsdp, tensor):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    batch = {"ids": np.arange(48, dtype=np.int32).reshape(16, 3), "length": np.arange(16, dtype=np.uint32)}
    placed = place_batch(batch, mesh)
    rows = 16 // (data * fsdp)
    for name, array in placed.items():
        assert array.sharding.is_equivalent_to(batch_sharding(mesh), array.ndim)
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            assert shard.data.shape == (rows, *batch[name].shape[1:])
            np.testing.assert_array_equal(shard.data, batch[name][shard.index])
        starts = {shard.index[0].start or 0 for shard in array.addressable_shards}
        assert starts == set(range(0, 16, rows))
    back = jax.device_get(placed)
    for name in batch:
        assert isinstance(back[name], np.ndarray) and back[name].dtype == batch[name].dtype
        np.testing.assert_array_equal(back[name], batch[name])


def test_shardings_for_maps_a_tree():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    axes = {"a": ("vocab", "embed"), "b": {"c": (None,), "d": ()}}
    shapes = {"a": jax.ShapeDtypeStruct((6, 8), jnp.float32), "b": {"c": jnp.ones(3), "d": jnp.ones(())}}
    expected = {"a": P("tensor", "fsdp"), "b": {"c": P(None), "d": P()}}
    found = shardings_for(axes, shapes, mesh)
    assert jax.tree.map(lambda s: s.spec, found, is_leaf=lambda s: isinstance(s, NamedSharding)) == expected


def test_replicated_is_whole_everywhere():
    mesh = make_mesh(MeshConfig(data=8))
    x = jax.device_put(np.arange(3.0, dtype=np.float32), replicated(mesh))
    assert [shard.data.shape for shard in x.addressable_shards] == [(3,)] * 8


def test_constrain_lays_out_inside_a_mesh_and_does_nothing_outside():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", None) is x
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        laid = jax.jit(lambda x: constrain(x * 2, "batch", "act_heads"))(x)
    assert laid.sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp", "tensor")), 2)
    np.testing.assert_array_equal(laid, 2 * np.ones((8, 4)))
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert constrain(x, "batch", None) is x


def test_by_device_divides_an_axis_where_all_its_sizes_allow():
    """Eight rows over four devices; four and two heads over two, but four and three over none."""
    shapes = []

    def product(a, b):
        shapes.append((a.shape, b.shape))
        return a * b.sum(1, keepdims=True)

    heads = ("batch", "act_heads")
    a, b = jnp.arange(32.0).reshape(8, 4), jnp.ones((8, 2))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        found = by_device(product, (("batch", None), heads), ("batch", None))(a, b[:, :1])
        by_device(product, (heads, heads), heads)(a, b)
        by_device(product, (heads, heads), heads)(a, jnp.ones((8, 3)))
    assert shapes == [((2, 4), (2, 1)), ((2, 2), (2, 1)), ((2, 4), (2, 3))]
    assert (np.asarray(found) == np.asarray(a)).all()
    assert by_device(product, (), ()) is product


def test_by_device_inside_a_group_divides_the_axes_that_are_left():
    shapes = []

    def double(a):
        shapes.append(a.shape)
        return 2 * a

    def rows(_, a, __):
        return by_device(double, (("batch", "act_heads"),), ("batch", "act_heads"))(a)

    mesh, a = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), jnp.arange(32.0).reshape(8, 4)
    with jax.set_mesh(mesh):
        found = jax.jit(by_group(rows, mesh))((), a, ())
    assert set(shapes) == {(2, 2)} and (np.asarray(found) == 2 * np.asarray(a)).all()


def test_the_platform_is_the_mesh_s():
    mesh = AbstractMesh((2,), ("data",), abstract_device=jax.sharding.AbstractDevice("TPU v5", 1, "tpu"))
    assert platform() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "tpu"
