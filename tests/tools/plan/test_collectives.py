"""Collectives read from HLO text: a hand-made module, and what JAX compiles for eight devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mpo_jax.config.schema import MeshConfig
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.tools.plan.collectives import Traffic, shape_bytes, traffic

pytestmark = pytest.mark.optimised

TEXT = """\
HloModule hand_made, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %part = f32[1,8]{1,0} reduce-scatter(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  %again = f32[4,8]{1,0} all-gather(%part), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %again)
}

%counts (c: (s32[], f32[4,8])) -> pred[] {
  %c = (s32[], f32[4,8]{1,0}) parameter(0)
  %seven = s32[] constant(7)
  %k = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%k, %seven), direction=LT
}

%seven_times (r: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %r = (s32[], f32[4,8]{1,0}) parameter(0)
  %z = f32[4,8]{1,0} get-tuple-element(%r), index=1
  %moved = f32[4,8]{1,0} collective-permute(%z), channel_id=5
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%k, %moved)
}

%outer_body (q: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %q = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[4,8]{1,0}) while(%q), condition=%cond, body=%inner_body, backend_config=THREE_TIMES
}

ENTRY %main (x: bf16[2,8]) -> f32[4,8] {
  %x = bf16[2,8]{1,0} parameter(0)
  %start = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x), channel_id=3, dimensions={0}
  %done = bf16[8,8]{1,0} all-gather-done(%start)
  %init = (s32[], f32[4,8]{1,0}) tuple(%done)
  %loop = (s32[], f32[4,8]{1,0}) while(%init), condition=%cond2, body=%outer_body, backend_config={}
  %counted = (s32[], f32[4,8]{1,0}) while(%loop), condition=%counts, body=%seven_times
  %y = f32[4,8]{1,0} get-tuple-element(%counted), index=1
  ROOT %all = f32[4,8]{1,0} all-reduce(%y), channel_id=4, to_apply=%add
}
""".replace("THREE_TIMES", '{"known_trip_count":{"n":"3"}}')


def test_a_module_by_hand():
    array = 4 * 8 * 4
    assert traffic(TEXT, loop_trips=5) == [
        Traffic("all-gather", 1, 8 * 8 * 2, 15, 15 * array, exact=False),
        Traffic("reduce-scatter", 0, 0, 15, 15 * array, exact=False),
        Traffic("collective-permute", 0, 0, 7, 7 * array, exact=False),
        Traffic("all-reduce", 1, array, 0, 0),
    ]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0}", 30),
        ("(s32[], pred[7])", 11),
        ("f8e4m3fn[10]", 10),
        ("token[]", 0),
        ("u4[8]", 4),
    ],
)
def test_sizes(shape, size):
    assert shape_bytes(shape) == size


def test_a_scan_over_divided_weights_gathers_them_every_turn():
    mesh = make_mesh(MeshConfig(fsdp=8))
    layers = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def forward(x, layers):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    (found,) = traffic(jax.jit(forward).lower(x, layers).compile().as_text())
    assert found == Traffic("all-gather", 0, 0, 6, 6 * 64 * 64 * 4)


@pytest.mark.parametrize(
    ("groups", "crosses"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", False),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", True),
        ("replica_groups=[2,4]<=[8]", False),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", True),
        ("replica_groups=[1,8]<=[8]", True),
        ("replica_groups={}", True),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", False),
        ("source_target_pairs={{3,4}}", True),
    ],
)
def test_collectives_over_two_hosts_of_four(groups, crosses):
    lines = ("ENTRY %main (x: f32[6]) -> f32[6] {", "  %x = f32[6]{0} parameter(0)",
             f"  ROOT %y = f32[6]{{0}} all-reduce(%x), {groups}", "}")  # fmt: skip
    text = "\n".join(lines)
    (found,) = traffic(text, group=4)
    assert (found.total_bytes, found.network_bytes) == (24, 24 if crosses else 0)
    assert traffic(text)[0].network_bytes == 0


def test_loops_of_unknown_length_inside_each_other():
    text = TEXT.replace('{"known_trip_count":{"n":"3"}}', "{}")
    (gathers,) = [t for t in traffic(text, loop_trips=(5, 2)) if t.kind == "all-gather"]
    assert gathers.loop_count == 5 * 2
