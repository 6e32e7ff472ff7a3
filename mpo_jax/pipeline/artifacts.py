"""Finished stages on disk: folders named by a hash of their recipe, published by rename, reused if they exist."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from rich.markup import escape

from mpo_jax.errors import Damaged, UserError
from mpo_jax.pipeline import shared
from mpo_jax.pipeline.bucket import CHECKPOINTS, Bucket, stage_files, stage_place
from mpo_jax.pipeline.recipe import MANIFEST, RECIPE, artifact_name, read_made, read_manifest
from mpo_jax.pipeline.run_folder import CONFIG, read_config
from mpo_jax.runtime import parts
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import read_object, remove, wait_for_files, write_json
from mpo_jax.runtime.processes import agree, is_main, wait
from mpo_jax.runtime.progress import Overall
from mpo_jax.runtime.stage_warnings import collect_warnings
from mpo_jax.runtime.version import __version__
from mpo_jax.types import Artifact

SECONDS_BEFORE = "seconds_before"
"""Key of an unfinished stage's recipe file: what attempts before this one took."""

LOCK_POLL_S = 1.0
"""Seconds between two tries to get a lock that another run holds."""


class Builder(Protocol):
    """Provides a pipeline with its stages. `makes`: whether `build` runs missing stages or only names them."""

    makes: bool

    def build(self, recipe: Mapping[str, Any], run: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """The artifact of this recipe; `run(folder)` makes it."""
        ...


class Store:
    """The artifacts in `<workdir>/stages`, and in the bucket if there is one.

    With a bucket, hosts need not share a disk or workdir: what one host publishes, the others fetch.

    Args:
      overall: progress over all stages, notified of every stage made here.
      bucket: second copy of every finished stage, and the source of stages missing from the workdir.

    Raises:
      UserError: if the workdir or the bucket cannot be written.
    """

    makes = True

    def __init__(self, workdir: Path, overall: Overall | None = None, *, bucket: Bucket | None = None):
        self._overall, self.bucket = overall, bucket
        self.folder = workdir / "stages"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to workdir {workdir}: {error.strerror}; choose another with workdir=DIR"
            ) from error
        if bucket is not None:
            # every host reads from it, and process 0 writes too
            bucket.check(writes=is_main())
        self.made: list[str] = []
        self.reused: list[str] = []

    def build(self, recipe: Mapping[str, Any], run: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """The artifact of this recipe: the stored one if it exists, else what `run(folder)` makes.

        `run` works in a hidden folder, resumes from what an earlier, killed run left there, and returns a summary for
        the manifest. The folder gets its final name only when everything is written.
        """
        name = artifact_name(recipe)
        final = self.folder / name
        partial = _partial(final)
        if is_main() and self.bucket is None:
            # found now, not when the stage is made and cannot get its name
            read_made(final, recipe)
        if (done := self._find(final)) is None:
            # the main process holds the lock for all processes
            with _locked(self.folder / f".{name}.lock", name) if is_main() else contextlib.nullcontext():
                # another run may have finished it while this one waited for the lock, or another seed before
                if (done := self._find(final) or self._take(final)) is None:
                    done = self._make(recipe, final, partial, run)
                    self.made.append(name)
                    return done
        if name not in self.made and name not in self.reused:
            self.reused.append(name)
            console.print(f"[dim]reuse {name}[/dim]")
        return done

    def _find(self, final: Path) -> Artifact | None:
        """The finished artifact if it exists, else None; the result is the same in all processes."""
        there = None
        if is_main() and _is_complete(final):
            _tidy(final)
            self._upload(final)
            there = _sizes(final)
        elif is_main() and self.bucket is not None and self.bucket.has(_manifest(final)):
            there = {}
        there = agree(there, f"process 0 looks for {final.name}")
        return None if there is None else self._open(final, there)

    def _take(self, final: Path) -> Artifact | None:
        """The artifact that another seed of the table has finished, as this workdir's own; None if there is none."""
        if not agree(is_main() and shared.take(final), f"process 0 takes {final.name} from another seed"):
            return None
        if is_main():
            shutil.rmtree(_partial(final), ignore_errors=True)
        return self._find(final)

    def _open(self, final: Path, there: Mapping[str, int]) -> Artifact:
        """Opens the artifact in this process's workdir, fetching it first if it is missing there.

        Args:
          there: the files that process 0 sees, and their bytes.
        """
        if self.bucket is not None:
            # so that processes sharing a disk fetch once; a lock of its own, as this process may hold the stage's lock
            with FileLock(self.folder / f".{final.name}.fetch.lock"):
                if not _is_complete(final):
                    self.bucket.fetch(stage_place(final), final)
        else:
            wait_for_files(final, there)
        return Artifact(final, read_manifest(final))

    def _upload(self, final: Path) -> None:
        """Uploads a finished stage to the bucket unless it is there, and removes its partial folder from the bucket."""
        if self.bucket is not None:
            if not self.bucket.has(_manifest(final)):
                self.bucket.send(final, stage_place(final), last=MANIFEST)
            self.bucket.remove(stage_place(_partial(final)))

    def _make(self, recipe: Mapping[str, Any], final: Path, partial: Path, run: Callable[[Path], Any]) -> Artifact:
        console.print(f"[bold]make {final.name}[/bold]")
        before = 0.0
        if is_main():
            if self.bucket is not None and self.bucket.has(f"{stage_place(partial)}/{RECIPE}"):
                # possibly another machine's partial run: its metrics belong to the checkpoints there
                self.bucket.fetch(stage_place(partial), partial)
            _prepare(partial)
            before = _seconds_before(partial)
            write_json(partial / RECIPE, {**recipe, **({SECONDS_BEFORE: before} if before else {})})
        begun = agree({RECIPE: _size(partial / RECIPE)} if is_main() else None, f"process 0 begins {final.name}")
        if self.bucket is None and begun is not None:
            wait_for_files(partial, begun)
        begin = time.time() - before
        making = self._overall.making(final.name) if self._overall else contextlib.nullcontext()
        with making, collect_warnings() as warnings:
            summary = run(partial)
        wait(f"{final.name} written")
        if is_main():
            (partial / RECIPE).unlink()
            made = {"version": __version__, "seconds": round(time.time() - begin, 1), "warnings": warnings}
            write_json(partial / MANIFEST, {**recipe, **made, "summary": summary})
            os.rename(partial, final)
            _tidy(final)
            self._upload(final)
        published = agree(_sizes(final) if is_main() else {}, f"process 0 publishes {final.name}")
        if self.bucket is not None:
            # hosts with a disk of their own have a partial folder each
            shutil.rmtree(partial, ignore_errors=True)
        return self._open(final, published)


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Holds the lock of a stage; says so if another run holds it, which may take hours."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"waiting for {name}, which another run is making", soft_wrap=True)
        lock.acquire(poll_interval=LOCK_POLL_S)
    try:
        yield
    finally:
        lock.release()


def _partial(final: Path) -> Path:
    """The hidden folder in which the stage `final` is made."""
    return final.with_name(f".{final.name}.partial")


def _prepare(partial: Path) -> None:
    """Makes the folder of an unfinished stage, and removes files that are in the place of its folders."""
    for folder in (partial, partial / CHECKPOINTS, partial / parts.FOLDER):
        if os.path.lexists(folder) and not folder.is_dir():
            console.print(f"  [yellow]{escape(str(folder))} is no folder, and is removed[/yellow]", soft_wrap=True)
            folder.unlink()
    partial.mkdir(exist_ok=True)


def _seconds_before(partial: Path) -> float:
    """The time that stopped attempts at a stage took, each from its recipe to the last file that it wrote.

    What an attempt did after that is lost with it, and the time between attempts is nobody's.
    """
    recipe = partial / RECIPE
    if not recipe.is_file():
        return 0.0
    last = max(path.stat().st_mtime for path in partial.rglob("*") if path.is_file())
    before = 0.0
    with contextlib.suppress(Damaged, TypeError, ValueError):
        before = float(read_object(recipe, "").get(SECONDS_BEFORE, 0.0))
    # a damaged number is none
    return round(max(last - recipe.stat().st_mtime, 0.0) + (before if 0 <= before < 1e9 else 0.0), 1)


def _manifest(final: Path) -> str:
    return f"{stage_place(final)}/{MANIFEST}"


def _is_complete(final: Path) -> bool:
    return (final / MANIFEST).is_file()


def _tidy(final: Path) -> None:
    """Removes what only an unfinished stage needs.

    After the rename: before it, a kill in between would lose all the work. A kill after it leaves this to the next run.
    """
    if (final / CHECKPOINTS).is_dir() and not _keeps_checkpoints(final):
        shutil.rmtree(final / CHECKPOINTS, ignore_errors=True)
    remove(final / parts.FOLDER)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a finished stage besides its checkpoints."""
    return {path.relative_to(folder).as_posix(): _size(path) for path in stage_files(folder)}


def _size(path: Path) -> int:
    return path.stat().st_size


def _keeps_checkpoints(folder: Path) -> bool:
    """Whether a stage keeps its checkpoints; training stages store their configuration in the folder."""
    config = folder / CONFIG
    return config.is_file() and read_config(config).runtime.keep_finished_checkpoints
