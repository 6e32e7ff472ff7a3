"""Exceptions that end a command with a message instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can fix: the message says what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2; `--debug` shows the traceback.
    """


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


class Preempted(Exception):
    """SIGTERM arrived during training, and a checkpoint of the current step has been saved.

    The command line prints the message and exits with status 143.
    """

    def __init__(self, step: int):
        super().__init__(f"terminated; a checkpoint of step {step} is saved; the same command resumes from it")
        self.step = step


class PassPreempted(Preempted):
    """A stop was asked for during a pass over many rows, and its finished rows are on disk."""

    def __init__(self, name: str, done: int, total: int):
        super().__init__(done)
        self.args = (
            f"stopped after {done} of {total} rows of {name}, which are saved; the same command goes on from there",
        )
