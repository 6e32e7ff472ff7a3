"""Kinds of accelerators and what they can do at most, from their vendors' data sheets: `device_kinds.yaml`."""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field

FILE = Path(__file__).with_suffix(".yaml")


class Facts(BaseModel, frozen=True):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kind(Facts, frozen=True):
    """One kind of device; device_kinds.yaml explains the units."""

    platform: Literal["cuda", "tpu"]
    name: str
    memory_gib: float = Field(gt=0)
    usable: float = Field(gt=0, le=1)
    bf16_tflops: float = Field(gt=0)
    hbm_gbs: float = Field(gt=0)
    link_gbs: float = Field(gt=0)
    network_gbs: float = Field(gt=0)
    host_gib: float = Field(gt=0)
    compiler: dict[str, Any] = Field(default_factory=dict)
    dimensions: int = 0
    devices_per_host: int = 0
    chip_config: str | None = None

    @property
    def product(self) -> str:
        """The product name without the variant, such as A100 or TPU v5 lite."""
        return self.name if self.platform == "tpu" else re.split(r"[ -]", self.name)[1]


class Utilisation(Facts, frozen=True):
    """Assumed fractions of a device's peak rates."""

    matmul: float = Field(gt=0, le=1)
    bandwidth: float = Field(gt=0, le=1)
    link: float = Field(gt=0, le=1)


class Device(Protocol):
    """The part of a `jax.Device` that is read here."""

    @property
    def device_kind(self) -> str: ...


@lru_cache
def known() -> tuple[dict[str, Kind], Utilisation]:
    """The kinds of devices by name, and the assumed utilisations."""
    facts = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    kinds = {name: Kind.model_validate(values) for name, values in facts["kinds"].items()}
    return kinds, Utilisation.model_validate(facts["utilisation"])


def device_kind(name: str) -> Kind | None:
    """The kind of a device by JAX's name for it; None if it is unknown."""
    kinds, _ = known()
    return next((kind for kind in kinds.values() if kind.name == name), None)


def similar_kind(name: str) -> Kind | None:
    """The kind of a device by JAX's name for it, or another variant of the same product; None if it is unknown."""
    kinds, _ = known()
    # longest first: TPU v5 lite must match before TPU v5
    by_length = sorted(kinds.values(), key=lambda kind: -len(kind.product))
    return next((kind for kind in by_length if kind.product in name), None)


def peak_flops(devices: Iterable[Device]) -> float | None:
    """FLOP/s of dense bfloat16 products of all devices together; None if one of them is unknown, as a CPU is."""
    kinds = [device_kind(device.device_kind) for device in devices]
    return 1e12 * sum(kind.bf16_tflops for kind in kinds if kind is not None) if kinds and all(kinds) else None
