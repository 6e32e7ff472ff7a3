"""The safetensors files of a model folder: which of them are read, and their tensors, checked. No torch, no pickle."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpo_jax.errors import UserError
from mpo_jax.models.hf.table import TABLE
from mpo_jax.untrusted import read_json

EMBEDDINGS = tuple(entry.name for entry in TABLE if "embedding" in entry.paths)
"""The embedding's names, of which a folder has one."""
WRITTEN = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types that are written here, by their names in safetensors files."""
READ = ("F64", "F32", "F16", "BF16")
"""Types that are read; integers and 8-bit floats are quantised weights, whose scales are other tensors."""
CHUNK = 2**22
"""Numbers that are looked at together, so that a check of a tensor takes little memory beside it."""


class SafetensorsFolder:
    """The safetensors files of a folder, single or sharded with an index.

    Raises:
      UserError: a missing or broken file or index.
    """

    def __init__(self, folder: str | Path):
        self.where = str(folder)
        self._files = _tensor_files(Path(folder))
        self._headers: dict[Path, dict[str, tuple[tuple[int, ...], str]]] = {}

    def names(self) -> set[str]:
        return set(self._files)

    def check(self) -> None:
        for path in sorted(set(self._files.values())):
            held = self._header(path)
            if absent := sorted(name for name, place in self._files.items() if place == path and name not in held):
                raise UserError(f"{path}: the index says that tensor {absent[0]} is here, but it is not")
            for name in held:
                if self._files.get(name) == path:
                    self._check_type(name)

    def read(self, name: str) -> np.ndarray:
        self._check_type(name)
        path = self._files[name]
        try:
            with safe_open(path, framework="np") as file:
                tensor = file.get_tensor(name)
        # KeyError and AttributeError: of types that NumPy has no number type for
        except (SafetensorError, OSError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: cannot read tensor {name}: {error}") from error
        if not is_finite(tensor):
            raise UserError(
                f"{path}: tensor {name} holds NaN or infinity, so whatever is computed with it means nothing: the file "
                "is damaged, or its training failed. Fetch it again, or use an earlier checkpoint"
            )
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return self._held(name)[0]

    @property
    def notes(self) -> list[str]:
        """Which files are left alone, for the log."""
        return _left_alone(Path(self.where), set(self._files.values()))

    def _check_type(self, name: str) -> None:
        if (kind := self._held(name)[1]) not in READ:
            raise UserError(
                f"{self._files[name]}: tensor {name} has type {kind}, not floating-point numbers ({', '.join(READ)})"
            )

    def _held(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape and type, from the header of its file."""
        path = self._files[name]
        held = self._header(path).get(name)
        if held is None:
            raise UserError(f"{path}: the index says that tensor {name} is here, but it is not")
        return held

    def _header(self, path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every tensor in a file; opening it compares the sizes there with the file's."""
        if path not in self._headers:
            try:
                with safe_open(path, framework="np") as file:
                    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                    self._headers[path] = {n: (tuple(one.get_shape()), one.get_dtype()) for n, one in slices.items()}
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: broken safetensors file: {error}") from error
        return self._headers[path]

    @property
    def dtype(self) -> str:
        """The embedding's, from the file's header: config.json may say another; float32 for types that are not written.

        Raises:
          UserError: if there is no embedding, or its file cannot be read.
        """
        name = next((name for name in EMBEDDINGS if name in self._files), None)
        if name is None:
            raise UserError(f"{self.where}: there is no tensor {' or '.join(EMBEDDINGS)}")
        return WRITTEN.get(self._held(name)[1], "float32")


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file with the permissions of any other new file: the library's own are the owner's alone."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    # the process's umask can be read only by setting it, for all threads
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    path.chmod(stat.S_IMODE(probe.stat().st_mode))
    probe.unlink()


def is_finite(tensor: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, found from the bits of their exponents: of bfloat16 that is far faster."""
    exponents = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "float16": 0x1F << 10, "bfloat16": 0xFF << 7}
    ones = exponents[str(tensor.dtype)]
    unsigned = np.dtype(f"u{tensor.dtype.itemsize}")
    bits = np.ascontiguousarray(tensor).reshape(-1).view(unsigned)
    mask = unsigned.type(ones)
    return all((bits[i : i + CHUNK] & mask).max() != mask for i in range(0, bits.size, CHUNK))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return _indexed_files(index, single)
    if not os.path.isfile(single):
        raise UserError(f"no weights in {folder}: {_missing(folder)}")
    try:
        with safe_open(single, framework="np") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{single}: broken safetensors file: {error}") from error


def _indexed_files(index: Path, single: Path) -> dict[str, Path]:
    folder = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: broken index: weight_map must give the file of every tensor")
    files = {name: folder / file for name, file in weight_map.items()}
    for path in sorted(set(files.values())):
        if path.parent != folder or path.name in ("", ".", "..") or not _stays_in(path, folder):
            raise UserError(
                f"{index} names {path}, which is outside the folder, or a link that leads out of it: put the file "
                "itself into the folder"
            )
        if path.suffix != ".safetensors":
            raise UserError(f"{index} names {path.name}, which is no safetensors file: other files are not read")
    if os.path.isfile(single) and single not in files.values():
        raise UserError(
            f"{folder} holds two sets of weights, {single.name} and the files that {index.name} names: remove the "
            "one that is not meant"
        )
    if absent := sorted({file.name for file in files.values() if not os.path.isfile(file)}):
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(f"{index} names {absent[0]}{more}, which is not there: fetch the model's files again")
    return files


def _stays_in(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder itself, or a link within it or to the blobs of the same snapshot of a hub cache."""
    try:
        # realpath, since resolve raises for links in a circle
        real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    except ValueError:  # a name with a zero byte
        return False
    repository = home.parent.parent
    in_cache = home.parent.name == "snapshots" and real.parent == repository / "blobs"
    return real.parent == home or in_cache


def _missing(folder: Path) -> str:
    """Why a folder has no weights, and what it has instead."""
    said = "neither model.safetensors nor model.safetensors.index.json is there"
    if others := sorted(file.name for file in folder.glob("*.safetensors")):
        if consolidated := [name for name in others if name.startswith("consolidated")]:
            return (
                f"{said} ({consolidated[0]} is in its author's own layout and is not read: fetch the Hugging Face one)"
            )
        return f"{said} ({', '.join(others[:3])} may hold them: name the right one model.safetensors)"
    if pickled := sorted(file.name for file in folder.glob("*.bin")):
        return f"{said} ({pickled[0]} is pickled and is not read: convert it to safetensors)"
    return said


def _left_alone(folder: Path, read: set[Path]) -> list[str]:
    """A note on safetensors files beside those that are read, since another program may take them for the model."""
    layouts = ("consolidated", "adapter_")
    others = sorted(file.name for file in set(folder.glob("*.safetensors")) - read if not file.name.startswith(layouts))
    if not others:
        return []
    files = sorted(file.name for file in read)
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return [f"the weights are read from {files[0]}{more}; {', '.join(others[:3])} beside it is left alone"]
