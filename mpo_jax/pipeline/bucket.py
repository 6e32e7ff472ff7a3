"""A copy of the workdir in an object store, which outlives the machine and is reachable from every host."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console
from mpo_jax.runtime.parts import FOLDER as PARTS
from mpo_jax.runtime.words import size

CHECKPOINTS = "checkpoints"
RESULTS = (
    "*.yaml", "left_out.json", "report/**/*", "tables/**/*", "figures/**/*", "runs/*/*.yaml", "runs/*/*.json",
    "seed-*/runs/*/*.yaml", "seed-*/runs/*/*.json",
)  # fmt: skip
"""Patterns of the workdir files sent when a command ends: everything except stages."""
LOG_BYTES = 2**20
"""Smallest transfer that is logged."""


class Bucket:
    """A folder in an object store (`gs://`, `s3://`) or on a mounted file system (`file://`).

    It holds `stages/` and results, like the workdir. The manifest of a stage is sent last, so a stage with a manifest
    is complete. During training all hosts write checkpoints directly to the bucket through Orbax, except on S3, which
    Orbax cannot write to: there they stay in the workdir.

    Raises:
      UserError: if the store's package is not installed. Methods raise it if the store is unreachable or denies access.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            # no listings cache: files of other hosts must be visible; file systems need their folders created
            more = {"auto_mkdir": True} if self._is_mounted else {}
            with self._reporting_errors("open it"):
                self._fs, self._root = url_to_fs(self.url, use_listings_cache=False, **more)
        except ImportError as error:
            raise UserError(
                f"runtime.bucket={url}: {error}. Install what object stores need: bash launch/setup.sh bucket"
            ) from error

    @classmethod
    def of(cls, config: Config) -> "Bucket | None":
        """The bucket of a configuration; None if it has none."""
        return None if config.runtime.bucket is None else cls(config.runtime.bucket)

    @property
    def _is_mounted(self) -> bool:
        return self.url.startswith("file://")

    @property
    def takes_checkpoints(self) -> bool:
        """Whether Orbax can write to the bucket."""
        return not self.url.startswith("s3://")

    def checkpoints(self, folder: Path) -> Path | epath.Path:
        """Checkpoint folder of the stage that is made in `folder`: a Path if it is on a disk."""
        if not self.takes_checkpoints:
            return folder / CHECKPOINTS
        root = Path(self._root) if self._is_mounted else epath.Path(self.url)
        return root / stage_place(folder) / CHECKPOINTS

    def check(self, *, writes: bool = True) -> None:
        """Tries the bucket, so that missing permissions show before anything is computed.

        Args:
          writes: write and remove a small file; else only look for one.
        """
        if not writes:
            self.has("stages/manifest.json")
            return
        with self._reporting_errors("write to it"):
            path = f"{self._root}/.probe-{os.getpid()}"
            self._fs.pipe_file(path, b"")
            self._fs.rm_file(path)

    def read(self, name: str) -> dict[str, Any] | None:
        """The contents of a JSON file; None if it does not exist."""
        with self._reporting_errors(f"read {name}"):
            path = f"{self._root}/{name}"
            return json.loads(self._fs.cat_file(path)) if self._fs.isfile(path) else None

    def has(self, name: str) -> bool:
        """Whether a file of this name exists."""
        with self._reporting_errors(f"look for {name}"):
            return self._fs.isfile(f"{self._root}/{name}")

    def send(self, folder: Path, name: str, *, last: str | None = None, files: Sequence[Path] | None = None) -> None:
        """Uploads a folder's files, without checkpoints and parts, as the folder `name`.

        Args:
          last: name of the file that marks the others as complete; it is uploaded after them.
          files: the only ones to upload before it; None: all.
        """
        files = [path for path in files or stage_files(folder) if path.name != last or path.parent != folder]
        self._send(folder, files, name)
        if last is not None:
            with self._reporting_errors(f"send {name}/{last}"):
                place = f"{self._root}/{name}/{last}"
                # objects appear atomically; on a file system a half-written file is visible
                written = f"{place}.tmp" if self._is_mounted else place
                self._fs.put_file(str(folder / last), written)
                if written != place:
                    self._fs.mv(written, place)

    def send_results(self, workdir: Path) -> None:
        """Uploads the workdir's files besides stages: reports, tables, and the configurations and records of runs."""
        found = sorted({path for pattern in RESULTS for path in workdir.glob(pattern) if path.is_file()})
        self._send(workdir, found, "")

    def fetch(self, name: str, folder: Path) -> None:
        """Downloads the folder `name` without checkpoints and atomically replaces `folder` with it."""
        temporary = folder.with_name(f".{folder.name.lstrip('.')}.fetching")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        begin = time.perf_counter()
        with self._reporting_errors(f"fetch {name}"):
            root = f"{self._root}/{name}/"
            found = [path for path in self._fs.find(root) if not path.removeprefix(root).startswith(f"{CHECKPOINTS}/")]
            targets = [temporary / path.removeprefix(root) for path in found]
            for parent in {target.parent for target in targets}:
                parent.mkdir(parents=True, exist_ok=True)
            self._fs.get(found, [str(target) for target in targets])
        _log_transfer(f"fetched {name}", targets, begin)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    def remove(self, name: str) -> None:
        """Removes a folder if it exists."""
        with self._reporting_errors(f"remove {name}"):
            path = f"{self._root}/{name}"
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def _send(self, folder: Path, files: list[Path], name: str) -> None:
        begin = time.perf_counter()
        with self._reporting_errors(f"send {name or folder}"):
            parts = [part for part in (self._root, name) if part]
            targets = ["/".join([*parts, path.relative_to(folder).as_posix()]) for path in files]
            if files:
                self._fs.put([str(path) for path in files], targets)
        _log_transfer(f"sent {name or 'results'}", files, begin)

    @contextlib.contextmanager
    def _reporting_errors(self, action: str) -> Iterator[None]:
        """Turns the store's errors into a UserError that names the action."""
        try:
            yield
        except (UserError, ImportError):
            raise
        except Exception as error:  # every store's package raises errors of its own
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"runtime.bucket={self.url}: cannot {action}: {type(error).__name__}: {reason}. Check its name, the "
                "credentials in the environment and the network (mpo doctor CONFIG); the workdir is intact, and the "
                "same command retries"
            ) from error


def stage_files(folder: Path) -> list[Path]:
    """All files of a stage's folder except its checkpoints and parts, which are sent as they are made."""
    apart = CHECKPOINTS, PARTS
    inside = (path for path in sorted(folder.rglob("*")) if path.relative_to(folder).parts[0] not in apart)
    return [path for path in inside if path.is_file()]


def _log_transfer(what: str, files: Iterable[Path], begin: float) -> None:
    sent = sum(path.stat().st_size for path in files)
    if sent >= LOG_BYTES:
        console.print(f"  {what}: {size(sent)} in {time.perf_counter() - begin:.0f} s", soft_wrap=True)


def stage_place(folder: Path) -> str:
    """The bucket's name for a stage's folder, finished or not."""
    return f"stages/{folder.name}"


def checkpoint_folder(bucket: Bucket | None, folder: Path) -> Path | epath.Path:
    """Checkpoint folder of the stage that is made in `folder`."""
    return folder / CHECKPOINTS if bucket is None else bucket.checkpoints(folder)
