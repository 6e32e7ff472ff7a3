"""mpo_jax.runtime.fatal: a child passes standard error on, and says in place of JAX's abort what happened."""

import subprocess
import sys

import pytest

from mpo_jax.errors import GOES_ON
from mpo_jax.runtime.fatal import ABORT, explanation

PROGRAM = """
import os, sys
from mpo_jax.runtime import fatal
fatal.explain_aborts(" in process 1 of 2")
os.write(2, b"Files are read\\nF")
os.write(2, b"or a while \\xff")
"""
FATAL = f"""
os.write(2, b"\\nF1125 04:01:25 client.h:80] {ABORT.decode()[:20]}")
os.write(2, b"{ABORT.decode()[20:]}. UNAVAILABLE: These tasks are unhealthy (stopped sending heartbeats):\\n0\\n3\\n")
os.write(2, b"*** Check failure stack trace: ***\\n  @ 0x7f12 absl::LogMessage\\n")
os.abort()
"""


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("sys.exit('sorry')", 1), ("fatal.finish(); os._exit(3)", 3), ("os.abort()", -6)]
)
def test_all_else_is_passed_on_as_it_is(end, status):
    done = run(PROGRAM + end)
    assert done.returncode == status and done.stdout == b""
    assert done.stderr == b"Files are read\nFor a while \xff" + (b"sorry\n" if status == 1 else b"")


def test_an_abort_is_explained():
    done = run(PROGRAM + FATAL)
    assert done.returncode == -6
    before, said = done.stderr.split(b"\xff\n")
    assert before == b"Files are read\nFor a while " and said.decode() == explanation(
        "stopped sending heartbeats):\n0\n3\n", " in process 1 of 2", GOES_ON
    )
    assert said.startswith(b"error in process 1 of 2: process 0, 3 died, failed or cannot be reached")
    assert said.endswith(b"the same command goes on from what is saved\n")


def test_the_leader_s_death_is_told_by_its_lost_connection():
    assert "process 0 died" in explanation("Either the leader task was preempted/died", "", GOES_ON)
    assert "another process died" in explanation("DEADLINE_EXCEEDED", "", GOES_ON)
