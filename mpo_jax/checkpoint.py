"""Checkpoints inside an unfinished stage: Orbax, sharded, asynchronous, published atomically."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mpo_jax.errors import UserError

SPARE_BYTES = 2**20
"""Room on the disk beyond the arrays themselves: metadata, and the metrics written meanwhile."""


class Checkpoints:
    """The checkpoints of one stage's training state, newest last; the oldest beyond `keep` are deleted."""

    def __init__(self, folder: Path, *, keep: int):
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True),
        )
        self._folder = folder

    def restore(self, state: Any) -> tuple[int, Any]:
        """The newest checkpoint's step and state, placed like `state`; (0, state) where there is none.

        Raises:
          UserError: if the checkpoint holds other shapes than this configuration's.
        """
        step = self._manager.latest_step()
        if step is None:
            return 0, state
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        stored = self._shapes(step)
        wanted = _describe(state)
        if stored != wanted:
            differing = [name for name in wanted | stored if wanted.get(name) != stored.get(name)]
            raise UserError(
                f"{self._folder / str(step)}: the checkpoint does not fit this configuration: {differing[0]} is "
                f"{stored.get(differing[0], 'absent')} there and {wanted.get(differing[0], 'absent')} here "
                f"({len(differing)} differ); delete the folder or use another workdir"
            )
        return step, self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))[
            "state"
        ]

    def restore_params(self, params: Any, shardings: Any, *, critic: bool) -> tuple[int, Any]:
        """The newest checkpoint's step and its model alone: the trained one, PPO's actor, or PPO's critic.

        Args:
          params: shapes and types of the model's parameters.
          shardings: where to put them.

        Raises:
          UserError: if there is no checkpoint, or it is of another model.
        """
        step = self._manager.latest_step()
        if step is None:
            raise UserError(f"{self._folder} holds no checkpoint yet: the first one is saved at checkpoint_every steps")
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
        stored = self._shapes(step)
        prefix = (".actor" if any(name.startswith(".actor") for name in stored) else "") + ".params"
        if critic:
            prefix = ".critic.params"
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

    def save(self, step: int, state: Any) -> None:
        """Starts writing; the state may be donated to the next step as soon as this returns.

        Raises:
          OSError: if the disk has no room for it. Asked beforehand: the writing threads would fail in the background,
            each with a traceback of its own.
        """
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + SPARE_BYTES
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, f"{needed} bytes are needed for a checkpoint", str(self._folder))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), shapes=ocp.args.JsonSave({"leaves": json.dumps(_describe(state))})
            ),
        )

    def close(self) -> None:
        """Waits for writes under way."""
        self._manager.close()

    def _shapes(self, step: int) -> dict[str, str]:
        stored = self._manager.restore(step, args=ocp.args.Composite(shapes=ocp.args.JsonRestore()))
        return json.loads(stored["shapes"]["leaves"])


def _describe(state: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
