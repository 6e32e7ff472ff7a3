"""Atomic writes: a file is written completely or not at all."""

import codecs
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, [json.dumps(value, indent=2, ensure_ascii=False), "\n"])


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, atomically."""
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, parts: Iterable[str], *, encoding: str = "utf-8") -> None:
    """Writes the parts one after the other, atomically; line ends are kept."""
    write_bytes(path, codecs.iterencode(parts, encoding))


def write_bytes(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file atomically: a temporary file beside it is flushed to disk and renamed. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
