"""adapter_config.json of PEFT's adapter folders, in and out: what is adapted, and the base model that is meant."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_jax.errors import UserError
from mpo_jax.models.adapter import Adapter
from mpo_jax.models.hf.hub import is_hub_id, local_model, on_this_machine
from mpo_jax.models.hf.table import Entry, entries
from mpo_jax.models.kernels import KERNELS
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.types import Head
from mpo_jax.untrusted import read_json

CONFIG = "adapter_config.json"
WHOLE = ("model.safetensors", "model.safetensors.index.json")
"""What a model of its own has."""
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
"""Settings of PEFT with the values that are understood; other ways to begin change the base model's weights too."""
TRAINING = (
    "peft_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "modules_to_save", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size", "task_type",
)  # fmt: skip
"""Settings that say how the adapters were trained, or what their tensors say too."""
SOME = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Those of them by which not every module of a name in target_modules is adapted."""
ABSENT = (None, False, [], {})
"""Values by which a setting is not used."""


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says.

    Attributes:
      base: folder or hub id, with its revision, of the model that is adapted.
      modules: names of the adapted modules; none where they are given otherwise than by a list.
      some: whether only some layers or modules of these names are adapted.
      rank: of adapters.
      alpha: of adapters.
      rslora: whether B A is divided by the root of the rank.
      ties: whether a tied head follows an embedding that the adapter's folder replaces.
      ranks, alphas: those of modules that have another, by the end of the module's name.
    """

    base: str
    modules: tuple[str, ...]
    some: bool
    rank: int
    alpha: float
    rslora: bool
    ties: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """The rank of a module of this dotted name."""
        return int(_own(self.ranks, module, self.rank))

    def scale(self, module: str) -> float:
        """The factor of B A for a module of this dotted name."""
        return Adapter(self.rank_of(module), _own(self.alphas, module, self.alpha), (), self.rslora).scale

    @property
    def targets(self) -> Callable[[str], bool] | None:
        """Whether a module of this dotted name is adapted; None where the names alone do not tell."""
        if not self.modules or self.some:
            return None
        return lambda module: any(module == name or module.endswith(f".{name}") for name in self.modules)

    def adapter(self, decoder: DecoderConfig) -> Adapter:
        """The adapter of a model like this one, which is made here."""
        table = kernel_entries(decoder)
        targets = tuple(kernel for kernel, entry in table.items() if module_name(entry) in self.modules)
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
    """The folder or GGUF file that says what a model is: an adapter's base, else the model's own.

    Raises:
      UserError: as `base_of`.
    """
    return _chain(path)[-1]


def base_of(folder: Path) -> Path:
    """The folder or GGUF file of the model that an adapter folder changes; it may hold adapters too.

    Raises:
      UserError: if there is none, or it is the adapter itself.
    """
    return _chain(folder)[1]


def _chain(path: Path) -> list[Path]:
    """A model and, of adapters, the models under it."""
    chain = [path]
    while is_adapter(path := chain[-1]):
        base = read_settings(path).base
        place = f"{path / CONFIG}: base_model_name_or_path={base}"
        if on_this_machine(base) is None and not is_hub_id(base):
            raise UserError(
                f"{place}: no such folder or file, and no hub id, but the adapter is of use on that model alone: "
                "correct the path, or export a whole model in its place (mpo export --merge)"
            )
        chain.append(local_model(base))
        if chain[-1].resolve() in [link.resolve() for link in chain[:-1]]:
            raise UserError(f"{place} leads back to {chain[-1]}, which has no weights but adapters: name a whole model")
    return chain


def read_settings(folder: Path) -> Settings:
    """The settings of an adapter folder.

    Raises:
      UserError: a broken file, no base model, or a method that is not plain LoRA; names file and key.
    """
    path = folder / CONFIG
    raw = read_json(path)
    if (kind := raw.get("peft_type")) != "LORA":
        raise UserError(f"{path}: peft_type={kind!r} is not supported: only LORA is")
    given = {key: value for key, value in raw.items() if value not in ABSENT and key not in TRAINING}
    base, revision = given.pop("base_model_name_or_path", None), given.pop("revision", None)
    if not isinstance(base, str):
        raise UserError(f"{path}: base_model_name_or_path is missing: it names the model that the adapter changes")
    if revision is not None and on_this_machine(base) is None:
        base = f"{base.partition('@')[0]}@{revision}"
    modules = given.pop("target_modules", ())
    settings = Settings(
        base=base,
        modules=tuple(map(str, modules)) if isinstance(modules, list) else (),
        some=any(raw.get(key) not in ABSENT for key in SOME),
        rank=int(_number(path, "r", given.pop("r", raw.get("r")), whole=True)),
        # PEFT takes 0 too, which is among the values of absence
        alpha=_number(path, "lora_alpha", given.pop("lora_alpha", raw.get("lora_alpha"))),
        rslora=_flag(path, "use_rslora", given.pop("use_rslora", False)),
        ties=_flag(path, "ensure_weight_tying", given.pop("ensure_weight_tying", False)),
        ranks=_by_module(path, "rank_pattern", given.pop("rank_pattern", {}), whole=True),
        alphas=_by_module(path, "alpha_pattern", given.pop("alpha_pattern", {})),
    )
    for key, value in given.items():
        if value not in PLAIN.get(key, ()):
            raise UserError(f"{path}: {key}={value!r} is not supported: merge the adapter with PEFT first")
    return settings


def _number(path: Path, key: str, value: Any, *, whole: bool = False) -> float:
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or (whole and value < 1):
        raise UserError(f"{path}: {key}={value!r} is not a {'whole number above 0' if whole else 'number'}")
    return value


def _flag(path: Path, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key}={value!r} is neither true nor false")
    return value


def _by_module(path: Path, key: str, pattern: Any, *, whole: bool = False) -> dict[str, float]:
    """Numbers by module. PEFT's keys are regular expressions; of a stranger's, only names with dots are run."""
    if not isinstance(pattern, dict):
        raise UserError(f"{path}: {key}={pattern!r} must give numbers by module")
    for name, number in pattern.items():
        _number(path, f"{key}.{name}", number, whole=whole)
        if not re.fullmatch(r"[\w.]+", name):
            raise UserError(
                f"{path}: {key} has {name!r}: {number!r}, but only numbers by a module's name are supported: merge the "
                "adapter with PEFT first"
            )
    return dict(pattern)


def _own(numbers: Mapping[str, float], module: str, default: float) -> float:
    """The number of a module, by the first name that it ends with; as in PEFT, a dot stands for any character."""
    own = (number for end, number in numbers.items() if re.fullmatch(rf"(.*\.)?{end}", module))
    return next(own, default)


def check_targets(adapter: Adapter, decoder: DecoderConfig) -> None:
    """Raises UserError where PEFT adapts several kernels by one pair of matrices, and only some of them are adapted."""
    table = kernel_entries(decoder)
    for entry in {table[kernel].name: table[kernel] for kernel in adapter.targets}.values():
        together = [kernel for kernel, other in table.items() if other.name == entry.name]
        if not set(together) <= set(adapter.targets):
            names = ", ".join(f"{kernel}_proj" for kernel in together)
            raise UserError(
                f"model.adapter.targets: {names} are one matrix in a {decoder.family} model ({module_name(entry)}): "
                "name all of them or none"
            )


def save_settings(folder: Path, adapter: Adapter, decoder: DecoderConfig, *, base: str, head: Head) -> None:
    """Writes adapter_config.json."""
    table = kernel_entries(decoder)
    modules = [module_name(table[kernel]) for kernel in adapter.targets]
    # of kernels that are one matrix there, A and B are put together: more ranks, and an alpha that keeps the factor
    parts = {module: modules.count(module) for module in modules if modules.count(module) > 1}
    alpha = _whole_if_it_is(adapter.alpha)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head == "value" else "CAUSAL_LM",
        **_naming(base),
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
    values = read_json(path) | _naming(base)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _naming(base: str) -> dict[str, str | None]:
    """How PEFT names a base model: a hub id and its revision apart."""
    name, _, revision = base.partition("@") if on_this_machine(base) is None and is_hub_id(base) else (base, "", "")
    return {"base_model_name_or_path": name, "revision": revision or None}


def _whole_if_it_is(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


def kernel_entries(decoder: DecoderConfig) -> dict[str, Entry]:
    """The tensor of each kernel that layers of this family may have."""
    table = entries(decoder.family)
    paths = {kernel: f"layers.{module}.{kernel}" for kernel, (module, _, _) in KERNELS.items()}
    return {kernel: table[path] for kernel, path in paths.items() if path in table}


def module_name(entry: Entry) -> str:
    """The name by which PEFT knows the module of a tensor, such as q_proj."""
    return entry.name.split(".")[-2]
