"""Checkpoints inside an unfinished stage: Orbax, sharded, asynchronous, published atomically, checked when read."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import PreservationPolicy
from rich.markup import escape

from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console
from mpo_jax.training.hashes import KINDS, LANES, SHA256, first_difference, leaf_hashes, sha256_of

SPARE_BYTES = 2**20
"""Disk space beyond the arrays themselves: metadata, and the metrics written meanwhile."""


OTHER_STRUCTURE = "tree structures do not match"
"""Part of Orbax's message for arrays that agree in a tree that does not: no damage, so nothing to remove."""

STATUS = {"NOT_FOUND": errno.ENOENT, "PERMISSION_DENIED": errno.EACCES, "RESOURCE_EXHAUSTED": errno.ENOSPC}
"""How TensorStore's messages begin where they carry no code of the operating system."""


class Checkpoints:
    """The checkpoints of one stage's training state, newest last.

    The last `keep` are kept, and the one with the best value if `best` is given; others are deleted.

    Attributes:
      carried: the JSON that was saved with the state that `restore` returned.
    """

    def __init__(
        self,
        folder: Path | epath.Path,
        *,
        keep: int,
        best: Literal["min", "max"] | None = None,
        metric: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        clean: bool = False,
    ):
        """
        Args:
          folder: a Path on a disk, or a bucket's.
          metric: name of the value that `best` compares; values of another metric do not count.
          recipe: what the stage is made from; a checkpoint of another recipe is refused.
          clean: remove the incomplete checkpoints of a killed process; only for the process that writes here.
        """
        self._folder, self._recipe, self._metric = folder, recipe, metric
        self._kept = _Kept(keep, best)
        self._manager = ocp.CheckpointManager(
            self._folder.resolve() if isinstance(self._folder, Path) else self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                create=True,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=clean,
            ),
        )
        self.carried: dict[str, Any] = {}

    def restore(self, state: Any) -> tuple[int, Any]:
        """The newest sound checkpoint's step and state, placed like `state`; (0, state) where there is none.

        A checkpoint that cannot be read, or whose bytes are not those that were saved, is removed with a warning.

        Raises:
          UserError: if the checkpoint holds other shapes than this configuration's, or is of another recipe.
        """
        abstract = abstract_state(state)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                record = self.record(step)
                self._refuse_other(step, record, state)
                found = self._read(step, abstract, record)
            except (UserError, PermissionError, MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:
                if OTHER_STRUCTURE in str(error):
                    raise UserError(
                        f"{self._folder / str(step)}: the checkpoint does not fit this configuration: its arrays "
                        "are in another tree, as those of another optimiser; delete the folder or use another workdir"
                    ) from error
                self._drop(step, error)
                continue
            self.carried = record["carried"]
            self._kept.values |= {older: value for older in steps if (value := self._value(older)) is not None}
            return step, found
        if steps:
            console.print("[yellow]no checkpoint is left: the stage starts anew[/yellow]")
        return 0, state

    def best(self) -> tuple[int, float] | None:
        """The step and value of the best checkpoint, the earliest of equals; None where none has a value."""
        return self._kept.best_of(sorted(self._kept.values))

    def improves(self, value: float) -> bool:
        """Whether no checkpoint has a value as good as this one."""
        best = self.best()
        return best is None or (value > best[1] if self._kept.best == "max" else value < best[1])

    def load(self, step: int, abstract: Any) -> Any:
        """The state of one checkpoint, with the shapes and shardings of `abstract`.

        Raises:
          UserError: if it cannot be read, or its bytes are not those that were saved.
        """
        with self._naming_folder():
            self._manager.wait_until_finished()
        try:
            return self._read(step, abstract, self.record(step))
        except (UserError, PermissionError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise UserError(
                f"{self._folder / str(step)} is broken: {type(error).__name__}: {error}. Remove it, and the same "
                "command goes on from the last checkpoint, with the best of the others"
            ) from error

    def _read(self, step: int, abstract: Any, record: Mapping[str, Any]) -> Any:
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        hash_of = KINDS.get(kind := record.get("hash", SHA256))
        if hash_of is None:
            raise UserError(f"{self._folder / str(step)}: a newer version saved it, with hashes of the kind {kind!r}")
        found = self._manager.restore(step, args=arguments)["state"]
        if leaf := first_difference(record["hashes"], hash_of(found)):
            raise ValueError(f"{leaf} has other bytes than were saved")
        return found

    def restore_params(self, params: Any, shardings: Any, *, critic: bool) -> tuple[int, Any]:
        """The newest checkpoint's step and a model's trainable part: the stage's own, PPO's actor's or critic's.

        Args:
          params: shapes and types of that part.
          shardings: where to put them.

        Raises:
          UserError: if there is no checkpoint, or it is of another model.
        """
        step = self._manager.latest_step()
        if step is None:
            raise UserError(f"{self._folder} holds no checkpoint yet: the first one is saved at checkpoint_every steps")
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
        stored = self.record(step)["leaves"]
        prefix = (".actor" if any(name.startswith(".actor") for name in stored) else "") + ".trainable"
        if critic:
            prefix = ".critic.trainable"
        described = {prefix + name: shape for name, shape in _describe(params).items()}
        if differing := [name for name, shape in described.items() if stored.get(name) != shape]:
            raise UserError(f"{self._folder / str(step)}: the checkpoint holds another model: {differing[0]} differs")
        for part in reversed(prefix.strip(".").split(".")):
            wanted = {part: wanted}
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
        for part in prefix.strip(".").split("."):
            restored = restored[part]
        return step, restored

    def save(
        self,
        step: int,
        state: Any,
        *,
        hashes: Mapping[str, str] | None = None,
        value: float | None = None,
        carried: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts writing; the state may be donated to the next step as soon as this returns.

        Args:
          hashes: `leaf_hashes(state)`, if the caller has them already.
          value: the metric for `best`.
          carried: JSON to store with the state.

        Raises:
          OSError: if the disk is too full. This is checked first: the writing threads would fail in the background,
            each with its own traceback.
        """
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + SPARE_BYTES
        if isinstance(self._folder, Path) and shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, f"{needed} bytes are needed for a checkpoint", str(self._folder))
        record = {
            "leaves": _describe(state),
            "hash": LANES,
            "hashes": hashes or leaf_hashes(state),
            "recipe": self._recipe,
            "value": value,
            "metric": self._metric,
            "carried": carried or {},
        }
        if value is not None:
            self._kept.values[step] = value
        # it first waits for the last one, and raises what went wrong there
        with self._naming_folder():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), record=ocp.args.JsonSave({"json": json.dumps(record)})
                ),
            )

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def record(self, step: int) -> dict[str, Any]:
        """The JSON beside the arrays: `leaves` (types and shapes), `hashes` and their kind `hash`, `recipe`, ..."""
        stored = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        return json.loads(stored["record"]["json"])

    def sha256(self, step: int) -> dict[str, str]:
        """sha256 of every array as it lies on disk, with its path, type and shape; by path. Reads one at a time.

        Raises:
          UserError: if the checkpoint cannot be read.
        """
        folder = epath.Path(self._folder / str(step) / "state").resolve()
        hashes = {}
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                tree = reader.metadata(folder).item_metadata.tree
                whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                for path, _ in jax.tree_util.tree_leaves_with_path(tree):
                    one = lambda p, _, path=path: 0 if p == path else ocp.PLACEHOLDER  # noqa: E731
                    only = jax.tree_util.tree_map_with_path(one, tree)
                    arrays = reader.restore(folder, args=ocp.args.PyTreeRestore(item=only, restore_args=whole))
                    (array,) = (leaf for leaf in jax.tree.leaves(arrays) if leaf is not ocp.PLACEHOLDER)
                    name = jax.tree_util.keystr(path, simple=True, separator=".")
                    hashes[name] = sha256_of(name, np.asarray(array))
        except Exception as error:
            raise UserError(f"{folder.parent} cannot be read: {type(error).__name__}: {error}") from error
        return hashes

    def close(self) -> None:
        """Waits for pending writes."""
        with self._naming_folder():
            self._manager.close()

    @contextlib.contextmanager
    def _naming_folder(self) -> Iterator[None]:
        """Names the checkpoints' folder in errors of the file system, TensorStore's included.

        Raises:
          OSError: for each of them.
          UserError: for what else Orbax finds wrong with the files that it has just written.
        """
        try:
            yield
        except OSError as error:
            # of a folder that is removed Python names the entry alone
            if error.filename is None or not Path(os.fsdecode(error.filename)).is_absolute():
                error.filename = str(self._folder)
            raise
        except ValueError as error:
            named = re.search(r"os_error_code='(\d+)'", str(error))
            code = int(named[1]) if named else STATUS.get(str(error).partition(":")[0])
            if code is None:
                raise UserError(
                    f"cannot write a checkpoint in {self._folder}: {str(error).splitlines()[0]}. If something in it "
                    "was deleted or moved while the command ran, run the same command again"
                ) from error
            raise OSError(code, os.strerror(code), str(self._folder)) from error

    def _refuse_other(self, step: int, record: Mapping[str, Any], state: Any) -> None:
        where = f"{self._folder / str(step)}: the checkpoint does not fit this configuration"
        advice = "delete the folder or use another workdir"
        if record["recipe"] is not None and self._recipe is not None:
            stored, wanted = (_flat(json.loads(json.dumps(recipe))) for recipe in (record["recipe"], self._recipe))
            if differing := [key for key in wanted | stored if wanted.get(key) != stored.get(key)]:
                shown = ((key, stored.get(key, "absent"), wanted.get(key, "absent")) for key in differing)
                listed = ", ".join(f"{key} is {there} in the checkpoint and {here} now" for key, there, here in shown)
                raise UserError(f"{where}: {listed}; {advice}")
        stored, wanted = record["leaves"], _describe(state)
        if differing := [name for name in wanted | stored if wanted.get(name) != stored.get(name)]:
            raise UserError(
                f"{where}: {differing[0]} is {stored.get(differing[0], 'absent')} in the checkpoint and "
                f"{wanted.get(differing[0], 'absent')} now ({len(differing)} differ); {advice}"
            )

    def _drop(self, step: int, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0]
        said = f"{self._folder / str(step)} is broken and is removed: {type(error).__name__}: {reason}"
        console.print(f"[yellow]{escape(said)}[/yellow]", soft_wrap=True)
        self._manager.delete(step)

    def _value(self, step: int) -> float | None:
        if self._kept.best is None:
            return None
        try:
            record = self.record(step)
            return record["value"] if record.get("metric") == self._metric else None
        except Exception:  # another checkpoint is restored, so this one may be broken
            return None


class _Kept(PreservationPolicy):
    """Keeps the last checkpoints and the best one. Orbax's own policy reads metrics first and fails on broken ones."""

    def __init__(self, last: int, best: Literal["min", "max"] | None):
        self.last, self.best = last, best
        self.values: dict[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps[-self.last :])
        if (best := self.best_of(steps)) is not None:
            kept.add(best[0])
        return [step in kept for step in steps]

    def best_of(self, steps: Sequence[int]) -> tuple[int, float] | None:
        """The first step with the best value, and that value; None if no step has one."""
        known = [(step, self.values[step]) for step in steps if step in self.values]
        return (max if self.best == "max" else min)(known, key=lambda item: item[1], default=None)


def abstract_state(state: Any) -> Any:
    """Shapes, types and shardings of a state's arrays, without the arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _describe(state: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as `key.sub`: value."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {k: v for key, part in settings.items() for k, v in _flat(part, f"{prefix}.{key}".strip(".")).items()}
