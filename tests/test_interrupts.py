"""A real command is stopped at random moments, and goes on to the very same bits.

MPO_INTERRUPTS=20 stops a whole run that many times, in place of four stops of a run up to DPO;
MPO_INTERRUPTS_SEED draws other moments.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tests.commands import MPO, Commands, handles_signals
from tests.runtime.test_interrupts import WAITS, run
from tests.test_kills import MICRO, STAGES, assert_same, folder_of

pytestmark = pytest.mark.processes

INTERRUPTS = int(os.environ.get("MPO_INTERRUPTS", "4"))
SEED = os.environ.get("MPO_INTERRUPTS_SEED", "0")
COMMAND = "run" if INTERRUPTS > 4 else "dpo"
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
LONGEST_S = 5.0
SETTINGS = f"runtime.compilation_cache={jax.config.jax_compilation_cache_dir}", "runtime.tensorboard=false"
LAST_LINE = (
    r"(interrupted|terminated)(| in [a-z]+-[0-9a-f]+ of \S+: (stopped after (step \d+, which is|\d+ of \d+ rows of "
    r"[\w' -]+, which are) saved|step \d+ is saved|"
    r"no (step|row) is saved yet|the same command goes on from the rows that are saved)"
    r"(; the same command goes on from .+|; the same command begins it anew|)"
    r"|: the same command goes on from the stages that are finished(| in \S+))"
)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    made = Commands(tmp_path_factory.mktemp("commands"), MICRO, SETTINGS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory) -> tuple[Path, float]:
    """A workdir made without a stop, and the seconds that takes."""
    workdir, begin = tmp_path_factory.mktemp("whole"), time.monotonic()
    commands.run(COMMAND, f"workdir={workdir}")
    return workdir, time.monotonic() - begin


def is_done(commands) -> bool:
    """Whether the command has printed its last line."""
    return commands.said() != "" and commands.last_line().startswith(("report: ", "mpo: "))


def stopped(commands, number: int) -> float | None:
    """Seconds from the signal to the end; None where the command had finished before."""
    done, before = is_done(commands), len(commands.said())
    commands.signal(number)
    begin = time.monotonic()
    assert commands.ended(120), "swallowed"
    seconds, status, said = time.monotonic() - begin, commands.status(), commands.said()
    if done and status in (0, -number):
        # while the interpreter ends it has no handlers any more
        return None
    assert status == STATUS[number], said
    assert "Traceback" not in said and "Fatal" not in said and said.endswith("\n")
    # a step at hand may be compiled in that time, so it has no limit
    assert seconds < LONGEST_S or WAITS in said[before:], said
    assert re.fullmatch(LAST_LINE, commands.last_line()), said
    return seconds


def assert_equal(expected: Path, found: Path) -> None:
    """Metrics, models, pairs and samples to the bit."""
    for folder in expected.glob("stages/*"):
        stage = folder.name.split("-")[0]
        if stage in STAGES:
            assert_same(folder, folder_of(found, stage))
        for path in [*folder.glob("*.parquet"), *folder.glob("samples.jsonl")]:
            assert path.read_bytes() == (found / "stages" / folder.name / path.name).read_bytes()


def wait_for_a_moment(commands, workdir: Path, stage: str | None, chance: random.Random, seconds: float) -> None:
    """Waits until the stage has begun, if one is named, and then for a random time."""
    while stage and not commands.ended() and not list(workdir.glob(f"stages/.{stage}-*.partial/recipe.json")):
        time.sleep(0.01)
    commands.ended(chance.uniform(0.0, seconds))


def test_stopped_at_any_moment_it_goes_on_and_ends_equal(commands, whole, tmp_path):
    """While it starts or in any of its stages, which is made again each time that it was finished."""
    expected, length = whole
    workdir, chance, delays = tmp_path / "stopped", random.Random(SEED), []
    shutil.copytree(expected, workdir, symlinks=True)
    lasts = {
        manifest.parent.name.split("-")[0]: json.loads(manifest.read_text())["seconds"]
        for manifest in expected.glob("stages/*/manifest.json")
    }
    moments = {None: length - sum(lasts.values())} | lasts
    while len(delays) < INTERRUPTS:
        stage = chance.choice(list(moments))
        for folder in workdir.glob(f"stages/{stage}-*"):
            shutil.rmtree(folder)
        commands.output.write_text("")
        commands.start(COMMAND, f"workdir={workdir}")
        wait_for_a_moment(commands, workdir, stage, chance, moments[stage])
        if commands.ended():
            assert commands.status() == 0 and is_done(commands), commands.said()
        elif (seconds := stopped(commands, chance.choice(list(STATUS)))) is not None:
            delays.append(seconds)
            print(f"{seconds:.2f} s: {commands.last_line()}")
    print(f"the longest of {len(delays)} stops took {max(delays):.2f} s, the whole run {length:.1f} s")
    commands.run(COMMAND, f"workdir={workdir}")
    assert_equal(expected, workdir)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says which signals are handled")
def test_stopped_in_its_imports(tmp_path):
    chance = random.Random(SEED)
    module = [sys.executable, "-m", "mpo_jax.cli"]
    for command, number in [(MPO, signal.SIGINT), (module, signal.SIGTERM)] * max(1, INTERRUPTS // 8):
        command = [*command, "run", str(MICRO), *SETTINGS, f"workdir={tmp_path}"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not handles_signals(process.pid):
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 2.0))
        process.send_signal(number)
        begin = time.monotonic()
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == STATUS[number] and time.monotonic() - begin < LONGEST_S
        assert re.fullmatch(LAST_LINE, errors.rstrip("\n")), errors
        assert not list(tmp_path.glob("stages/*/manifest.json"))


BUSY = """
import jax, jax.numpy as jnp
def many(x):
    for k in range(1500):
        x = jnp.sin(x @ x) + jnp.cumsum(x, axis=k % 2)
    return x
compiling = jax.jit(many).lower(jnp.ones((64, 64))).compile
endless = jax.jit(lambda k: jax.lax.while_loop(lambda k: k >= 0, lambda k: (k + 1) % 10, k))
running = lambda: endless(0).block_until_ready()
"""


@pytest.mark.parametrize("what", ["compiling", "running"])
def test_a_second_signal_ends_a_computation_in_which_python_handles_none(what):
    """XLA compiles or computes through both."""
    program = f"{BUSY}\nblock = STOPS.enter(several=False)\nblock.stepped = True\nready()\n{what}()\n"
    status, errors, seconds = run(program, 1.0, 2.0)
    assert (status, errors) == (130, f"interrupted: {WAITS}interrupted\n") and 2.0 <= seconds < 4.0


def test_a_first_signal_ends_a_compilation_before_any_step():
    status, errors, seconds = run(f"{BUSY}\nready()\ncompiling()\n", 1.0)
    assert (status, errors) == (130, "interrupted\n") and 1.0 <= seconds < 3.0
