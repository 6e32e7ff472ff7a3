"""How a command ends: its exit status, and the error message for each kind of failure."""

import contextlib
import errno
import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn

from mpo_jax.credentials import hide
from mpo_jax.errors import GOES_ON, Preempted, UserError
from mpo_jax.runtime.interrupts import STOPS
from mpo_jax.runtime.words import printable

FAULT = 1
"""An error of ours, or a check that failed."""

MISTAKE = 2
"""A mistake of the user's, such as a misspelt key, or a full disk."""

DOES_NOT_FIT = 3
"""`mpo plan`: a program needs more memory than the target has."""

INTERRUPTED = 130
"""Typer ends a command with this status after KeyboardInterrupt."""

FULL_DISK = "No space left on device"
"""The text by which libraries in other languages report a full disk; they raise no OSError."""


@contextlib.contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """Turns an error raised inside into a message on standard error and an exit status.

    Args:
      debug: let errors through, for their traceback, which the interpreter then shows without credentials.
    """
    try:
        yield
    except UserError as error:
        if debug:
            sys.excepthook = show_traceback
            raise
        fail(str(error), MISTAKE)
    except Preempted as error:
        _stop(str(error))
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # where `mpo_jax.cli.main` did not set its own handlers
            STOPS.signal = signal.SIGINT
            _stop()
        raise
    except Exception as error:
        if debug:
            sys.excepthook = show_traceback
            raise
        _fail_unexpected(error)


def hide_leftovers() -> None:
    """Drops what Orbax's and TensorStore's threads print of an error that is raised, and so reported, as well."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def show(found: "sys.UnraisableHookArgs") -> None:
        # of each write that was under way when the first of them failed
        if found.exc_type is not RuntimeError or str(found.exc_value) != "Event loop is closed":
            before(found)

    sys.unraisablehook = show


class LogRecord(logging.LogRecord):
    """Of libraries, which log the addresses that they try again."""

    def getMessage(self) -> str:
        return hide(super().getMessage())


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints a traceback as the interpreter does; the errors in it quote addresses and answers of servers."""
    print(hide("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _fail_unexpected(error: Exception) -> NoReturn:
    # looked up, not imported: an import would start JAX to report a misspelt key
    processes = sys.modules.get("mpo_jax.runtime.processes")
    if processes and processes.is_lost_process(error):
        fail(
            f"a computation over all processes failed: {str(error).splitlines()[0]}\nMost likely another "
            f"process died or failed: its own output says why; {GOES_ON} what is saved",
            FAULT,
        )
    if isinstance(error, OSError) or FULL_DISK in str(error):
        fail(_explain(error), MISTAKE)
    fail(f"{type(error).__name__}: {error}\nThis is a fault in mpo_jax; --debug shows where.", FAULT)


def _explain(error: Exception) -> str:
    """What to do about an error of the operating system."""
    code = error.errno if isinstance(error, OSError) else None
    where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
    if code in (errno.ENOSPC, errno.EDQUOT) or FULL_DISK in str(error):
        return f"no space left on the disk{where}. Free some and run the same command again; nothing unfinished is used"
    if isinstance(error, OSError) and code in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY):
        place = error.filename2 or error.filename
        return (
            f"{place}: something else is in this place ({error.strerror}): delete it or move it away, and run the "
            "same command again"
        )
    if isinstance(error, OSError) and code == errno.ENOENT and error.filename is not None:
        return (
            f"{error.filename} is missing. If a folder was deleted or moved while the command ran, put it back or run "
            "the same command again"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{where}. Choose another folder with workdir=DIR"
    return str(error)


def _stop(text: str | None = None) -> NoReturn:
    """Ends the process after a stop that was asked for; `text`: what is saved, if it is known."""
    processes = sys.modules.get("mpo_jax.runtime.processes")
    if text is not None and processes and processes.name():
        processes.leave_last()
    if STOPS.watching:
        STOPS.end(text)
    print(STOPS.message(text), file=sys.stderr)
    _exit(STOPS.status)


def fail(message: str, status: int) -> NoReturn:
    """Prints the message, with the process's name where there are several, and ends the process."""
    # looked up, not imported: an import would start JAX to report a misspelt key
    processes = sys.modules.get("mpo_jax.runtime.processes")
    where = processes.name() if processes else ""
    print(f"error{where}: {printable(hide(message))}", file=sys.stderr)
    _exit(status)


def _exit(status: int) -> NoReturn:
    processes = sys.modules.get("mpo_jax.runtime.processes")
    if processes and processes.name():
        processes.exit_now(status)
    raise SystemExit(status)
