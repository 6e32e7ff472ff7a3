"""tests.slowest: every phase's share is counted once, and named at the end of a run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.covering import the_rest_thorough
from tests.slowest import reason

FILE = """
import subprocess, sys, time
import jax, pytest

@pytest.fixture
def slow():
    time.sleep(0.6)
    yield

def test_compiles(slow):
    jax.jit(lambda x: x + 1)(1.0).block_until_ready()
    time.sleep(0.6)

def test_starts_a_process():
    work = "import time\\nwhile time.process_time() < 0.5: pass"  # however fast the machine is
    subprocess.run([sys.executable, "-c", work], check=True)
    time.sleep(0.7)

def test_is_quick():
    pass
"""
# neither of test_compiles' phases comes to it alone; a busy machine may hold up test_is_quick for some of it
PLUGIN = "import tests.slowest as slowest\nslowest.LEAST_S = 1.1\nfrom tests.slowest import *\n"


@pytest.mark.parametrize("workers", the_rest_thorough([((),), (("-n", "2"),)]))
def test_the_slowest_are_named_with_what_they_did(tmp_path, workers):
    (tmp_path / "test_some.py").write_text(FILE)
    (tmp_path / "conftest.py").write_text(PLUGIN)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", *workers, "."]
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " s  " in line]
    compiles, process = (next(line for line in lines if name in line) for name in ("compiles", "starts_a_process"))
    assert len(lines) == 2 and "slowest 2 tests" in done.stdout, done.stdout
    assert "compiling 1 programs" in compiles and "other processes" not in compiles
    assert "other processes" in process and "programs" not in process


def test_reasons():
    assert reason(10, {"programs": 3, "compiling": 8.0}) == "compiling 3 programs 8.0 s"
    assert reason(10, {"programs": 3, "compiling": 1.0, "processes": 2.0}) == (
        "compiling 3 programs 1.0 s, other processes 2.0 s of the processor, mostly this process's own work"
    )
    assert reason(10, {"processes": 9.0}) == "other processes 9.0 s of the processor"
    assert reason(10, {}) == "mostly this process's own work"
