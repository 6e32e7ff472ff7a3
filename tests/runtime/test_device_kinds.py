from types import SimpleNamespace

import jax
import pytest

from mpo_jax.runtime.device_kinds import device_kind, peak_flops, similar_kind


def devices(*names: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(device_kind=name) for name in names]


def test_a_device_is_known_by_its_own_name_and_its_product():
    known = device_kind("NVIDIA H100 80GB HBM3")
    assert known is not None and known.bf16_tflops == 989
    assert device_kind("NVIDIA H100 PCIe") is None and device_kind("cpu") is None
    peaks = {name: similar_kind(name) for name in ("NVIDIA H100 PCIe", "NVIDIA A100-PCIE-40GB", "TPU v5 lite")}
    assert [kind and kind.bf16_tflops for kind in peaks.values()] == [989, 312, 197]
    assert similar_kind("cpu") is None


@pytest.mark.parametrize(
    ("names", "peak"),
    [
        (["NVIDIA H100 80GB HBM3"], 989e12),
        (["TPU v5 lite"] * 8, 8 * 197e12),
        (["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"], None),
        (["cpu"], None),
        ([], None),
    ],
)
def test_the_peak_of_all_devices_or_none(names, peak):
    """A similar device has another peak, so its own name must be known."""
    assert peak_flops(devices(*names)) == peak


def test_no_peak_is_made_up_for_a_cpu():
    assert peak_flops(jax.devices()) is None
