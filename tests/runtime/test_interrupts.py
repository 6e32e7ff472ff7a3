"""mpo_jax.runtime.interrupts: what a process says and how it ends at SIGINT and SIGTERM, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time

import pytest

BEGIN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background, with SIGINT ignored
from mpo_jax.runtime import interrupts
from mpo_jax.runtime.interrupts import STOPS
interrupts.GRACE_S = 1.0
STOPS.watch()
print("there is output, not flushed")
ready = lambda: print("ready", file=sys.stderr, flush=True)
"""
SWALLOWING = """
ready()
while True:
    try:
        time.sleep(0.01)
    except BaseException:
        pass
"""
INSIDE_C = """
ready()
sorted([0] * 3, key=lambda _: time.sleep(20))
import ctypes
ctypes.CDLL(None).sleep(60)
"""
NOTED = """
with STOPS.leaving("sft-0f", lambda: "nothing is saved"), STOPS.leaving("ppo-1a", lambda: "step 2 is saved"):
    ready()
    time.sleep(60)
"""
UNKNOWN = """
with STOPS.leaving("sft-0f", lambda: 1 / 0):
    ready()
    time.sleep(60)
"""
FIRST_STEP = """
STOPS.enter(several=False)
ready()
time.sleep(60)
"""
STEP = """
block = STOPS.enter(several=False)
block.stepped = True
ready()
while STOPS.signal is None:
    time.sleep(0.01)
time.sleep(2.5)
STOPS.leave(block, None)
"""
STUCK = """
block = STOPS.enter(several=False)
block.stepped = True
ready()
while STOPS.signal is None:
    time.sleep(0.01)
STOPS.leave(block, KeyError())
time.sleep(60)
"""
TALKING = """
import os, pathlib
interrupts.shutil.rmtree = lambda *_, **__: time.sleep(0.5)  # the time between the last line and the end
with STOPS.removing(pathlib.Path("scratch")):
    ready()
    while True:
        # whole lines: of a line in two parts, the message could come between
        os.write(1, b"compiles 2 programs\\n")
        os.write(2, b"a warning\\n")
        time.sleep(0.001)  # a full pipe would hold a line back until after the message
"""
WAITS = "the step or batch at hand is finished and saved first; a second signal ends the process at once\n"


def run(program: str, *signals: float, number: int = signal.SIGINT, **options) -> tuple[int, str, float]:
    """Status, standard error and seconds from the first signal on, of a program that gets signals at these seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    try:
        assert process.stderr.readline() == "ready\n"
        begin = time.monotonic()
        for at in signals:
            time.sleep(max(begin + at - time.monotonic(), 0))
            process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert output == "there is output, not flushed\n"
        return process.returncode, errors, time.monotonic() - begin
    finally:
        process.kill()


def test_nothing_follows_the_last_line():
    """The main thread goes on until the process has ended, and prints all the while."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + TALKING], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while process.stdout.readline() != "a warning\n":
            pass
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 130 and output.splitlines()[-1] == "interrupted", output[-200:]
    finally:
        process.kill()


@pytest.mark.parametrize("program", [SWALLOWING, INSIDE_C])
@pytest.mark.parametrize(("number", "status", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_it_ends_promptly_whatever_it_is_doing(program, number, status, word):
    ended, errors, seconds = run(program, 0.1, number=number)
    assert (ended, errors) == (status, f"{word}\n") and seconds < 1.0 + 0.1 + 2.0


def test_the_message_is_the_innermost_place_s():
    assert run(NOTED, 0.0)[:2] == (130, "interrupted in ppo-1a: step 2 is saved\n")
    assert run(UNKNOWN, 0.0)[:2] == (130, "interrupted\n")


def test_a_first_step_has_the_time_of_grace():
    status, errors, seconds = run(FIRST_STEP, 0.0)
    assert (status, errors) == (130, "interrupted\n") and 1.0 <= seconds < 4.0


def test_a_later_step_has_all_the_time_it_needs():
    status, errors, seconds = run(STEP, 0.0, number=signal.SIGTERM)
    assert (status, errors) == (143, f"terminated: {WAITS}terminated\n") and 2.5 <= seconds < 5.0


def test_a_second_signal_ends_it_at_once_and_one_that_a_wrapper_repeats_does_not():
    status, errors, seconds = run(STEP, 0.0, 0.05, 0.7)
    assert (status, errors) == (130, f"interrupted: {WAITS}interrupted\n") and 0.7 <= seconds < 2.0


def test_the_way_out_has_the_time_of_grace():
    """However an error is swallowed, or the interpreter's exit hangs."""
    status, errors, seconds = run(STUCK, 0.0)
    assert (status, errors) == (130, f"interrupted: {WAITS}interrupted\n") and 1.0 <= seconds < 4.0


def test_a_signal_that_an_event_loop_takes_for_itself_counts_all_the_same():
    """As uvloop does, which Orbax uses."""
    taken = "signal.set_wakeup_fd(-1)\n"
    assert run(taken + SWALLOWING, 0.0)[:2] == (130, "interrupted\n")


def test_an_ignored_signal_stays_ignored():
    """A shell's background job, and nohup."""
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nSTOPS.watch()\nready()\ntime.sleep(0.5)\n"
    program = BEGIN.replace("STOPS.watch()\n", "") + ignored
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stderr.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == b"" and process.returncode == 0


def test_output_that_nobody_reads_does_not_hold_it_up():
    """A pipe that is full, whose lock the main thread holds."""
    program = BEGIN + "ready()\nwhile True: print('x' * 1000)\n"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stderr.readline() == b"ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130 and process.stderr.read() == b"interrupted\n"
    process.stdout.close()
    process.stderr.close()


def test_a_scratch_folder_is_removed(tmp_path):
    program = f"""
import pathlib
folder = pathlib.Path({str(tmp_path)!r}) / "scratch"
folder.mkdir()
(folder / "file").touch()
with STOPS.removing(folder):
    ready()
    time.sleep(60)
"""
    assert run(program, 0.0)[0] == 130 and not os.listdir(tmp_path)
