"""Finished stages on disk: folders named by content, published by rename, reused when they exist."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from mpo_jax.config.load import load_config
from mpo_jax.errors import UserError
from mpo_jax.pipeline.bucket import CHECKPOINTS, Bucket, stage_place
from mpo_jax.pipeline.recipe import RECIPE, artifact_name
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_json
from mpo_jax.runtime.processes import agree, is_main, wait
from mpo_jax.runtime.progress import Overall
from mpo_jax.runtime.stage_warnings import collect_warnings
from mpo_jax.runtime.version import __version__
from mpo_jax.types import Artifact


class Builder(Protocol):
    """What a pipeline asks for its stages. `makes`: whether they are made, or only named."""

    makes: bool

    def build(self, recipe: Mapping[str, Any], run: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """The artifact of this recipe, which `run(folder)` makes."""
        ...


class Store:
    """The artifacts below `<workdir>/stages`, and in the bucket where there is one.

    With a bucket every host may have a disk and workdir of its own: what one publishes the others fetch.

    Args:
      overall: told of every stage that is made here.
      bucket: keeps every finished stage too, and is asked for what the workdir lacks.

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
        if bucket is not None and is_main():
            bucket.check()
        self.made: list[str] = []
        self.reused: list[str] = []

    def build(self, recipe: Mapping[str, Any], run: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """The artifact of this recipe: the stored one, or what `run(folder)` makes now.

        `run` works in a hidden folder, resumes from whatever an earlier, killed run left there, and returns a summary
        for the manifest. The folder gets its real name only when all is written.
        """
        name = artifact_name(recipe)
        final = self.folder / name
        partial = _partial(final)
        if (done := self._find(final)) is None:
            # of several processes the first one holds the lock for all
            with FileLock(self.folder / f".{name}.lock") if is_main() else contextlib.nullcontext():
                # another run may have finished it while this one waited for the lock
                if (done := self._find(final)) is None:
                    done = self._make(recipe, final, partial, run)
                    self.made.append(name)
                    return done
        if name not in self.made and name not in self.reused:
            self.reused.append(name)
            console.print(f"[dim]reuse {name}[/dim]")
        return done

    def _find(self, final: Path) -> Artifact | None:
        """The finished artifact, if there is one; all processes get the same answer."""
        there = is_main() and (_is_whole(final) or (self.bucket is not None and self.bucket.has(_manifest(final))))
        if not agree(there):
            return None
        if is_main() and _is_whole(final):
            self._keep(final)
        return self._open(final)

    def _open(self, final: Path) -> Artifact:
        """The artifact in this process's workdir, where it is fetched to if it is not there."""
        if self.bucket is not None:
            # processes that share a disk fetch once; the stage's own lock may be held by this very process
            with FileLock(self.folder / f".{final.name}.fetch.lock"):
                if not _is_whole(final):
                    self.bucket.fetch(stage_place(final), final)
        return Artifact(final, json.loads((final / "manifest.json").read_text(encoding="utf-8")))

    def _keep(self, final: Path) -> None:
        """Sends a finished stage to the bucket, if it is not there, and removes there what it was made from."""
        if self.bucket is not None:
            if not self.bucket.has(_manifest(final)):
                self.bucket.send(final, stage_place(final), last="manifest.json")
            self.bucket.remove(stage_place(_partial(final)))

    def _make(self, recipe: Mapping[str, Any], final: Path, partial: Path, run: Callable[[Path], Any]) -> Artifact:
        console.print(f"[bold]make {final.name}[/bold]")
        if is_main():
            if self.bucket is not None and self.bucket.has(f"{stage_place(partial)}/{RECIPE}"):
                # perhaps another machine's work: its metrics go with the checkpoints there
                self.bucket.fetch(stage_place(partial), partial)
            partial.mkdir(exist_ok=True)
            write_json(partial / RECIPE, recipe)
        wait(f"{final.name} begun")
        begin = time.time()
        making = self._overall.making(final.name) if self._overall else contextlib.nullcontext()
        with making, collect_warnings() as warnings:
            summary = run(partial)
        wait(f"{final.name} written")
        if is_main():
            (partial / RECIPE).unlink()
            made = {"version": __version__, "seconds": round(time.time() - begin, 1), "warnings": warnings}
            write_json(partial / "manifest.json", {**recipe, **made, "summary": summary})
            os.rename(partial, final)
            # not before: a kill in between would cost all of the training
            if not _keeps_checkpoints(final):
                shutil.rmtree(final / CHECKPOINTS, ignore_errors=True)
            self._keep(final)
        wait(f"{final.name} published")
        if self.bucket is not None:
            # on this process's own disk, where it has one
            shutil.rmtree(partial, ignore_errors=True)
        return self._open(final)


def _partial(final: Path) -> Path:
    """Where a stage is made that will be published as `final`."""
    return final.with_name(f".{final.name}.partial")


def _manifest(final: Path) -> str:
    return f"{stage_place(final)}/manifest.json"


def _is_whole(final: Path) -> bool:
    return (final / "manifest.json").is_file()


def _keeps_checkpoints(folder: Path) -> bool:
    """As the configuration says that a stage which trains leaves in its folder."""
    config = folder / "config.yaml"
    return config.is_file() and load_config(config).runtime.keep_finished_checkpoints
