"""The one error that is meant for the user's eyes."""


class UserError(Exception):
    """A mistake that the user can mend: the message says what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2; `--debug` shows the traceback.
    """
