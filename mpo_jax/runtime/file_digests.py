"""sha256 of files, computed once: kept in memory and on disk by path, size, inode and times of the last change."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from mpo_jax.untrusted import loads

SETTLED_NS = 2 * 10**9
"""How long a file must have been left alone before its digest is kept: some file systems count time in steps of two
seconds, so a file that is written again within one step looks unchanged."""

_known: dict[tuple[str, ...], str] = {}


def file_digest(path: Path, cache: Path | None = None) -> str:
    """Hex sha256 of a file's content, links followed.

    Args:
      cache: folder of digests from earlier runs; None: this process's own alone. Several processes may share it. A
        damaged entry is a miss, and a folder that cannot be written is no error.

    Raises:
      OSError: if the file cannot be read.
    """
    path = path.resolve()
    state, begin = _state(path), time.time_ns()
    kept = None if cache is None else cache / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    found = _known.get(state) or (None if kept is None else _read(kept, state))
    if found is None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if _state(path) != state or begin - int(state[-1]) < SETTLED_NS:
            return found
        if kept is not None:
            _write(kept, state, found)
    _known[state] = found
    return found


def _state(path: Path) -> tuple[str, ...]:
    """What changes when a file is written or replaced.

    The time of the inode's change, in nanoseconds, comes last: unlike that of the content, no tool can set it back.
    """
    s = path.stat()
    return str(path), *map(str, (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))


def _read(entry: Path, state: tuple[str, ...]) -> str | None:
    try:
        kept = loads(entry.read_bytes())
        digest = kept["sha256"]
        return digest if tuple(kept["state"]) == state and len(bytes.fromhex(digest)) == 32 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(entry: Path, state: tuple[str, ...], digest: str) -> None:
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: other processes may write the same entry
        descriptor, temporary = tempfile.mkstemp(dir=entry.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"state": state, "sha256": digest}, file)
            os.replace(temporary, entry)
        except OSError:
            os.unlink(temporary)
            raise
