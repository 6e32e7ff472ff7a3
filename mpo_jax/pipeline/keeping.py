"""`runtime.keep=last`: exported models are removed once nothing needs them, and made again if something does later."""

import copy
import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from mpo_jax.config.schema import Config
from mpo_jax.pipeline import shared
from mpo_jax.pipeline.artifacts import Store
from mpo_jax.pipeline.bucket import Bucket, stage_place
from mpo_jax.pipeline.pipeline import Pipeline
from mpo_jax.pipeline.recipe import MANIFEST, artifact_name, read_manifest
from mpo_jax.pipeline.table import Listing
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_json
from mpo_jax.runtime.processes import agree, is_main, wait
from mpo_jax.runtime.progress import Overall
from mpo_jax.runtime.words import size
from mpo_jax.types import REMOVED, Artifact

FOLDERS = ("model", "critic")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of the requested runs.

    Attributes:
      readers: names of the stages that read each stage.
      kept: names of the stages whose models stay: final policies and reward models.
    """

    readers: Mapping[str, frozenset[str]]
    kept: frozenset[str]

    @classmethod
    def of(cls, recipes: Mapping[str, Mapping[str, Any]]) -> "Plan":
        """The plan of stages by name, in the order in which they are made, with what their recipes say."""
        readers: dict[str, set[str]] = {name: set() for name in recipes}
        finals: set[str] = set()
        for name, recipe in recipes.items():
            for parent in recipe["parents"].values():
                readers[parent].add(name)
            if recipe["stage"] == "evaluate":
                finals |= {recipe["parents"]["policy"], recipe["parents"]["reward"]}
        return cls({name: frozenset(own) for name, own in readers.items()}, frozenset(finals))

    def unneeded(self, done: Collection[str]) -> list[str]:
        """The finished stages whose models no unfinished stage reads, and that are not kept, in order."""
        return [
            name
            for name, readers in self.readers.items()
            if name in done and name not in self.kept and readers <= set(done)
        ]


class ModelStore(Store):
    """A store that removes models nothing needs any more, and makes removed ones again before a stage reads them.

    A removed model leaves its stage's folder, whose manifest says so. With a bucket it is fetched from there.
    Two commands in one workdir must not run at the same time: one may remove what the other is about to read.

    Attributes:
      plan: the stages of all requested runs; None: nothing is removed.
    """

    def __init__(self, config: Config, overall: Overall | None = None):
        super().__init__(Path(config.workdir), overall, bucket=Bucket.of(config))
        self.plan: Plan | None = None
        self._removes = config.runtime.keep == "last"
        self._others: set[str] = set()  # final policies of runs made before, which stay too
        self._later: set[str] = set()  # stages that later seeds of a table take from here
        self._done: set[str] = set()
        self._makers: dict[str, tuple[Mapping[str, Any], Callable[[Path], Mapping[str, Any]]]] = {}

    def request(self, pipeline: Pipeline, runs: Iterable[str], later: Iterable[str] = ()) -> None:
        """Tells the store which runs will be made: what they end with stays, or is made again if it was removed.

        Args:
          later: names of stages that later seeds take from here; their models stay until `release`.
        """
        self._later = set(later)
        listing, workdir = copy.copy(pipeline), self.folder.parent
        listing.store = Listing(workdir, self.bucket)
        # only what removes models has to know which ones other runs end with
        paths = workdir.glob(f"runs/*/evaluate/{MANIFEST}") if self._removes else ()
        recorded = (read_manifest(path.parent.resolve()) for path in paths)
        others = sorted({policy for manifest in recorded if (policy := manifest["parents"].get("policy"))})
        self._others = set(agree(others, "policies of other runs"))
        artifacts = [artifact for name in runs for artifact in listing.experiment(name).artifacts.values()]
        self.plan = Plan.of({artifact.id: artifact.manifest for artifact in artifacts})

    def build(self, recipe: Mapping[str, Any], run: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """The artifact of this recipe; if it must be made, its parents get their models back first."""
        name = artifact_name(recipe)
        self._makers[name] = recipe, run
        for parent in recipe["parents"].values():
            self._restore(parent, name, only_if=lambda: not self._is_there(name))
        artifact = super().build(recipe, run)
        self._done.add(name)
        if self.plan is not None and name in self.plan.kept:
            artifact = self.restored(artifact)
        self._remove(self._done)
        return artifact

    def restored(self, artifact: Artifact) -> Artifact:
        """The artifact with its model, which is made again if it was removed."""
        self._restore(artifact.id, "the result asked for")
        return Artifact(artifact.path, read_manifest(artifact.path))

    def finish(self) -> None:
        """Removes what nothing needs once all runs are made, those included that only left-out runs would read."""
        # they hold the rows
        self._makers.clear()
        if self.plan is not None:
            self._remove({*self._done, *self.plan.readers})

    def release(self) -> None:
        """`finish`, of the models too that stayed for later seeds."""
        self._later = set()
        self.finish()

    def _is_there(self, name: str) -> bool:
        manifest = shared.place_of(self.folder / name) / MANIFEST
        return manifest.is_file() or (self.bucket is not None and self.bucket.has(_in_bucket(name)))

    def _restore(self, name: str, reader: str, only_if: Callable[[], bool] = lambda: True) -> None:
        final = self.folder / name
        if not agree(is_main() and is_removed(final) and only_if()):
            return
        console.print(
            f"{name} is made again: its model was removed (runtime.keep=last), and {reader} needs it",
            soft_wrap=True,
        )
        if is_main() and self.bucket is not None and REMOVED in (self.bucket.read(_in_bucket(name)) or {}):
            # sent there after its model was gone
            self.bucket.remove(stage_place(final))
        wait(f"{name} is left")
        if is_main() or self.bucket is not None:
            with FileLock(self.folder / f".{name}.lock"):
                if is_removed(final):
                    # at once: what a kill left of it would be in the new stage's way
                    gone = final.with_name(f".{name}.gone")
                    shutil.rmtree(gone, ignore_errors=True)
                    final.rename(gone)
                    shutil.rmtree(gone, ignore_errors=True)
        if name in self.reused:
            self.reused.remove(name)
        # as long as it is not done again, its parents are needed
        self._done.discard(name)
        self.build(*self._makers[name])

    def _remove(self, done: Collection[str]) -> None:
        if not self._removes or self.plan is None:
            return
        names = [name for name in self.plan.unneeded(done) if name not in self._others | self._later]
        if not agree(is_main() and any(_has_models(self.folder / name) for name in names), "models to remove"):
            return
        # another process may still be opening what goes
        wait("models are opened")
        # hosts that do not share a disk have a copy each
        for name in names if is_main() or self.bucket is not None else ():
            with FileLock(self.folder / f".{name}.lock"):
                if freed := remove_models(self.folder / name):
                    console.print(f"[dim]removed the model of {name} ({size(freed)})[/dim]", soft_wrap=True)


def remove_models(folder: Path) -> int:
    """Removes a finished stage's models and says so in its manifest first, so that a kill leaves no broken model.

    Returns:
      The number of bytes removed.
    """
    manifest = folder / MANIFEST
    there = [name for name in FOLDERS if (folder / name).is_dir()]
    if not there or not manifest.is_file():
        return 0
    size = sum(file.stat().st_size for name in there for file in (folder / name).rglob("*") if file.is_file())
    found = read_manifest(folder)
    write_json(manifest, {**found, REMOVED: sorted({*found.get(REMOVED, []), *there})})
    for name in there:
        shutil.rmtree(folder / name)
    return size


def _has_models(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in FOLDERS)


def is_removed(folder: Path) -> bool:
    """Whether a stage is finished and its model was removed."""
    return (folder / MANIFEST).is_file() and REMOVED in read_manifest(folder)


def _in_bucket(name: str) -> str:
    return f"stages/{name}/{MANIFEST}"
