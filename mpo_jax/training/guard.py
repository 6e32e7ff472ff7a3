"""Updates that were skipped because they were not finite: told of, kept on disk, and no more of them than allowed."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console
from mpo_jax.runtime.processes import is_main, to_host
from mpo_jax.types import Metrics, Skips

MAX_BAD_BATCHES = 3
"""How many batches of skipped updates are kept on disk."""


class Guard:
    """Tells of skipped updates, keeps their batches, and stops after too many in a row.

    It looks at a step when the next one is under way, so that the device is never waited for in vain.
    """

    def __init__(self, folder: Path | None, stage: str, limit: int):
        self._folder, self._stage, self._limit = folder, stage, limit
        self._unseen: tuple[int, dict[str, Skips], Any] | None = None

    def check(self, step: int, metrics: Metrics, batch: Any) -> None:
        """Takes a step that has just been started, and looks at the one before.

        Raises:
          UserError: at the limit.
        """
        self.flush()
        self._unseen = step, {name: m for name, m in metrics.items() if isinstance(m, Skips)}, batch

    def flush(self) -> None:
        """Looks at the last step taken, once it is done."""
        if self._unseen is None:
            return
        (step, skips, batch), self._unseen = self._unseen, None
        skips = {name: skip for name, skip in jax.device_get(skips).items() if skip.count > 0}
        if not skips:
            return
        kept = self._keep(step, batch)
        for name, skip in skips.items():
            what = " ".join(filter(None, [self._stage, name.rpartition("/")[0]]))
            console.print(
                f"  [yellow]{what} step {step}: loss or gradient is not finite, the update is skipped "
                f"({int(skip.in_a_row)} in a row){kept}[/yellow]",
                soft_wrap=True,
            )
            if skip.in_a_row >= self._limit:
                rows = "the batches" if self._folder is None else f"the rows of the first batches, in {self._folder}"
                raise UserError(
                    f"{what}: the loss or the gradient was not finite in {int(skip.in_a_row)} updates in a row, up to "
                    f"step {step}. Look at {rows}, or lower the learning rate. "
                    f"{self._stage}.train.stop_after_skipped={self._limit} is how many are borne"
                )

    def _keep(self, step: int, batch: Any) -> str:
        """Writes the batch where there is room for it, and says where."""
        if self._folder is None:
            return ""
        leaves = jax.tree_util.tree_leaves_with_path(batch)
        arrays = {jax.tree_util.keystr(path, simple=True, separator="."): to_host(leaf) for path, leaf in leaves}
        path = self._folder / f"step-{step}.npz"
        if not is_main() or (not path.exists() and len(list(self._folder.glob("*.npz"))) >= MAX_BAD_BATCHES):
            return ""
        self._folder.mkdir(exist_ok=True)
        # NumPy's files know no bfloat16
        known: Any = {k: x.astype(np.float32) if x.dtype.kind == "V" else x for k, x in arrays.items()}
        np.savez(path, **known)
        return f"; batch in {path}"
