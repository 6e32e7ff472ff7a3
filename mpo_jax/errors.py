"""Exceptions that end a command with a message instead of a traceback."""

from pathlib import Path
from typing import Any

from mpo_jax.credentials import hide

GOES_ON = "the same command goes on from"
"""What every message about an end before the end says, followed by what there is to go on from."""


class UserError(Exception):
    """A mistake that the user can fix: the message says what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2; `--debug` shows the traceback. Messages quote
    what users write and what libraries say, so credentials in them are hidden.
    """

    def __init__(self, *args: Any):
        super().__init__(*(hide(one) if isinstance(one, str) else one for one in args))


class Damaged(UserError):
    """A file of a workdir is missing, damaged or of another shape than the one that was written.

    Args:
      path: the file.
      why: what is wrong with it, after its name: "is empty".
      remedy: what to do, in the imperative.
    """

    def __init__(self, path: Path, why: str, remedy: str):
        super().__init__(f"{path} {why}: {remedy}")


class NotFinite(UserError):
    """A model's outputs contain NaN or infinity, so results computed from them would be meaningless."""

    def __init__(self, model: str, what: str):
        super().__init__(
            f"{model}: {what} are not finite (NaN or infinity). Its weights are damaged, or its arithmetic overflows: "
            "try model.compute_dtype=float32; if that does not help, fetch the model again, or export an earlier "
            "checkpoint of its training"
        )


class NothingSelected(UserError):
    """A split of the pairs leaves nothing to train on; a table skips that run and continues with the others."""


class CheckpointsLost(UserError):
    """No checkpoint of a stage could be read; they are removed, and the stage can only begin anew."""


class Preempted(Exception):
    """A stop was asked for, and what is done up to a step has been saved.

    The command line prints the message and exits with status 130 after SIGINT, and 143 after SIGTERM.

    Args:
      unit: what is counted, in the singular.
    """

    def __init__(self, step: int, unit: str = "step"):
        super().__init__(f"stopped after {unit} {step}, which is saved; {GOES_ON} there")
        self.step = step


class PassPreempted(Preempted):
    """A stop was asked for during a pass over many rows, and its finished rows are on disk."""

    def __init__(self, name: str, done: int, total: int):
        super().__init__(done)
        self.args = (f"stopped after {done} of {total} rows of {name}, which are saved; {GOES_ON} there",)
