"""Atomic writes: a file is written completely or not at all. And files that another host has written."""

import codecs
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpo_jax.errors import UserError

VISIBLE_S = 180.0
"""How long a file on a shared file system may take to appear. NFS, the slowest of them, lets a client remember for 60 s
(acdirmax) that a file was missing or shorter; three times that is a fault."""


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


def wait_for_files(folder: Path, sizes: Mapping[str, int], *, timeout_s: float = VISIBLE_S) -> None:
    """Returns once files that another host has written are all here, whole.

    Args:
      sizes: bytes of each file, by its name in the folder.

    Raises:
      UserError: if one has not appeared in time.
    """
    begin = time.monotonic()
    while missing := [name for name, size in sizes.items() if _size(folder / name) != size]:
        if time.monotonic() - begin > timeout_s:
            name = missing[0]
            found = _size(folder / name)
            seen = "is not there" if found is None else f"has {found} of {sizes[name]} bytes"
            raise UserError(
                f"{folder / name} {seen} on {socket.gethostname()}, {timeout_s:g} s after process 0 wrote it "
                f"({len(missing)} of {len(sizes)} files are missing). All hosts need one workdir on a file system that "
                "they share, or runtime.bucket"
            )
        # a client that reads a folder asks the server again whether a name exists
        for stale in (folder.parent, folder, (folder / missing[0]).parent):
            with contextlib.suppress(OSError):
                os.listdir(stale)
        time.sleep(0.2)


def _size(path: Path) -> int | None:
    """Bytes of a file; None if it cannot be seen."""
    try:
        return path.stat().st_size
    except OSError:
        return None
