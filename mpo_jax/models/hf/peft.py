"""PEFT's adapter folders, in and out: adapter_config.json and adapter_model.safetensors beside a base model.

Such a folder is read as a whole model, its base with the adapters folded in, one tensor at a time.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpo_jax.errors import UserError
from mpo_jax.models.adapter import SUFFIX, Adapter
from mpo_jax.models.hf.weights import ENTRIES, Tensors
from mpo_jax.models.kernels import KERNELS, MODULES
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime.processes import wait
from mpo_jax.types import Head, Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "alpha_pattern": {}, "lora_bias": False, "bias": "none"}
"""Settings of PEFT that are understood with these values alone."""


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says.

    Attributes:
      base: folder or hub id of the model that is adapted.
      adapter: its rank and targets are for adapters made here; of others, each tensor says its own.
    """

    base: str
    adapter: Adapter


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_settings(folder: Path) -> Settings:
    """The settings of an adapter folder.

    Raises:
      UserError: a broken file, no base model, or a method that is not plain LoRA; names file and key.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else None
        raise UserError(f"{path}: peft_type={kind!r} is not supported: only LORA is")
    for key, plain in PLAIN.items():
        if raw.get(key, plain) not in (plain, None):
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported: merge the adapter with PEFT first")
    base, alpha = raw.get("base_model_name_or_path"), raw.get("lora_alpha")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path is missing: it names the model that the adapter changes")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{path}: lora_alpha={alpha!r} is not a number")
    targets = raw.get("target_modules") or ()
    ours = tuple(name for name in KERNELS if f"{name}_proj" in targets)
    rank = raw.get("r")
    return Settings(
        base, Adapter(rank if isinstance(rank, int) else 0, float(alpha), ours, bool(raw.get("use_rslora")))
    )


class AdaptedTensors:
    """A base model's tensors with adapters folded in: W + scale B A, summed in float32, in W's type.

    Tensors that the adapter's folder holds whole (PEFT's modules_to_save, such as a classifier's head) replace the
    base's.

    Raises:
      UserError: a missing or broken file, or tensors that no kernel of the base has a place for.
    """

    def __init__(self, folder: Path, settings: Settings, base: Tensors):
        self.where, self._base, self._settings = str(folder), base, settings
        self._file = folder / WEIGHTS
        if not self._file.is_file():
            pickled = (
                " (adapter_model.bin is pickled and is not read)" if (folder / "adapter_model.bin").exists() else ""
            )
            raise UserError(f"no adapters in {folder}: {WEIGHTS} is missing{pickled}")
        try:
            with safe_open(self._file, framework="np") as file:
                held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._file}: broken safetensors file: {error}") from error
        self._pairs: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        for name in held:
            self._take(name)
        self._check_pairs(held)

    def _take(self, name: str) -> None:
        """Finds the base's tensor that one of the adapter's tensors is for."""
        target = name.removeprefix(PREFIX).replace(".default", "").replace(".modules_to_save", "")
        stem, dot, part = target.removesuffix(".weight").rpartition(".lora_")
        if dot and part in ("A", "B") and f"{stem}.weight" in self._base.names():
            self._pairs.setdefault(f"{stem}.weight", {})[part] = name
        elif not dot and (target in self._base.names() or target == "score.weight"):
            self._whole[target] = name
        else:
            raise UserError(
                f"{self._file}: tensor {name} is for no tensor of the base model {self._settings.base}: it belongs to "
                "another model, or to a method that is not supported"
            )

    def _check_pairs(self, held: dict[str, tuple[int, ...]]) -> None:
        for target, pair in self._pairs.items():
            if set(pair) != {"A", "B"}:
                raise UserError(f"{self._file}: {target} has lora_{min(pair)} alone: A and B belong together")
            a, b = held[pair["A"]], held[pair["B"]]
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
                raise UserError(f"{self._file}: {target} has A {list(a)} and B {list(b)}, which do not multiply")

    def names(self) -> set[str]:
        return self._base.names() | set(self._whole)

    def check(self) -> None:
        self._base.check()

    @property
    def dtype(self) -> str:
        return self._base.dtype

    def read(self, name: str) -> np.ndarray:
        if name in self._whole:
            return self._stored(self._whole[name])
        kernel, pair = self._base.read(name), self._pairs.get(name)
        if pair is None:
            return kernel
        a, b = (self._stored(pair[part]).astype(np.float32) for part in "AB")
        if (len(b), a.shape[1]) != kernel.shape:
            raise UserError(
                f"{self._file}: A and B of {name} make a matrix of {[len(b), a.shape[1]]}, but the base model's is "
                f"{list(kernel.shape)}: the adapter belongs to another model"
            )
        scale = replace(self._settings.adapter, rank=len(a)).scale
        return (kernel.astype(np.float32) + np.float32(scale) * (b @ a)).astype(kernel.dtype)

    def _stored(self, name: str) -> np.ndarray:
        try:
            with safe_open(self._file, framework="np") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._file}: cannot read tensor {name}: {error}") from error


def save_settings(folder: Path, adapter: Adapter, *, base: str, head: Head) -> None:
    """Writes adapter_config.json."""
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head == "value" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        "use_rslora": adapter.rslora,
        "target_modules": [f"{name}_proj" for name in adapter.targets],
        "modules_to_save": ["score"] if head == "value" else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_weights(folder: Path, trained: Tree, config: DecoderConfig) -> None:
    """Writes adapter_model.safetensors, float32. Of several processes, all must call this and the first one writes.

    Args:
      trained: adapters, and a value head if there is one.
    """
    tensors = dict(_tensors(trained, config))
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    wait(f"process 0 writes {WEIGHTS}")


def _tensors(trained: Tree, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by PEFT's name, in its layout: A [r in], B [out r]."""
    for module in MODULES:
        for name, low in trained["layers"].get(module, {}).items():
            kernel = name.removesuffix(SUFFIX)
            entry, (_, inputs, outputs) = ENTRIES[f"layers.{module}.{kernel}"], KERNELS[kernel]
            a, b = _on_host(low["a"]), _on_host(low["b"])
            for i in range(config.num_layers):
                stem = PREFIX + entry.name.format(i=i).removesuffix(".weight")
                # a side of several axes is laid out as the kernel's own
                left = entry.to_theirs(a[i], config) if inputs > 1 else a[i].T
                right = entry.to_theirs(b[i], config) if outputs > 1 else b[i].T
                yield f"{stem}.lora_A.weight", np.ascontiguousarray(left)
                yield f"{stem}.lora_B.weight", np.ascontiguousarray(right)
    if "score" in trained:
        yield f"{PREFIX}score.weight", np.ascontiguousarray(_on_host(trained["score"]["kernel"]).T)


def _on_host(x: jax.Array) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
