"""A cache of answers on disk, keyed by the request: no call is paid for twice."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mpo_jax.errors import UserError
from mpo_jax.untrusted import loads

FORMAT = 1


def content_key(*parts: str) -> str:
    """Sha256, in hex, of texts, each preceded by its length, so that no two lists of texts collide."""
    digest = hashlib.sha256(f"{FORMAT}".encode())
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(f"|{len(encoded)}|".encode() + encoded)
    return digest.hexdigest()


class Cache:
    """A file of JSON lines {key, text, ...}. A line is on disk when `put` returns, and several processes may write.

    Lines that cannot be read, such as the last one of a killed process, are skipped with a warning.

    Raises:
      UserError: if the file cannot be read or written.
    """

    def __init__(self, path: Path, console: Console):
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                os.close(self._file)
                raise OSError(errno.EINVAL, "it is no file, but a pipe, a socket or a device")
            whole = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot use the cache {path}: {error.strerror or error}; name another folder: --cache"
            ) from error
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = loads(line)
                if not isinstance(record["text"], str):
                    raise TypeError
                self._found[record["key"]] = record
            except (ValueError, TypeError, KeyError):
                if line.strip():
                    console.print(
                        f"[yellow]{escape(str(path))}:{number}: a broken line is left out[/yellow]", soft_wrap=True
                    )
        if whole and not whole.endswith(b"\n"):
            os.write(self._file, b"\n")

    def get(self, key: str) -> dict[str, Any] | None:
        return self._found.get(key)

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Stores a record, in one write of one line, so that lines of several processes do not mix."""
        record = {"key": key, **record}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if os.write(self._file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fsync(self._file)
        self._found[key] = record

    def close(self) -> None:
        os.close(self._file)
