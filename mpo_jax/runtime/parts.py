"""Finished work of a pass over many rows, kept on disk part by part, so that a killed pass goes on from there.

A pass's folder holds part files and a manifest. A part is written under another name, flushed and renamed, and never
changed. The manifest is replaced after each part. It says what the pass is, and the size and checksum of every whole
part, so a part that is torn, damaged or of another pass is never read.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from rich.markup import escape

from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_bytes, write_json
from mpo_jax.runtime.processes import is_main, share
from mpo_jax.untrusted import loads

FOLDER = "parts"
"""The folder of all passes in the folder of a stage."""
MANIFEST = "manifest.json"
FORMAT = 1
RECORD = {"file", "rows", "bytes", "sha256"}
"""What the manifest says of each part."""

Entry = Mapping[str, np.ndarray]
"""Named arrays: the results of one batch, or whatever else is finished at once."""

Send = Callable[[Path, Sequence[Path]], None]
"""Copies new files of a pass's folder elsewhere, and after them the manifest."""


class Parts:
    """The entries of one pass. Process 0 reads and writes; the others get from it what was there.

    Args:
      folder: the pass's folder.
      identity: what the results depend on, as JSON; parts of another identity are removed.
      minutes: time between two parts; 0: every entry becomes a part.
      send: called in process 0 after each part.

    Attributes:
      entries: what earlier runs of the pass left, in the order in which it was finished; whoever reads them empties the
        list.
      rows: the number of rows in `entries`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, minutes: float, send: Send | None = None):
        self._folder, self._seconds, self._send = folder, 60 * minutes, send
        self._identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        self._pending: list[Entry] = []
        self._pending_rows = 0
        self._pool = ThreadPoolExecutor(1, "parts")
        self._writing: Future[None] | None = None
        whole = self._whole() if is_main() else []
        self._records: list[dict[str, Any]] = json.loads(share(json.dumps(whole).encode()))
        self.entries: list[Entry] = []
        for record in self._records:
            # one file's bytes at a time
            self.entries += _unpack(share((folder / record["file"]).read_bytes() if is_main() else b""))
        self.rows = sum(record["rows"] for record in self._records)
        self._saved_at = time.monotonic()

    def add(self, entry: Entry, rows: int) -> None:
        """Takes finished work of that many rows; writes what there is if the last part is old enough."""
        if not is_main():
            return
        self._pending.append(entry)
        self._pending_rows += rows
        if time.monotonic() - self._saved_at >= self._seconds:
            self._start_writing()

    def flush(self) -> None:
        """Returns once everything is on disk and sent."""
        self._start_writing()
        self._wait()

    def close(self) -> None:
        """Ends the writing thread; what was not flushed is dropped."""
        self._pool.shutdown()

    def _start_writing(self) -> None:
        """Writes in a thread, so that the devices wait neither for the disk nor for the network."""
        self._wait()
        if self._pending:
            entries, rows, self._pending, self._pending_rows = self._pending, self._pending_rows, [], 0
            self._writing = self._pool.submit(self._write, entries, rows)
        self._saved_at = time.monotonic()

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, entries: Sequence[Entry], rows: int) -> None:
        number = 1 + int(Path(self._records[-1]["file"]).stem) if self._records else 0
        path, data = self._folder / f"{number:05d}.safetensors", _pack(entries)
        write_bytes(path, [data])
        self._records.append({"file": path.name, "rows": rows, **_fingerprint(data)})
        self._write_manifest()
        if self._send is not None:
            self._send(self._folder, [path])

    def _write_manifest(self) -> None:
        write_json(self._folder / MANIFEST, {"identity": self._identity, "parts": self._records})

    def _whole(self) -> list[dict[str, Any]]:
        """The records of this pass's whole parts; everything else is removed from the folder."""
        if not self._folder.is_dir():
            return []
        recorded, whole = self._recorded(), []
        for record in recorded:
            path = self._folder / record["file"]
            if not path.is_file():
                _drop(path, "is missing")
            elif _fingerprint(path.read_bytes()).items() <= record.items():
                whole.append(record)
            else:
                _drop(path, "is damaged")
        named = {record["file"] for record in recorded}
        for path in sorted(self._folder.iterdir()):
            if path.name.startswith("."):
                # a file that a kill left half-written
                path.unlink()
            elif path.name not in named and path.name != MANIFEST:
                _drop(path, "is not in the manifest")
        if len(whole) < len(recorded):
            self._records = whole
            self._write_manifest()
        return whole

    def _recorded(self) -> list[dict[str, Any]]:
        """What the manifest says; an empty folder if it says nothing of this pass."""
        manifest = self._folder / MANIFEST
        identity: Any = None
        parts: list[dict[str, Any]] = []
        try:
            found = loads(manifest.read_bytes())
            identity, parts = found["identity"], found["parts"]
            sound = isinstance(identity, dict) and all(part.keys() == RECORD for part in parts)
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            _drop(manifest, "is damaged")
            return []
        if identity == self._identity:
            return parts
        other = sorted(name for name in identity | self._identity if identity.get(name) != self._identity.get(name))
        said = escape(f"{self._folder}: results of other {', '.join(other)} are dropped")
        console.print(f"  [yellow]{said}[/yellow]", soft_wrap=True)
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        return []


def _drop(path: Path, why: str) -> None:
    console.print(f"  [yellow]{escape(str(path))} {why}; its rows are made again[/yellow]", soft_wrap=True)
    path.unlink(missing_ok=True)


def _fingerprint(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _pack(entries: Sequence[Entry]) -> bytes:
    arrays = {
        f"{number:06d}.{name}": np.ascontiguousarray(array).reshape(np.shape(array))
        for number, entry in enumerate(entries)
        for name, array in entry.items()
    }
    return safetensors.numpy.save(arrays)


def _unpack(data: bytes) -> Iterator[Entry]:
    entries: dict[str, dict[str, np.ndarray]] = {}
    for key, array in safetensors.numpy.load(data).items():
        number, _, name = key.partition(".")
        entries.setdefault(number, {})[name] = array
    return (entries[number] for number in sorted(entries))
