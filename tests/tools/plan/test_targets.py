import pytest

from mpo_jax.errors import UserError
from mpo_jax.runtime.device_kinds import known
from mpo_jax.tools.plan import targets
from mpo_jax.tools.plan.compilers import gpu_description
from mpo_jax.tools.plan.targets import GIB, parse


@pytest.mark.parametrize(
    ("name", "platform", "groups", "devices"),
    [
        ("a100x8", "cuda", 1, 8),
        ("a100-40x8", "cuda", 1, 8),
        ("h100x8", "cuda", 1, 8),
        ("h200x1", "cuda", 1, 1),
        ("2xa100x8", "cuda", 2, 16),
        ("8xh100x8", "cuda", 8, 64),
        ("rtx4090x1", "cuda", 1, 1),
        ("l4x1", "cuda", 1, 1),
        ("a10gx1", "cuda", 1, 1),
        ("v5p:4x4x8", "tpu", 1, 128),
        ("v5e:2x4", "tpu", 1, 8),
        ("v5p:2x2x2", "tpu", 1, 8),
        ("v4:2x2x2", "tpu", 1, 8),
        ("v5p:2x4x4", "tpu", 1, 32),
        ("2xv5e:2x4", "tpu", 2, 16),
        ("cpu", "cpu", 1, 4),
        ("cpu:80", "cpu", 1, 4),
    ],
)
def test_names(name, platform, groups, devices):
    target = parse(name, cpu_devices=4)
    assert (target.platform, target.groups, target.num_devices) == (platform, groups, devices)
    assert target.spans_network == (groups > 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a1000x8", "unknown device a1000; did you mean a100?"),
        ("a100", "is not a target"),
        ("a100:2x2", "GPUs are counted"),
        ("v5px8", "a v5p slice is named by its topology, as in v5p:2x2x2"),
        ("v5e:2x2x2", "as in v5e:2x4"),
        ("a100x0", "device counts start at 1"),
        ("cpu:", "is not a target"),
    ],
)
def test_mistakes_are_explained(name, message):
    with pytest.raises(UserError, match=message):
        parse(name, cpu_devices=1)


def test_what_may_be_filled():
    assert parse("cpu:80", cpu_devices=4).capacity == 80 * GIB
    assert parse("cpu", cpu_devices=4).capacity == targets.host_memory() / 4
    assert parse("a100x8", cpu_devices=1).capacity == pytest.approx(0.92 * 79.1 * GIB)


def test_memory_is_below_what_the_vendor_names():
    """Decimal gigabytes of HBM on the data sheets; a program sees less."""
    small = {"rtx4090": 25.8, "l4": 25.8, "a10g": 25.8}
    sheets = {
        **small,
        "a100": 86,
        "a100-40": 43,
        "h100": 86,
        "h200": 151,
        "v4": 35,
        "v5e": 17.2,
        "v5p": 103,
        "v6e": 34.4,
    }
    kinds, _ = known()
    assert kinds.keys() == sheets.keys()
    for name, kind in kinds.items():
        assert 0.9 * sheets[name] < kind.memory_gib * GIB / 1e9 <= sheets[name], name


def test_gpu_descriptions_name_each_value_once():
    kinds, _ = known()
    text = gpu_description(kinds["a100-40"])
    names = [line.split(":")[0].strip() for line in text.splitlines() if ":" in line]
    assert len(names) == len(set(names))
    assert "cuda_compute_capability { major: 8 minor: 0 }" in text and "memory_bandwidth: 1555000000000" in text


def test_devices_of_a_host():
    devices = {"a100x8": 8, "2xa100x8": 8, "l4x1": 1, "v5p:2x4x4": 4, "v5e:2x4": 4, "v5p:1x1x1": 1, "cpu": 8}
    assert {name: parse(name, cpu_devices=8).devices_per_host for name in devices} == devices


def test_variants_of_a_description_keep_what_they_share():
    kinds, _ = known()
    text = gpu_description(kinds["l4"])
    assert "major: 8 minor: 9" in text and "core_count: 58" in text and "shared_memory_per_core: 102400" in text
