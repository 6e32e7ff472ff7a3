"""What ends a command with a message instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can mend: the message says what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2; `--debug` shows the traceback.
    """


class NotFinite(UserError):
    """A model's outputs hold NaN or infinity, so whatever was made of them would mean nothing."""

    def __init__(self, model: str, what: str):
        super().__init__(
            f"{model}: {what} are not finite (NaN or infinity). Its weights are damaged, or its arithmetic overflows: "
            "try model.compute_dtype=float32; if that does not help, fetch the model again, or export an earlier "
            "checkpoint of its training"
        )


class NothingSelected(UserError):
    """A split of the pairs leaves nothing to train on: one run of a table that the others can do without."""


class Preempted(Exception):
    """SIGTERM came while a stage trained, and a checkpoint of the step at hand is saved.

    The command line prints the message and exits with status 143.
    """

    def __init__(self, step: int):
        super().__init__(f"terminated; a checkpoint of step {step} is saved; the same command goes on from it")
        self.step = step
