"""A real process is killed at random moments in every stage that trains, and goes on to the very same bits.

MPO_KILLS=20 kills each stage that many times in place of three; MPO_KILLS_SEED draws other moments.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import pytest

from tests.commands import Commands

pytestmark = pytest.mark.unoptimised

MICRO = Path(__file__).parent / "configs" / "micro.yaml"
STAGES = ("sft", "reward", "dpo", "ppo")
KILLS = int(os.environ.get("MPO_KILLS", "3"))
SEED = os.environ.get("MPO_KILLS_SEED", "0")
STEPS = 4 * KILLS
"""So that a stage lasts through its kills."""
SETTINGS = (
    f"runtime.compilation_cache={jax.config.jax_compilation_cache_dir}", "runtime.tensorboard=false",
    *(f"{stage}.train.{key}" for stage in STAGES for key in (f"steps={STEPS}", "checkpoint_every=1")),
    "reward.train.checkpoint_every=2", "ppo.train.log_every=2", "ppo.kl.adaptive=true", "ppo.minibatches=2",
    "ppo.extras.ema_decay=0.9",
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
    commands.run("ppo", f"workdir={workdir}")
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
        f"terminated in {name}: stopped after step {saved}, which is saved; the same command goes on from there"
    )
    commands.run(*command)
    one, other = folder_of(whole, stage), folder_of(workdir, stage)
    assert log(one)[-1]["state_hash"] == log(other)[-1]["state_hash"]
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
