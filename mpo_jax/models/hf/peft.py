"""PEFT's adapter folders, in and out: adapter_config.json and adapter_model.safetensors beside a base model.

Such a folder is read as a whole model, its base with the adapters folded in, one tensor at a time.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpo_jax.errors import UserError
from mpo_jax.models.adapter import SUFFIX, Adapter
from mpo_jax.models.hf.found import SCORE
from mpo_jax.models.hf.hub import is_hub_id, local_model, on_this_machine
from mpo_jax.models.hf.table import Entry, entries
from mpo_jax.models.hf.weights import Tensors
from mpo_jax.models.kernels import KERNELS
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime.processes import wait
from mpo_jax.types import Head, Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
WHOLE = ("model.safetensors", "model.safetensors.index.json")
"""What a model of its own has."""
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,), "fan_in_fan_out": (False,), "lora_bias": (False,), "bias": ("none",),
    "layer_replication": (None,), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
"""Settings of PEFT with the values that are understood; other ways to begin change the base model's weights too."""


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says.

    Attributes:
      base: folder or hub id of the model that is adapted.
      modules: names of the adapted modules.
      rank: of most adapters; each tensor says its own.
      alphas: alpha of modules that have another, by the end of the module's name.
    """

    base: str
    modules: tuple[str, ...]
    rank: int
    alpha: float
    rslora: bool
    alphas: Mapping[str, float]

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A for a module of this dotted name."""
        own = (alpha for end, alpha in self.alphas.items() if module == end or module.endswith(f".{end}"))
        return Adapter(rank, next(own, self.alpha), (), self.rslora).scale

    def adapter(self, decoder: DecoderConfig) -> Adapter:
        """The adapter of a model like this one, which is made here."""
        table = _kernel_entries(decoder)
        targets = tuple(kernel for kernel, entry in table.items() if _module(entry) in self.modules)
        return Adapter(self.rank, self.alpha, targets, self.rslora)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters.

    Raises:
      UserError: if it holds a model of its own, too.
    """
    if not (folder / CONFIG).is_file():
        return False
    if whole := [name for name in WHOLE if (folder / name).is_file()]:
        raise UserError(
            f"{folder} holds a model, {whole[0]}, and adapters of another, {CONFIG}: remove the one that is not meant"
        )
    return True


def described_by(path: Path) -> Path:
    """The folder or GGUF file that says what a model is: an adapter's base, else the model's own."""
    return described_by(local_model(read_settings(path).base)) if is_adapter(path) else path


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
        if raw.get(key) not in (*plain, None):
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported: merge the adapter with PEFT first")
    base, alpha = raw.get("base_model_name_or_path"), raw.get("lora_alpha")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path is missing: it names the model that the adapter changes")
    if on_this_machine(base) is None and not is_hub_id(base):
        raise UserError(
            f"{path}: base_model_name_or_path={base}: no such folder or file, and no hub id, but the adapter is of use "
            "on that model alone: correct the path, or export a whole model in its place (mpo export --merge)"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{path}: lora_alpha={alpha!r} is not a number")
    modules, rank = raw.get("target_modules"), raw.get("r")
    return Settings(
        base=base,
        modules=tuple(map(str, modules)) if isinstance(modules, list) else (),
        rank=rank if isinstance(rank, int) else 0,
        alpha=float(alpha),
        rslora=bool(raw.get("use_rslora")),
        alphas=_alphas(raw.get("alpha_pattern"), path),
    )


def _alphas(pattern: Any, path: Path) -> dict[str, float]:
    """Alphas by module. PEFT's keys are regular expressions; those of a stranger's file are not run, names are read."""
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise UserError(f"{path}: alpha_pattern={pattern!r} must give numbers by module")
    for name, alpha in pattern.items():
        if not re.fullmatch(r"[\w.]+", name) or isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise UserError(
                f"{path}: alpha_pattern has {name!r}: {alpha!r}, but only numbers by a module's name are supported: "
                "merge the adapter with PEFT first"
            )
    return {name: float(alpha) for name, alpha in pattern.items()}


class AdaptedTensors:
    """A base model's tensors with adapters folded in: W + scale B A, in float32 whatever W's type is.

    Tensors that the adapter's folder holds whole (PEFT's modules_to_save, such as a classifier's head) replace the
    base's.

    Raises:
      UserError: a missing or broken file, or tensors that no kernel of the base has a place for.
    """

    def __init__(self, folder: Path, settings: Settings, base: Tensors, decoder: DecoderConfig):
        self.where, self._base, self._settings = str(folder), base, settings
        self._lm_head = entries(decoder.family)["head"].name
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
        self._shapes = {target: held[name] for target, name in self._whole.items()}

    def _take(self, name: str) -> None:
        """Finds the base's tensor that one of the adapter's tensors is for."""
        target = name.removeprefix(PREFIX).replace(".default", "").replace(".modules_to_save", "")
        stem, dot, part = target.removesuffix(".weight").rpartition(".lora_")
        if dot and part in ("A", "B") and f"{stem}.weight" in self._base.names():
            self._pairs.setdefault(f"{stem}.weight", {})[part] = name
        elif not dot and (target in self._base.names() or target == SCORE):
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

    def replaces(self, name: str) -> bool:
        """Whether the adapter's folder holds this tensor whole."""
        return name in self._whole

    def names(self) -> set[str]:
        held = self._base.names() | set(self._whole)
        # a language model under a reward model's adapters lends it no head
        return held - {self._lm_head} if SCORE in self._whole else held

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._base.shape(name)

    @property
    def notes(self) -> list[str]:
        """What is done to the base's tensors, for the log."""
        return [*getattr(self._base, "notes", ()), f"the adapters of {self.where} are folded in"]

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
        scale = self._settings.scale(name.removesuffix(".weight"), len(a))
        return kernel.astype(np.float32) + np.float32(scale) * (b @ a)

    def _stored(self, name: str) -> np.ndarray:
        try:
            with safe_open(self._file, framework="np") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._file}: cannot read tensor {name}: {error}") from error


def check_targets(adapter: Adapter, decoder: DecoderConfig) -> None:
    """Raises UserError where PEFT adapts several kernels by one pair of matrices, and only some of them are adapted."""
    table = _kernel_entries(decoder)
    for entry in {table[kernel].name: table[kernel] for kernel in adapter.targets}.values():
        together = [kernel for kernel, other in table.items() if other.name == entry.name]
        if not set(together) <= set(adapter.targets):
            names = ", ".join(f"{kernel}_proj" for kernel in together)
            raise UserError(
                f"model.adapter.targets: {names} are one matrix in a {decoder.family} model ({_module(entry)}): name "
                "all of them or none"
            )


def save_settings(folder: Path, adapter: Adapter, decoder: DecoderConfig, *, base: str, head: Head) -> None:
    """Writes adapter_config.json."""
    table = _kernel_entries(decoder)
    modules = [_module(table[kernel]) for kernel in adapter.targets]
    # of kernels that are one matrix there, A and B are put together: more ranks, and an alpha that keeps the factor
    parts = {module: modules.count(module) for module in modules if modules.count(module) > 1}
    alpha = _whole_if_it_is(adapter.alpha)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head == "value" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "use_rslora": adapter.rslora,
        "target_modules": list(dict.fromkeys(modules)),
        "rank_pattern": {module: adapter.rank * count for module, count in parts.items()},
        "alpha_pattern": {
            module: _whole_if_it_is(adapter.alpha * (math.sqrt(count) if adapter.rslora else count))
            for module, count in parts.items()
        },
        "modules_to_save": ["score"] if head == "value" else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def rename_base(folder: Path, base: str) -> None:
    """Names another base in adapter_config.json; every other key stays."""
    path = folder / CONFIG
    values = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _whole_if_it_is(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


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
    table = _kernel_entries(config)
    held = {kernel: trained["layers"].get(KERNELS[kernel].module, {}).get(kernel + SUFFIX) for kernel in table}
    adapted = {kernel: (_on_host(low["a"]), _on_host(low["b"])) for kernel, low in held.items() if low is not None}
    for entry in {table[kernel].name: table[kernel] for kernel in adapted}.values():
        kernels = [kernel for kernel in adapted if table[kernel].name == entry.name]
        for i in range(config.num_layers):
            layer = {kernel: (adapted[kernel][0][i], adapted[kernel][1][i]) for kernel in kernels}
            stem = PREFIX + entry.name.format(i=i).removesuffix(".weight")
            left = np.concatenate([_left(entry, k, a, config) for k, (a, _) in layer.items()])
            right = np.concatenate([_right(entry, k, layer, config) for k in layer], 1)
            # safetensors writes an array's memory as it lies
            yield f"{stem}.lora_A.weight", np.ascontiguousarray(left)
            yield f"{stem}.lora_B.weight", np.ascontiguousarray(right)
    if "score" in trained:
        yield f"{PREFIX}{SCORE}", np.ascontiguousarray(_on_host(trained["score"]["kernel"]).T)


def _left(entry: Entry, kernel: str, a: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """[r in]: a side of several axes is laid out as the kernel's own."""
    return entry.to_theirs((a,), config) if KERNELS[kernel].inputs > 1 else a.T


def _right(
    entry: Entry, kernel: str, layer: Mapping[str, tuple[np.ndarray, np.ndarray]], config: DecoderConfig
) -> np.ndarray:
    """[out r]: of kernels that are one matrix there, zeros where the others' outputs are."""
    own = layer[kernel][1]
    if KERNELS[kernel].inputs > 1:
        return own.T
    return entry.to_theirs(tuple(b if k == kernel else np.zeros_like(b) for k, (_, b) in layer.items()), config)


def _kernel_entries(decoder: DecoderConfig) -> dict[str, Entry]:
    """The tensor of each kernel that layers of this family may have."""
    table = entries(decoder.family)
    paths = {kernel: f"layers.{module}.{kernel}" for kernel, (module, _, _) in KERNELS.items()}
    return {kernel: table[path] for kernel, path in paths.items() if path in table}


def _module(entry: Entry) -> str:
    """The name by which PEFT knows the module of a tensor, such as q_proj."""
    return entry.name.split(".")[-2]


def _on_host(x: jax.Array) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
