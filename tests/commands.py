"""Real `mpo` processes, without the seconds that importing takes."""

import json
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MPO = [
    sys.executable,
    "-c",
    "import signal; signal.signal(2, signal.default_int_handler); from mpo_jax.cli import main; main()",
]
"""`mpo` as a shell starts it in the foreground; the tests themselves may run in the background, with SIGINT ignored."""

SERVER = """
import json, os, signal, sys, warnings
warnings.simplefilter("ignore")  # no thread of JAX runs yet when this forks
from mpo_jax import cli
from mpo_jax.cli import app
import mpo_jax.cli.run

for line in sys.stdin:
    arguments, output, pause = json.loads(line)
    child = os.fork()
    if child == 0:
        if pause:
            import time
            from mpo_jax.runtime.passes import Pass
            check = Pass.check
            Pass.check = lambda self: (time.sleep(pause), check(self))[1]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = ["mpo", *arguments]
        cli.main()
        sys.exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Starts a process for each command it reads; tells its id and its status."""


class Commands:
    """Real `mpo` processes, one at a time.

    Args:
      folder: for their output.
      config: given to every command.
      settings: likewise.
    """

    def __init__(self, folder: Path, config: Path, settings: Sequence[str]):
        self.output, self._config, self._settings = folder / "output.txt", str(config), settings
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def start(self, command: str, *overrides: str, pause: float = 0.0) -> int:
        """Starts a command.

        Args:
          pause: seconds that each batch of a pass takes longer, so that a signal can meet it.
        """
        line = [command, self._config, *self._settings, *overrides], str(self.output), pause
        self.server.stdin.write((json.dumps(line) + "\n").encode())
        self.process = int(self.server.stdout.readline())
        return self.process

    def signal(self, number: int) -> None:
        subprocess.run(["kill", f"-{int(number)}", str(self.process)], check=True)

    def ended(self, seconds: float = 0.0) -> bool:
        return bool(select.select([self.server.stdout], [], [], seconds)[0])

    def status(self) -> int:
        return int(self.server.stdout.readline())

    def run(self, *arguments: str) -> None:
        self.start(*arguments)
        assert self.status() == 0, self.said()

    def said(self) -> str:
        return self.output.read_text()

    def last_line(self) -> str:
        return self.said().splitlines()[-1]

    def close(self) -> None:
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()


def handles_signals(process: int) -> bool:
    """Whether the process has a handler of SIGTERM."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
