"""Skipped updates, whose loss or gradient was not finite: reported, their batches saved, and their number limited."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console
from mpo_jax.runtime.processes import is_main, to_host
from mpo_jax.types import Metrics, Skips

MAX_BAD_BATCHES = 3
"""The largest number of skipped updates' batches on disk."""


class Guard:
    """Reports skipped updates, saves their batches, and stops after too many in a row.

    A step is checked once the next one has started, so that the device never waits for the host.
    """

    def __init__(self, folder: Path | None, stage: str, limit: int):
        self._folder, self._stage, self._limit = folder, stage, limit
        self._pending: tuple[int, dict[str, Skips], Any] | None = None

    def check(self, step: int, metrics: Metrics, batch: Any) -> None:
        """Takes a step that has just started, and checks the one before.

        Raises:
          UserError: if the limit is reached.
        """
        self.flush()
        self._pending = step, {name: m for name, m in metrics.items() if isinstance(m, Skips)}, batch

    def flush(self) -> None:
        """Waits for the last step taken, and checks it."""
        if self._pending is None:
            return
        (step, skips, batch), self._pending = self._pending, None
        skips = {name: skip for name, skip in jax.device_get(skips).items() if skip.count > 0}
        if not skips:
            return
        kept = self._keep(step, batch)
        for name, skip in skips.items():
            what = " ".join(filter(None, [self._stage, name.rpartition("/")[0]]))
            console.print(
                f"  [yellow]{what} step {step}: loss or gradient is not finite; update skipped "
                f"({int(skip.in_a_row)} in a row){kept}[/yellow]",
                soft_wrap=True,
            )
            if skip.in_a_row >= self._limit:
                rows = "the batches" if self._folder is None else f"the rows of the first batches, in {self._folder}"
                raise UserError(
                    f"{what}: the loss or the gradient was not finite in {int(skip.in_a_row)} updates in a row, up to "
                    f"step {step}. Look at {rows}, or lower the learning rate. "
                    f"{self._stage}.train.stop_after_skipped={self._limit} is the limit"
                )

    def _keep(self, step: int, batch: Any) -> str:
        """Saves the batch if fewer than `MAX_BAD_BATCHES` are there; the note for the message."""
        if self._folder is None:
            return ""
        leaves = jax.tree_util.tree_leaves_with_path(batch)
        arrays = {jax.tree_util.keystr(path, simple=True, separator="."): to_host(leaf) for path, leaf in leaves}
        path = self._folder / f"step-{step}.npz"
        if not is_main() or (not path.exists() and len(list(self._folder.glob("*.npz"))) >= MAX_BAD_BATCHES):
            return ""
        self._folder.mkdir(exist_ok=True)
        # .npz files have no bfloat16
        known: Any = {k: x.astype(np.float32) if x.dtype.kind == "V" else x for k, x in arrays.items()}
        np.savez(path, **known)
        return f"; batch in {path}"
