"""A GGUF file: metadata and tensors, read by the gguf package and checked here.

Imported only where a GGUF file is named, so that everything else works without that package.
"""

import reprlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.errors import UserError

try:
    import gguf
except ModuleNotFoundError as error:
    raise UserError("a GGUF file is read by the package gguf, which is not installed: pip install gguf") from error


TEXT, NUMBER, ID, TEXTS, NUMBERS = "a text", "a number", "a token's id", "a list of texts", "a list of numbers"
KINDS = {
    "architecture": TEXT, "model": TEXT, "pre": TEXT, "chat_template": TEXT, "scaling.type": TEXT,
    "scaling.factor": NUMBER, "tokens": TEXTS, "merges": TEXTS, "token_type": NUMBERS, "scores": NUMBERS,
    "token_id": ID,
}  # fmt: skip
"""What values are, by how their keys end; those of other keys are checked where they are used."""


def _is(value: Any, kind: str) -> bool:
    if kind in (TEXTS, NUMBERS):
        return isinstance(value, list) and all(_is(one, TEXT if kind == TEXTS else NUMBER) for one in value)
    if kind == TEXT:
        return isinstance(value, str)
    return not isinstance(value, bool) and isinstance(value, int if kind == ID else int | float)


class _Reader(gguf.GGUFReader):
    """The package's reader, except that it stops where the file does: it would run on over an array's stated length."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < int(count):
            raise ValueError(f"it ends at byte {len(self.data)}, inside what it says it holds")
        return values


class GgufFile:
    """An open file; tensors stay on disk until they are read.

    Raises:
      UserError: if the file is not a whole GGUF file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = _Reader(path)
            self.fields = dict(reader.fields)
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        # the reader trusts the offsets and counts that it finds, so a damaged file fails anywhere
        except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: corrupt or incomplete GGUF file: {reason}") from error

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value, lists as lists; `default` where the file has none."""
        field = self.fields.get(key)
        if field is None:
            return default
        try:
            value = field.contents()
        except (ValueError, IndexError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: corrupt GGUF metadata at {key}: {error}") from error
        kind = next((kind for end, kind in KINDS.items() if key.endswith((f".{end}", f"_{end}"))), None)
        if kind is not None and not _is(value, kind):
            raise UserError(f"{self.path}: the GGUF metadata {key} must be {kind}, not {reprlib.repr(value)}")
        return value

    def require(self, key: str) -> Any:
        """A metadata value that must be there."""
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.path}: the GGUF metadata has no {key}")
        return value

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32, rows first as in PyTorch, dequantised where it is quantised."""
        tensor = self.tensors[name]
        try:
            # damaged scales overflow, which is told below
            with np.errstate(all="ignore"):
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
            values = np.asarray(values, np.float32).reshape(tuple(int(n) for n in reversed(tensor.shape)))
        except (ValueError, NotImplementedError) as error:
            kind = tensor.tensor_type.name
            raise UserError(f"{self.path}: cannot dequantise tensor {name} ({kind}): {error}") from error
        if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise UserError(f"{self.path}: tensor {name} holds infinite or undefined values: fetch the file again")
        return values


@lru_cache(maxsize=2)
def open_gguf(path: Path) -> GgufFile:
    """The file, parsed once for its tokenizer and its weights."""
    return GgufFile(path)
