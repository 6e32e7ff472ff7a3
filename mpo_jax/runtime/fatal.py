"""A message in place of JAX's stack trace when a process is aborted because another one died.

JAX's coordination client aborts in C++, where no Python code runs any more, and prints a stack trace of itself; the
callback that could be given to it does not work from Python (jaxlib 0.10: std::bad_cast). So a child process, this file
run as a script, passes this process's standard error on, and puts a message where the abort begins.
"""

import atexit
import contextlib
import os
import re
import subprocess
import sys

ABORT = b"Terminating process because the JAX distributed service detected fatal errors"


def explain_aborts(name: str) -> None:
    """Sends standard error through a child process, which ends with this one however that ends.

    Args:
      name: this process's, for the message.
    """
    whole = os.dup(2)
    reading, writing = os.pipe()
    # imported here: the child runs this file without the package
    from mpo_jax.errors import GOES_ON

    # its own session: a signal to all processes of a job must not end it before this process has written its last error
    command = [sys.executable, "-I", "-S", __file__, name, GOES_ON]
    child = subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL, stderr=whole, start_new_session=True)
    os.dup2(writing, 2)
    os.close(reading)
    os.close(writing)

    def finish() -> None:
        sys.stderr.flush()
        os.dup2(whole, 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)

    _finishing.callback(finish)


_finishing = contextlib.ExitStack()
finish = atexit.register(_finishing.close)
"""Returns once all output so far is passed on; needed before an exit that skips Python's own."""


def explanation(text: str, name: str, goes_on: str) -> str:
    """The message for an abort, from JAX's own reason. `goes_on`: `mpo_jax.errors.GOES_ON`."""
    unhealthy = re.search(r"stopped sending heartbeats\):\s*((?:\d+\s)+)", text)
    if unhealthy:
        who = "process " + ", ".join(unhealthy[1].split())
    elif "leader task" in text:
        who = "process 0"
    else:
        who = "another process"
    return (
        f"error{name}: {who} died, failed or cannot be reached, so this one stops too. Its own output says why; "
        f"{goes_on} what is saved\n"
    )


def _pass_on(name: str, goes_on: str) -> None:
    rest = b""
    while chunk := os.read(0, 2**16):
        rest += chunk
        begin = rest.find(ABORT)
        if begin >= 0:
            begin = rest.rfind(b"\n", 0, begin) + 1
            os.write(2, rest[:begin])
            rest = rest[begin:]
            while chunk := os.read(0, 2**16):
                rest += chunk
            os.write(2, explanation(rest.decode(errors="replace"), name, goes_on).encode())
            return
        # a line may arrive in parts; JAX's abort messages begin with an F
        line = rest.rfind(b"\n") + 1
        kept = line if rest[line : line + 1] == b"F" else len(rest)
        os.write(2, rest[:kept])
        rest = rest[kept:]
    os.write(2, rest)


if __name__ == "__main__":
    _pass_on(*sys.argv[1:])
