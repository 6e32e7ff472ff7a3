"""Two real processes of four simulated devices each, through the command line: as one process of eight, to rounding."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from filelock import FileLock

from mpo_jax.data.pair_table import PairTable
from mpo_jax.runtime import processes
from tests.commands import MPO, handles_signals
from tests.pipeline.test_pipeline import MICRO, mpo, stages

pytestmark = pytest.mark.processes

SLOW = """
import time
from mpo_jax.runtime.passes import Pass
check = Pass.check
Pass.check = lambda self: (time.sleep(1), check(self))[1]
from mpo_jax.cli import main; main()
"""
"""A program where each batch of a pass takes a second longer: JAX looks for signals once a second."""
MESH = ("mesh.data=2", "mesh.fsdp=4")
MEASURED = tuple(f"{stage}.train.eval_every=2" for stage in ("sft", "reward", "dpo", "ppo"))
CACHE = f"runtime.compilation_cache={jax.config.jax_compilation_cache_dir}"


class Pair:
    """Both processes of one command, each with its log."""

    def __init__(
        self, folder: Path, *arguments: str, own: tuple[tuple[str, ...], ...] = ((), ()), timeout: int = 100,
        program: list[str] = MPO,
    ):  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = (*arguments, CACHE, "runtime.cpu_devices=4", f"runtime.processes.coordinator=127.0.0.1:{port}")
        common += ("runtime.processes.count=2", f"runtime.processes.timeout_s={timeout}")
        self.logs = [folder / f"log-{index}" for index in range(2)]
        self.running = []
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for index, log in enumerate(self.logs):
            command = [*program, *common, f"runtime.processes.index={index}", *own[index]]
            with log.open("w") as file:
                self.running.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))

    def wait(self, timeout: float = 400) -> list[int]:
        """Exit statuses; whatever still runs at the end is killed."""
        deadline = time.time() + timeout
        try:
            return [process.wait(max(deadline - time.time(), 0.1)) for process in self.running]
        finally:
            for process in self.running:
                process.kill()

    def text(self, index: int) -> str:
        return self.logs[index].read_text()


def sampled(table: PairTable) -> list[list[list[int]]]:
    return [[side.tolist() for side in pair] for pair in table.ids]


def metrics(workdir: Path, role: str) -> list[dict]:
    return [json.loads(line) for line in (workdir / f"runs/mpo/{role}/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def together(tmp_path_factory, alone) -> tuple[Path, Pair]:
    """A run of two processes, which begins while another run holds the lock of its first stage."""
    folder = tmp_path_factory.mktemp("two")
    (name,) = (name for name in stages(alone) if name.startswith("sft-"))
    (folder / "w" / "stages").mkdir(parents=True)
    with FileLock(folder / "w" / "stages" / f".{name}.lock"):
        resting = ("runtime.offload_frozen=true", "runtime.offload_moments=true")
        pair = Pair(folder, "run", str(MICRO), f"workdir={folder / 'w'}", *MESH, *MEASURED, *resting)
        wait_until(lambda: f"waiting for {name}, which another run is making" in pair.text(0))
        assert [process.poll() for process in pair.running] == [None, None]
        time.sleep(3)
        assert not stages(folder / "w")
    assert pair.wait() == [0, 0], pair.text(0)[-3000:] + pair.text(1)[-3000:]
    return folder / "w", pair


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("one")
    assert mpo("run", MICRO, f"workdir={workdir}", *MESH, *MEASURED, "runtime.cpu_devices=8", CACHE) == 0
    return workdir


def test_every_stage_gives_one_process_s_numbers(together, alone):
    workdir, _ = together
    assert set(stages(workdir)) == set(stages(alone))
    for role in ("sft", "reward", "1-dpo", "2-ppo"):
        for two, one in zip(metrics(workdir, role), metrics(alone, role), strict=True):
            two, one = (
                {k: v for k, v in line.items() if not k.startswith(("timing_s", "perf"))} for line in (two, one)
            )
            assert two.keys() == one.keys() and two["step"] == one["step"]
            for name, value in one.items():
                # before DPO's first update every implicit reward is 0, and which is greater is rounding
                undecided = name == "rewards/accuracies" and one["step"] == 1
                # hashes of states that differ in rounding are different
                if not isinstance(value, str) and not undecided:
                    np.testing.assert_allclose(two[name], value, rtol=1e-3, atol=1e-5, err_msg=f"{role} {name}")
    tables = [PairTable.read(folder / "runs/mpo/select") for folder in (workdir, alone)]
    one, two = ([[ids.tolist() for ids in pair] for pair in table.ids] for table in tables)
    assert one == two
    np.testing.assert_allclose(tables[0].score, tables[1].score, rtol=1e-4, atol=1e-5)
    samples = [(folder / "runs/mpo/evaluate/samples.jsonl").read_text().splitlines() for folder in (workdir, alone)]
    two, one = ([json.loads(line)["response"] for line in lines] for lines in samples)
    assert two == one


def test_the_first_process_alone_writes(together):
    workdir, pair = together
    assert "which another run is making" in pair.text(0), "process 0 waited for the lock, and nothing timed out"
    assert "6 stages made" in pair.text(0) and "stages made" not in pair.text(1) and "make sft" not in pair.text(1)
    steps = [line["step"] for line in metrics(workdir, "2-ppo")]
    assert steps == sorted(set(steps)), "no line twice"
    assert (workdir / "report" / "index.html").is_file()


def lines(workdir: Path) -> int:
    """Logged steps of an unfinished SFT."""
    return sum(path.read_bytes().count(b"\n") for path in workdir.glob("stages/.sft-*.partial/metrics.jsonl"))


def wait_until(reached: Callable[[], Any], seconds: float = 200) -> None:
    deadline = time.time() + seconds
    while not reached() and time.time() < deadline:
        time.sleep(0.05)


def test_one_process_goes_on_where_two_were_killed_and_ended(tmp_path, alone):
    """kill -9 of both, then SIGTERM to one, at which both save one step; one process of as many devices goes on."""
    workdir = tmp_path / "w"
    longer = ("sft.train.steps=60", "sft.train.checkpoint_every=4")
    command = ("sft", str(MICRO), f"workdir={workdir}", *MESH, *longer)
    pair = Pair(tmp_path, *command)
    wait_until(lambda: list(workdir.glob("stages/.sft-*.partial/checkpoints/[1-9]*")))
    for process in pair.running:
        process.send_signal(signal.SIGKILL)
    pair.wait()
    assert not stages(workdir), "killed in mid stage"
    before = lines(workdir)
    pair = Pair(tmp_path, *command)
    wait_until(lambda: lines(workdir) > before)
    pair.running[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [143, 143], pair.text(0)[-3000:] + pair.text(1)[-3000:]
    (said,) = {pair.text(index).splitlines()[-1].split(": ", 1)[1] for index in range(2)}
    assert "which is saved; the same command goes on from there" in said and not stages(workdir)
    assert mpo(*command, "runtime.cpu_devices=8", CACHE) == 0
    assert mpo("sft", MICRO, f"workdir={tmp_path / 'x'}", *MESH, *longer, "runtime.cpu_devices=8", CACHE) == 0
    resumed, whole = (
        [json.loads(line) for line in next(folder.glob("stages/sft-*/metrics.jsonl")).read_text().splitlines()]
        for folder in (workdir, tmp_path / "x")
    )
    assert [line["step"] for line in resumed] == [line["step"] for line in whole] == list(range(1, 61))
    np.testing.assert_allclose([x["loss"] for x in resumed], [x["loss"] for x in whole], rtol=1e-5)


def test_two_processes_stop_in_a_pass_together_and_go_on(tmp_path, together):
    """SIGTERM to the one that does not write; the finished rows are on disk, and the next run has them in both."""
    workdir = tmp_path / "w"
    shutil.copytree(together[0], workdir, symlinks=True)
    command = ("select", str(MICRO), f"workdir={workdir}", *MESH, "select.batch_size=8", "runtime.save_minutes=0")
    pair = Pair(tmp_path, *command, program=[sys.executable, "-c", SLOW])
    wait_until(lambda: list(workdir.glob("stages/.select-*.partial/parts/samples/manifest.json")))
    pair.running[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [143, 143], pair.text(0)[-3000:] + pair.text(1)[-3000:]
    for index in range(2):
        assert "rows of select's s" in pair.text(index) and "which are saved" in pair.text(index)
    pair = Pair(tmp_path, *command)
    assert pair.wait() == [0, 0], pair.text(0)[-3000:] + pair.text(1)[-3000:]
    assert "  select's samples: " in pair.text(0) and " of 47 rows are there" in pair.text(0)
    (made,) = set(stages(workdir)) - set(stages(together[0]))
    one, other = PairTable.read(workdir / "stages" / made), PairTable.read(together[0] / "runs/mpo/select")
    assert sampled(one) == sampled(other)
    np.testing.assert_allclose(one.score, other.score, rtol=1e-4, atol=1e-5)


def test_ctrl_c_ends_both(tmp_path):
    """At once while they start; after one and the same step, which is saved, while they train."""
    workdir = tmp_path / "w"
    command = ("sft", str(MICRO), f"workdir={workdir}", *MESH, "sft.train.steps=100000")
    starting = lambda pair: all(handles_signals(process.pid) for process in pair.running)  # noqa: E731
    for reached in (starting, lambda _: lines(workdir)):
        pair = Pair(tmp_path, *command)
        wait_until(functools.partial(reached, pair))
        for process in pair.running:
            process.send_signal(signal.SIGINT)
        begin = time.time()
        assert pair.wait(60) == [130, 130], pair.text(0)[-3000:] + pair.text(1)[-3000:]
        assert not any("race" in pair.text(index) for index in range(2)), "neither Traceback nor stack trace"
        if reached is starting:
            assert time.time() - begin < 5
    (saved,) = (int(path.name) for path in workdir.glob("stages/.sft-*.partial/checkpoints/*[0-9]"))
    for index in range(2):
        assert f"interrupted in process {index} of 2 in sft-" in pair.text(index)
        assert f"stopped after step {saved}, which is saved" in pair.text(index).splitlines()[-1]
    assert not stages(workdir)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_stop_when_a_process_dies(tmp_path, victim):
    workdir = tmp_path / "w"
    pair = Pair(tmp_path, "sft", str(MICRO), f"workdir={workdir}", *MESH, "sft.train.steps=100000", timeout=5)
    wait_until(lambda: lines(workdir))
    pair.running[victim].send_signal(signal.SIGKILL)
    begin = time.time()
    survivor = pair.running[1 - victim]
    # 1 where a collective fails first, else JAX aborts
    assert survivor.wait(60) in (1, -signal.SIGABRT) and time.time() - begin < 40
    pair.wait(1)
    # of an abort another process tells, after the end of this one
    while "what is saved" not in pair.text(1 - victim) and time.time() - begin < 40:
        time.sleep(0.05)
    said = pair.text(1 - victim)
    assert f"error in process {1 - victim} of 2: " in said and "stack trace" not in said and "Traceback" not in said
    assert f"process {victim} died" in said or "another process died or failed" in said
    assert said.rstrip().endswith("the same command goes on from what is saved")
    assert not stages(workdir)


def test_a_mistake_of_one_process_stops_both(tmp_path):
    """The one that fails says why and which it is; the other does not hang."""
    own = ((), ("data.kind=pairs", "data.path=nowhere.jsonl"))
    pair = Pair(tmp_path, "sft", str(MICRO), f"workdir={tmp_path / 'w'}", *MESH, own=own, timeout=5)
    first, second = pair.wait(120)
    assert second == 2 and first != 0
    assert "error in process 1 of 2: data.path: no data file nowhere.jsonl" in pair.text(1)
    assert not list(tmp_path.glob("w/stages/.*.partial")), "process 0 waits for the other's checks"


def test_processes_that_do_not_come_are_an_error(tmp_path, capfd):
    settings = ("coordinator=127.0.0.1:1", "count=2", "index=1", "timeout_s=2")
    arguments = ["sft", str(MICRO), f"workdir={tmp_path}", *(f"runtime.processes.{setting}" for setting in settings)]
    done = subprocess.run([*MPO, *arguments], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode != 0 and not stages(tmp_path)
    assert mpo("sft", MICRO, f"workdir={tmp_path}", "runtime.processes.count=2") == 2
    assert "runtime.processes.coordinator is missing" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # the batch script itself, outside srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_launchers_are_recognised(environment, several):
    assert processes.detected(environment) is several
