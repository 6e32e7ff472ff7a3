"""Files that are written whole or not at all."""

import codecs
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, [json.dumps(value, indent=2, ensure_ascii=False), "\n"])


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, whole or not at all."""
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, parts: Iterable[str], *, encoding: str = "utf-8") -> None:
    """Writes the parts one after the other, whole or not at all; line ends stay as they are."""
    write_bytes(path, codecs.iterencode(parts, encoding))


def write_bytes(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file whole or not at all: to a neighbour that is flushed to disk and then renamed; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
