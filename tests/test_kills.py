"""A real process is killed at random moments in every stage, and goes on to the very same bits.

MPO_KILLS=20 kills each training that many times in place of three, and every pass over rows a third as often in place
of two passes once; MPO_KILLS_SEED draws other moments.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mpo_jax.data.pair_table import PairTable
from tests.commands import Commands

MICRO = Path(__file__).parent / "configs" / "micro.yaml"
STAGES = ("sft", "reward", "dpo", "ppo")
KILLS = int(os.environ.get("MPO_KILLS", "3"))
pytestmark = [pytest.mark.processes, pytest.mark.timeout(200 * KILLS)]
SEED = os.environ.get("MPO_KILLS_SEED", "0")
PASSES = (("select", "samples"), ("evaluate", "measures"))
if KILLS > 3:
    PASSES = (
        ("reward", "held-out"), ("select", "samples"), ("select", "scores"), ("dpo", "reference"),
        ("evaluate", "samples"), ("evaluate", "measures"),
    )  # fmt: skip
"""Passes over many rows with their stages, in the order of a run."""
STEPS = 4 * KILLS
"""So that a stage lasts through its kills."""
SETTINGS = (
    f"runtime.compilation_cache={jax.config.jax_compilation_cache_dir}", "runtime.tensorboard=false",
    *(f"{stage}.train.{key}" for stage in STAGES for key in (f"steps={STEPS}", "checkpoint_every=1")),
    "reward.train.checkpoint_every=2", "ppo.train.log_every=2", "ppo.kl.adaptive=true", "ppo.minibatches=2",
    "ppo.extras.ema_decay=0.9", "reward.train.batch_size=4", "select.batch_size=4", "dpo.train.batch_size=4",
    "evaluate.batch_size=2", "runtime.save_minutes=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    made = Commands(tmp_path_factory.mktemp("commands"), MICRO, SETTINGS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory) -> Path:
    """A workdir in which every stage was made without a kill."""
    workdir = tmp_path_factory.mktemp("whole")
    commands.run("evaluate", f"workdir={workdir}")
    return workdir


def folder_of(workdir: Path, stage: str) -> Path:
    (folder,) = workdir.glob(f"stages/{stage}-*")
    return folder


def without(whole: Path, stage: str, target: Path) -> Path:
    """A copy of the workdir, without that stage's artifact."""
    shutil.copytree(whole, target, symlinks=True)
    shutil.rmtree(folder_of(target, stage))
    return target


def log(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s", "perf"))} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    """Every number but timings, every model file to the bit, and so the optimiser: its bytes are in state_hash."""
    assert one.name == other.name and log(one) == log(other) and "state_hash" in log(one)[-1]
    models = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert models and models == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    for model in models:
        assert (one / model).read_bytes() == (other / model).read_bytes(), model


def finished(workdir: Path, stage: str) -> bool:
    return bool(list(workdir.glob(f"stages/{stage}-*")))


def lines(workdir: Path, stage: str) -> int:
    paths = list(workdir.glob(f"stages/.{stage}-*.partial/metrics.jsonl"))
    return paths[0].read_bytes().count(b"\n") if paths else -1


def assert_all_same(one: Path, other: Path) -> None:
    for stage in STAGES:
        assert_same(folder_of(one, stage), folder_of(other, stage))
    for table in folder_of(one, "select").glob("*.parquet"):
        assert table.read_bytes() == (folder_of(other, "select") / table.name).read_bytes()


def test_two_runs_are_equal_to_the_bit(commands, whole, tmp_path):
    commands.run("ppo", f"workdir={tmp_path}")
    assert_all_same(whole, tmp_path)


def wait_for_a_moment(commands, workdir: Path, stage: str, attempt: int, chance: random.Random) -> None:
    """Waits for one of three kinds of moments of a stage: at its start, while it saves a checkpoint, or later."""
    partial = f"stages/.{stage}-*.partial"
    before = lines(workdir, stage)
    begun = lambda: list(workdir.glob(f"{partial}/recipe.json"))  # noqa: E731
    saving = lambda: list(workdir.glob(f"{partial}/checkpoints/*tmp*"))  # noqa: E731
    trained = lambda: lines(workdir, stage) not in (-1, before)  # noqa: E731
    reached = (begun, lambda: trained() and saving(), trained)[attempt % 3]
    while not commands.ended() and not reached() and not finished(workdir, stage):
        time.sleep(0.001)
    if attempt % 3 != 1:
        commands.ended(chance.uniform(0.0, 0.2))


def test_killed_at_any_moment_it_goes_on_and_ends_equal(commands, whole, tmp_path):
    """One command, killed several times in every stage, and then left alone to finish."""
    chance = random.Random(SEED)
    kills = dict.fromkeys(STAGES, 0)
    for stage in ("sft", "reward", "select", "dpo", "ppo"):
        for attempt in range(KILLS if stage in STAGES else 1):
            if finished(tmp_path, stage):
                break
            commands.start("ppo", f"workdir={tmp_path}")
            wait_for_a_moment(commands, tmp_path, stage, attempt, chance)
            if not commands.ended():
                commands.signal(signal.SIGKILL)
            if (status := commands.status()) == 0:
                break
            assert status == -signal.SIGKILL, commands.said()
            if stage in STAGES:
                kills[stage] += lines(tmp_path, stage) > 0
    print(f"killed while training: {kills}")
    assert all(count > 0 for count in kills.values()), kills
    commands.run("ppo", f"workdir={tmp_path}")
    assert_all_same(whole, tmp_path)
    assert "is broken" not in commands.said(), "no kill may leave a checkpoint that only looks whole"


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_sigterm_saves_says_so_and_the_same_command_goes_on(commands, whole, tmp_path, stage):
    workdir = without(whole, stage, tmp_path / "ended")
    command = stage, f"workdir={workdir}", f"{stage}.train.checkpoint_every=1000"
    commands.start(*command)
    while not commands.ended() and lines(workdir, stage) < 1:
        time.sleep(0.001)
    commands.signal(signal.SIGTERM)
    assert commands.status() == 143
    (saved,) = (path.name for path in workdir.glob(f"stages/.{stage}-*.partial/checkpoints/*"))
    name = folder_of(whole, stage).name
    assert commands.last_line() == (
        f"terminated in {name} of {workdir}: stopped after step {saved}, which is saved; the same command goes on from "
        "there"
    )
    commands.run(*command)
    one, other = folder_of(whole, stage), folder_of(workdir, stage)
    assert log(one)[-1]["state_hash"] == log(other)[-1]["state_hash"]
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()


# ---- passes over rows ----------------------------------------------------------------------------------------------


def kept(workdir: Path, stage: str, name: str) -> int:
    """The number of whole parts of an unfinished stage's pass."""
    found = list(workdir.glob(f"stages/.{stage}-*.partial/parts/{name}/manifest.json"))
    return len(json.loads(found[0].read_text())["parts"]) if found else 0


def end_in_pass(commands, workdir: Path, stage: str, name: str, sent: signal.Signals, chance: random.Random) -> bool:
    """Sends a signal to `mpo evaluate` at a random moment of one pass; whether it ended there."""
    later = kept(workdir, stage, name) + chance.choice((1, 2))
    commands.start("evaluate", f"workdir={workdir}", pause=0.05)
    while not commands.ended() and kept(workdir, stage, name) < later and not finished(workdir, stage):
        time.sleep(0.001)
    if not commands.ended(chance.uniform(0.0, 0.06)):
        commands.signal(sent)
    status = commands.status()
    if status == 0:
        return False
    assert status == (-sent if sent == signal.SIGKILL else 143), commands.said()
    said, there = (
        commands.last_line(),
        f"rows of {stage}'s {name}, which are saved; the same command goes on from there",
    )
    if sent == signal.SIGTERM and not said.endswith(there):
        # the signal came when the pass was over
        assert re.fullmatch(r"terminated.*: (?:.*; )?the same command goes on from .*", said), said
        return False
    return not finished(workdir, stage) and kept(workdir, stage, name) >= later


def rates(folder: Path, count: int) -> tuple[list[int], float]:
    """The steps of a sampling stage's lines, and the rate of ends that they make together."""
    lines = log(folder)
    steps = [line["step"] for line in lines]
    sizes = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    assert steps[-1] == sum(sizes) == count
    return steps, sum(n * line["eos_rate"] for n, line in zip(sizes, lines, strict=True))


def assert_same_passes(one: Path, other: Path) -> None:
    """What a stage leaves besides metrics and manifest, to the bit."""
    assert one.name == other.name
    left = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in (one, other)]
    assert left[0] == left[1]
    for path in left[0]:
        if path.suffix in (".parquet", ".jsonl", ".safetensors") and path.name != "metrics.jsonl":
            assert (one / path).read_bytes() == (other / path).read_bytes(), path


def test_killed_in_any_pass_it_goes_on_with_the_rows_that_are_done(commands, whole, tmp_path):
    """kill -9 and SIGTERM in turn, through all passes of one run; what was done is not made again."""
    workdir = tmp_path / "w"
    shutil.copytree(whole, workdir, symlinks=True)
    stages = {stage for stage, _ in PASSES}
    for stage in stages:
        shutil.rmtree(folder_of(workdir, stage))
    chance = random.Random(SEED)
    signals = [signal.SIGKILL, signal.SIGTERM]
    ended, begin = dict.fromkeys(PASSES, 0), len(commands.said())
    for number, (stage, name) in enumerate(PASSES):
        for attempt in range(max(KILLS // 3, 1)):
            if finished(workdir, stage):
                # a signal came after the pass: it is made once more
                shutil.rmtree(folder_of(workdir, stage))
            ended[stage, name] += end_in_pass(commands, workdir, stage, name, signals[(number + attempt) % 2], chance)
    print(f"ended in passes: {ended}")
    commands.run("evaluate", f"workdir={workdir}")
    assert all(ended.values()), ended
    said = commands.said()[begin:]
    for stage, name in ended:
        assert f"  {stage}'s {name}: " in said, "a run has begun with the rows of the run before"
    assert "is damaged" not in said and "is missing" not in said, "no kill may damage a part"
    for stage in stages:
        assert_same_passes(folder_of(whole, stage), folder_of(workdir, stage))
    for stage in ("select", "evaluate"):
        count = log(folder_of(whole, stage))[-1]["step"]
        steps, rate = rates(folder_of(workdir, stage), count)
        wanted_steps, wanted = rates(folder_of(whole, stage), count)
        assert steps == wanted_steps and abs(rate - wanted) < 1e-6


def test_another_machine_of_two_devices_goes_on_from_the_bucket(commands, whole, tmp_path):
    workdir, bucket = tmp_path / "w", f"runtime.bucket=file://{tmp_path}/bucket"
    shutil.copytree(whole, workdir, symlinks=True)
    for stage in ("dpo", "ppo", "select", "evaluate"):
        shutil.rmtree(folder_of(workdir, stage))
    commands.start("select", f"workdir={workdir}", bucket, pause=0.05)
    # a part is sent after it is written and before the next one
    while not commands.ended() and kept(workdir, "select", "samples") < 3:
        time.sleep(0.001)
    commands.signal(signal.SIGKILL)
    assert commands.status() == -signal.SIGKILL, commands.said()
    shutil.rmtree(workdir)
    begin = len(commands.said())
    commands.run("select", f"workdir={workdir}", bucket, "runtime.cpu_devices=2", "mesh.data=2")
    said = commands.said()[begin:]
    assert "  select's samples: " in said and " of 47 rows are there" in said
    assert "make sft" not in said and "make select" in said
    one, other = (PairTable.read(folder_of(folder, "select")) for folder in (whole, workdir))
    ids, others = ([[side.tolist() for side in pair] for pair in table.ids] for table in (one, other))
    assert ids == others and list(one.prompt) == list(other.prompt)
    np.testing.assert_allclose(one.score, other.score, rtol=1e-5)
    assert not list((tmp_path / "bucket").glob("stages/.*")), "unfinished stages leave nothing"
    assert not list((tmp_path / "bucket").glob("stages/select-*/parts"))
