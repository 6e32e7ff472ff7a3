"""A second place for what a workdir holds: an object store, which outlives the machine and which every host reaches."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console

CHECKPOINTS = "checkpoints"
RESULTS = (
    "*.yaml", "report/**/*", "tables/**/*", "figures/**/*", "runs/*/*.yaml", "runs/*/*.json",
    "seed-*/runs/*/*.yaml", "seed-*/runs/*/*.json",
)  # fmt: skip
"""Of a workdir, what is sent when a command ends: all that is no stage."""
TELL_BYTES = 2**20
"""Smaller transfers are not worth a line."""


class Bucket:
    """A folder of an object store (`gs://`, `s3://`), or of a file system that is mounted (`file://`).

    It holds `stages/` and results as the workdir does. A stage is complete where its manifest is, which is sent last.
    While a stage trains, its checkpoints are written straight into the bucket by all hosts, as Orbax can; on S3, which
    Orbax does not write to, they stay in the workdir.

    Raises:
      UserError: if the store's package is not installed; from the methods if the store does not answer or refuses.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            # another host's files must be seen; folders are made where a file system has any
            more = {"auto_mkdir": True} if self._is_mounted else {}
            with self._told("open it"):
                self._fs, self._root = url_to_fs(self.url, use_listings_cache=False, **more)
        except ImportError as error:
            raise UserError(
                f"runtime.bucket={url}: {error}. Install what object stores need: bash launch/setup.sh bucket"
            ) from error

    @classmethod
    def of(cls, config: Config) -> "Bucket | None":
        """The configuration's, where it has one."""
        return None if config.runtime.bucket is None else cls(config.runtime.bucket)

    @property
    def _is_mounted(self) -> bool:
        return self.url.startswith("file://")

    @property
    def takes_checkpoints(self) -> bool:
        """Whether Orbax can write to it."""
        return not self.url.startswith("s3://")

    def checkpoints(self, folder: Path) -> Path | epath.Path:
        """Where the checkpoints of the stage that is made in `folder` lie: a Path where that is on a disk."""
        if not self.takes_checkpoints:
            return folder / CHECKPOINTS
        root = Path(self._root) if self._is_mounted else epath.Path(self.url)
        return root / stage_place(folder) / CHECKPOINTS

    def check(self) -> None:
        """Writes and removes a small file, so that a bucket that refuses is known before anything is computed."""
        with self._told("write to it"):
            path = f"{self._root}/.probe-{os.getpid()}"
            self._fs.pipe_file(path, b"")
            self._fs.rm_file(path)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file; None where there is none."""
        with self._told(f"read {name}"):
            path = f"{self._root}/{name}"
            return json.loads(self._fs.cat_file(path)) if self._fs.isfile(path) else None

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        with self._told(f"look for {name}"):
            return self._fs.isfile(f"{self._root}/{name}")

    def send(self, folder: Path, name: str, *, last: str | None = None) -> None:
        """Sends a folder's files, without checkpoints, as the folder `name`.

        Args:
          last: a file that says that the others are complete: it appears when they are there.
        """
        files = [path for path in _files(folder) if path.name != last or path.parent != folder]
        self._send(folder, files, name)
        if last is not None:
            with self._told(f"send {name}/{last}"):
                place = f"{self._root}/{name}/{last}"
                # an object appears whole; a file system shows half of a file that is being written
                written = f"{place}.tmp" if self._is_mounted else place
                self._fs.put_file(str(folder / last), written)
                if written != place:
                    self._fs.mv(written, place)

    def send_results(self, workdir: Path) -> None:
        """Sends what a workdir holds besides stages: reports, tables, and what runs were made of."""
        found = sorted({path for pattern in RESULTS for path in workdir.glob(pattern) if path.is_file()})
        self._send(workdir, found, "")

    def fetch(self, name: str, folder: Path) -> None:
        """Brings the folder `name`, without checkpoints, whole or not at all, in the place of what is in `folder`."""
        temporary = folder.with_name(f".{folder.name.lstrip('.')}.fetching")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        begin = time.perf_counter()
        with self._told(f"fetch {name}"):
            root = f"{self._root}/{name}/"
            found = [path for path in self._fs.find(root) if not path.removeprefix(root).startswith(f"{CHECKPOINTS}/")]
            targets = [temporary / path.removeprefix(root) for path in found]
            for parent in {target.parent for target in targets}:
                parent.mkdir(parents=True, exist_ok=True)
            self._fs.get(found, [str(target) for target in targets])
        _tell(f"fetched {name}", targets, begin)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    def remove(self, name: str) -> None:
        """Removes a folder, if it is there."""
        with self._told(f"remove {name}"):
            path = f"{self._root}/{name}"
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def _send(self, folder: Path, files: list[Path], name: str) -> None:
        begin = time.perf_counter()
        with self._told(f"send {name or folder}"):
            parts = [part for part in (self._root, name) if part]
            targets = ["/".join([*parts, path.relative_to(folder).as_posix()]) for path in files]
            if files:
                self._fs.put([str(path) for path in files], targets)
        _tell(f"sent {name or 'results'}", files, begin)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (UserError, ImportError):
            raise
        except Exception as error:  # every store's package raises errors of its own
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"runtime.bucket={self.url}: cannot {what}: {type(error).__name__}: {reason}. Look at its name, the "
                "credentials in the environment and the network (mpo doctor CONFIG); what is in the workdir is whole, "
                "and the same command tries again"
            ) from error


def _files(folder: Path) -> list[Path]:
    """All files of a stage's folder that are not a checkpoint's."""
    inside = (path for path in sorted(folder.rglob("*")) if path.relative_to(folder).parts[0] != CHECKPOINTS)
    return [path for path in inside if path.is_file()]


def _tell(what: str, files: Iterable[Path], begin: float) -> None:
    size = sum(path.stat().st_size for path in files)
    if size >= TELL_BYTES:
        console.print(f"  {what}: {size / 1e6:,.0f} MB in {time.perf_counter() - begin:.0f} s", soft_wrap=True)


def stage_place(folder: Path) -> str:
    """The name in a bucket of a stage's folder, finished or not."""
    return f"stages/{folder.name}"


def checkpoint_folder(bucket: Bucket | None, folder: Path) -> Path | epath.Path:
    """Where the stage that is made in `folder` keeps its checkpoints."""
    return folder / CHECKPOINTS if bucket is None else bucket.checkpoints(folder)
