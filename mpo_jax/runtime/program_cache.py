"""The compilation cache on disk, which a process that is killed as it writes cannot damage.

JAX writes an entry in place and never replaces it. A kill in mid-write leaves the beginning of an entry, at which every
later start warns and compiles again. Another process that reads meanwhile sees such a beginning too.

Programs of several CPU devices are compiled at every start. XLA lets a device run what does not depend on each other in
any order, except for collectives: compiled, a program keeps them in one order on all devices. That order is written to
the cache for each loop on its own, so a program that was read from there may begin with a loop's collective on one
device and with one beside the loop on another, and then they wait for each other for ever (jaxlib 0.10.2).
"""

import os
import secrets
import time
from pathlib import Path
from typing import Any

import jax

# JAX has no public way to give it another cache
from jax._src import compilation_cache
from jax._src.lru_cache import LRUCache

SUFFIX = "-cache"
"""Of an entry's file: JAX's own, so that its caches and these read each other's entries."""
TEMPORARY = ".tmp"
_read, _write = compilation_cache.get_executable_and_time, compilation_cache.put_executable_and_time
"""JAX's own functions, by which it reads and writes entries."""
ABANDONED_S = 24 * 3600.0
"""Age at which a temporary file is one that a killed process left."""


class WholeEntries(LRUCache):
    """JAX's cache with entries that appear whole or not at all; a damaged one is absent, and is replaced.

    Where JAX evicts entries (`jax_compilation_cache_max_size`), it writes in place under its lock, which a kill ends
    too. Such entries are found damaged when they are read.
    """

    def get(self, key: str) -> bytes | None:
        """The entry, or None if there is none that can be read. The check costs a millisecond for 50 kB."""
        value = super().get(key)
        if value is None:
            return None
        try:
            compilation_cache.decompress_executable(value)
        except Exception:  # each compressor has its own
            self._entry(key).unlink(missing_ok=True)
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        """Writes a file beside the entry's and renames it. Of several processes' entries the last stays."""
        if self.eviction_enabled:
            super().put(key, value)
            return
        folder = Path(os.fspath(self.path))
        _remove_abandoned(folder)
        temporary = folder / f".{secrets.token_hex(8)}{TEMPORARY}"
        try:
            # not flushed to disk: after a loss of power the entry may be damaged, which `get` finds
            temporary.write_bytes(value)
            temporary.replace(self._entry(key))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _entry(self, key: str) -> Path:
        return Path(os.fspath(self.path)) / f"{key}{SUFFIX}"


def _remove_abandoned(folder: Path) -> None:
    now = time.time()
    for file in folder.glob(f".*{TEMPORARY}"):
        try:
            if now - file.stat().st_mtime > ABANDONED_S:
                file.unlink()
        except FileNotFoundError:
            # another process has renamed or removed it
            continue


def _read_unless_several(cache_key: str, compile_options: Any, backend: Any, executable_devices: Any) -> Any:
    """JAX's `get_executable_and_time`, for which programs of several CPU devices are absent."""
    if backend.platform == "cpu" and len(executable_devices) > 1:
        return None, None
    return _read(cache_key, compile_options, backend, executable_devices)


def _write_unless_several(cache_key: str, module_name: str, executable: Any, backend: Any, compile_time: int) -> None:
    """JAX's `put_executable_and_time`, which leaves out programs of several CPU devices."""
    several = len(executable.local_devices()) > 1 or jax.process_count() > 1
    if backend.platform != "cpu" or not several:
        _write(cache_key, module_name, executable, backend, compile_time)


def use(folder: str) -> None:
    """Makes `folder` JAX's compilation cache, with `WholeEntries` and without programs of several CPU devices.

    An address such as gs://BUCKET/FOLDER is left to JAX's own cache, since objects there appear whole or not at all. A
    cache that this process has used already is left as it is.
    """
    address = "://" in folder
    if not address:
        folder = str(Path(folder).expanduser())
    # names that JAX looks up when a program is compiled
    compilation_cache.LRUCache = LRUCache if address else WholeEntries  # type: ignore[misc]
    compilation_cache.get_executable_and_time = _read_unless_several
    compilation_cache.put_executable_and_time = _write_unless_several
    jax.config.update("jax_compilation_cache_dir", folder)
