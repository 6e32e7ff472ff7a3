"""adapter_model.safetensors of PEFT's adapter folders, in and out; adapter_config.json is peft_config's.

Such a folder is read as a whole model, its base with the adapters folded in, one tensor at a time.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from mpo_jax.errors import UserError
from mpo_jax.models.adapter import SUFFIX
from mpo_jax.models.hf.found import SCORE
from mpo_jax.models.hf.peft_config import CONFIG, Settings, kernel_entries
from mpo_jax.models.hf.safetensors_folder import save_tensors
from mpo_jax.models.hf.table import Entry, entries
from mpo_jax.models.hf.weights import Tensors
from mpo_jax.models.kernels import KERNELS
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime.processes import wait
from mpo_jax.types import Tree

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


class AdaptedTensors:
    """A base model's tensors with adapters folded in: W + scale B A, in float32 whatever W's type is.

    Tensors that the adapter's folder holds whole (PEFT's modules_to_save, such as a classifier's head) replace the
    base's.

    Raises:
      UserError: a missing or broken file, or tensors that no kernel of the base has a place for.
    """

    def __init__(self, folder: Path, settings: Settings, base: Tensors, decoder: DecoderConfig):
        self.where, self._base, self._settings = str(folder), base, settings
        self._lm_head, self._embedding = (entries(decoder.family)[name].name for name in ("head", "embedding"))
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
        if not held:
            raise UserError(
                f"{self._file} holds no adapters, so the model would be its base unchanged: export it again"
            )
        self._pairs: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        for name in held:
            self._take(name)
        self._check_pairs(held)
        self._check_targets()
        if decoder.tie_embeddings:
            self._check_tied()
        self._shapes = {target: held[name] for target, name in self._whole.items()}

    def _take(self, name: str) -> None:
        """Finds the base's tensor that one of the adapter's tensors is for."""
        target = name.removeprefix(PREFIX).replace(".default", "").replace(".modules_to_save", "")
        stem, dot, part = target.removesuffix(".weight").rpartition(".lora_")
        # adapters of an embedding have other names in PEFT, and another layout
        if dot and part in ("A", "B") and f"{stem}.weight" in self._base.names() - {self._embedding}:
            target = f"{stem}.weight"
            other = self._pairs.setdefault(target, {}).setdefault(part, name)
        elif not dot and (target in self._base.names() | {SCORE, self._lm_head}):
            other = self._whole.setdefault(target, name)
        else:
            raise UserError(
                f"{self._file}: tensor {name} is for no tensor of the base model {self._settings.base}: it belongs to "
                "another model, or to a method that is not supported"
            )
        if other == name and target in self._whole and target in self._pairs:
            other = min(self._pairs[target].values()) if name == self._whole[target] else self._whole[target]
        if other != name:
            raise UserError(f"{self._file}: {other} and {name} are both for {target}: remove what is not meant")

    def _check_tied(self) -> None:
        """Checks what a tied model is given in place of its embedding, which is its head too."""
        head = self._whole.pop(self._lm_head, None)
        given = self._whole.get(self._embedding)
        if (given or head) and not self._settings.ties:
            raise UserError(
                f"{self._file} replaces {given or head}, but the base model's embedding and head are one tensor, and "
                "in PEFT one of them stays as it was (ensure_weight_tying): merge the adapter with PEFT first"
            )
        if head and not (given and np.array_equal(self._stored(head), self._stored(given))):
            raise UserError(
                f"{self._file}: {CONFIG} says that {head} and the embedding are one tensor (ensure_weight_tying), but "
                "they differ: the file is damaged"
            )

    def _check_pairs(self, held: dict[str, tuple[int, ...]]) -> None:
        for target, pair in self._pairs.items():
            if set(pair) != {"A", "B"}:
                raise UserError(f"{self._file}: {target} has lora_{min(pair)} alone: A and B belong together")
            a, b = held[pair["A"]], held[pair["B"]]
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
                raise UserError(f"{self._file}: {target} has A {list(a)} and B {list(b)}, which do not multiply")
            if a[0] != (rank := self._settings.rank_of(target.removesuffix(".weight"))):
                raise UserError(
                    f"{self._file}: the adapters of {target} have rank {a[0]}, but {CONFIG} says {rank} (r, "
                    "rank_pattern): the two files do not belong together"
                )

    def _check_targets(self) -> None:
        """Checks that there are adapters of the modules that the configuration names, and of no others."""
        wanted = self._settings.targets
        if wanted is None:
            return
        meant = {
            name for name in self._base.names() if name.endswith(".weight") and wanted(name.removesuffix(".weight"))
        }
        # a classifier has no head of a language model, even if its base does
        missing = meant - set(self._pairs) - {self._lm_head}
        for name in sorted(missing or set(self._pairs) - meant):
            fault = "has no adapters of" if missing else "has adapters of"
            raise UserError(
                f"{self._file} {fault} {name}, but {CONFIG} {'names' if missing else 'does not name'} it in "
                "target_modules: the two files do not belong together"
            )

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
        scale = self._settings.scale(name.removesuffix(".weight"))
        return kernel.astype(np.float32) + np.float32(scale) * (b @ a)

    def _stored(self, name: str) -> np.ndarray:
        try:
            with safe_open(self._file, framework="np") as file:
                tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._file}: cannot read tensor {name}: {error}") from error
        # bfloat16 is no number type of NumPy's own
        if tensor.dtype.kind in "biuc":
            raise UserError(f"{self._file}: tensor {name} has type {tensor.dtype}, not floating-point numbers")
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise UserError(f"{self._file}: tensor {name} has values that are not finite numbers: it is damaged")
        return tensor


def save_weights(folder: Path, trained: Tree, config: DecoderConfig) -> None:
    """Writes adapter_model.safetensors, float32. Of several processes, all must call this and the first one writes.

    Args:
      trained: adapters, and a value head if there is one.
    """
    tensors = dict(_tensors(trained, config))
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, folder / WEIGHTS)
    wait(f"process 0 writes {WEIGHTS}")


def _tensors(trained: Tree, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by PEFT's name, in its layout: A [r in], B [out r]."""
    table = kernel_entries(config)
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


def _on_host(x: jax.Array) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
