"""Each program is compiled once a shape: counted in the real loops, over runs of one process, and over processes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from mpo_jax.config.schema import RuntimeConfig
from mpo_jax.data.batches import TrainBatches
from mpo_jax.stages import compiling
from mpo_jax.training.tracker import Tracker
from mpo_jax.types import Packed
from tests.pipeline.test_pipeline import MICRO, mpo

pytestmark = pytest.mark.thorough

STAGES = ("sft", "reward", "dpo", "ppo")
PACKED = ("sft", "reward", "dpo")
# sizes that no other test has, so that none of their programs is there already; posts of two widths
SETTINGS = (
    "model.architecture.intermediate_size=40", "model.architecture.max_positions=96",
    "data.toy.num_fillers=3", "text.max_prompt_tokens=64",
    "sft.train.steps=4", "reward.train.steps=4", "dpo.train.steps=4", "ppo.train.steps=4", "runtime.tensorboard=false",
    *(f"{stage}.train.log_every=1" for stage in STAGES),
)  # fmt: skip
LONGER = ("sft.train.steps=5", "reward.train.steps=5", "dpo.train.steps=5", "ppo.train.steps=5")


class Loop(NamedTuple):
    """What one stage's training loop compiled, and the widths of its batches.

    Attributes:
      compiled: (function's name, steps finished before) of every program.
      widths: of the training batches: of prompt and response, or micro-batches, rows and columns if they are packed.
    """

    compiled: list[tuple[str, int]]
    widths: set[tuple[int, ...]]

    @property
    def names(self) -> Counter[str]:
        return Counter(name for name, _ in self.compiled)


def watched(workdir: Path, *overrides: str) -> dict[str, Loop]:
    """Runs up to PPO in this process; a loop lasts from its first program compiled ahead, or from its tracker's first
    moment, to its last step."""
    loops: dict[str, Loop] = {}
    now: list[Any] = ["", 0]
    begin, update, take = Tracker.__init__, Tracker.update, TrainBatches.__getitem__
    ahead = compiling.compile_all

    def on_compilation(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and now[0]:
            loops[now[0]].compiled.append((str(about["fun_name"]), now[1]))

    def watched_begin(self: Tracker, folder: Path, stage: str, num_steps: int, **rest: Any) -> None:
        begin(self, folder, stage, num_steps, **rest)
        if stage in STAGES:
            loops.setdefault(stage, Loop([], set()))
            now[:] = [stage, 0]

    def watched_ahead(each: Any, *rest: Any) -> Any:
        stage = each[0][0].stage
        loops[stage] = Loop([], set())
        now[:] = [stage, 0]
        return ahead(each, *rest)

    def watched_update(self: Tracker, step: int, *rest: Any, **options: Any) -> Any:
        logged = update(self, step, *rest, **options)
        now[1] = step
        if step == self.num_steps:
            now[0] = ""
        return logged

    def watched_take(self: TrainBatches, k: int) -> Any:
        batch = take(self, k)
        if now[0]:
            rows = batch.rows
            packed = isinstance(rows, Packed)
            loops[now[0]].widths.add(rows.ids.shape if packed else (rows.prompt.shape[1], rows.response.shape[2]))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "__init__", watched_begin)
        patch.setattr(Tracker, "update", watched_update)
        patch.setattr(TrainBatches, "__getitem__", watched_take)
        patch.setattr(compiling, "compile_all", watched_ahead)
        jax.monitoring.register_event_duration_secs_listener(on_compilation)
        try:
            assert mpo("ppo", str(MICRO), f"workdir={workdir}", *SETTINGS, *overrides) == 0
        finally:
            jax.monitoring.unregister_event_duration_listener(on_compilation)
    assert set(loops) == set(STAGES)
    return loops


class Runs(NamedTuple):
    """One after another: one width, then a longer run of several widths, the first one's among them; then packed rows.

    The second and third compile ahead, in threads: what their steps did not find there they would compile again.

    Attributes:
      losses: of the second and the third run's steps, by stage.
    """

    first: dict[str, Loop]
    second: dict[str, Loop]
    packed: dict[str, Loop]
    losses: tuple[dict[str, list[float]], dict[str, list[float]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    workdir, other = tmp_path_factory.mktemp("compilation"), tmp_path_factory.mktemp("packed")
    several = ("text.length_buckets=3", "runtime.compile_threads=2", *LONGER)
    first = watched(workdir, "text.packed=false", "text.length_buckets=1")
    second, padded = watched(workdir, "text.packed=false", *several), losses(workdir)
    return Runs(first, second, watched(other, *several), (padded, losses(other)))


def losses(workdir: Path) -> dict[str, list[float]]:
    """The losses of all steps of a workdir's runs of five steps, by stage."""
    found = {}
    for stage in PACKED:
        for path in sorted(workdir.glob(f"stages/{stage}-*/metrics.jsonl")):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            if lines[-1]["step"] == 5:
                found[stage] = [line["loss"] for line in lines if "loss" in line]
    return found


def updates(stage: str) -> int:
    """Models that a stage trains: PPO an actor and a critic."""
    return 2 if stage == "ppo" else 1


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_compiled_after_the_first_step(runs, stage):
    loop = runs.first[stage]
    assert len(loop.widths) == 1
    assert loop.names["jit(update)"] == updates(stage)
    # the state's hashes come with the first checkpoint: a small program for each kind of leaf
    assert not [name for name, steps in loop.compiled if steps > 0 and name != "jit(hash_leaf)"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_longer_run_compiles_its_new_widths_alone(runs, stage):
    """The learning rate is an argument of the step, and the length of a run is no part of any program."""
    loop, known = runs.second[stage], runs.first[stage].widths
    new = len(loop.widths - known)
    assert known <= loop.widths and new == 1
    assert loop.names["jit(update)"] == updates(stage) * new
    assert all(count <= updates(stage) * new for count in loop.names.values())


@pytest.mark.parametrize("stage", PACKED)
def test_packed_rows_compile_one_update_whatever_their_lengths(runs, stage):
    """Ahead of the first step, in threads, from the stage's own list of programs: no step compiles it again."""
    loop = runs.packed[stage]
    assert len(loop.widths) == 1 and len(runs.second[stage].widths) > 1
    assert loop.names["jit(update)"] == 1
    assert not [name for name, steps in loop.compiled if steps > 0 and name != "jit(hash_leaf)"]


def test_packed_samples_are_scored_and_learned_from_by_one_program_whatever_the_prompts_width(runs):
    """All programs are compiled ahead, and no step compiles any again."""
    loop = runs.packed["ppo"]
    assert len(loop.widths) == 2
    assert (loop.names["jit(score)"], loop.names["jit(update)"]) == (1, 2)
    small = {"hash_leaf", "measure", "fill"}
    assert not [name for name, steps in loop.compiled if steps > 0 and name not in {f"jit({one})" for one in small}]


@pytest.mark.parametrize("stage", PACKED)
def test_packed_rows_give_the_losses_of_padded_ones(runs, stage):
    """Step by step through real stages: the same batches in the same order. Each stage starts where the last ended."""
    padded, packed = (found[stage] for found in runs.losses)
    assert len(packed) == 5
    np.testing.assert_allclose(packed, padded, rtol=1e-4)


@pytest.mark.parametrize("name", ["jit(begin)", "jit(finish)", "jit(score)"])
def test_rollouts_are_compiled_once_a_width(runs, name):
    """Prefill, decoding, and the scoring by all models."""
    assert runs.first["ppo"].names[name] == 1
    assert runs.second["ppo"].names[name] == 1


CHILD = """
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
from mpo_jax.cli import main
from mpo_jax.runtime import compilation, machine
compilation.LONG_S = machine.WORTH_CACHING_S = 0  # however busy the machine is
try:
    main()
finally:
    print(*(events.count(f"/jax/compilation_cache/cache_{kind}") for kind in ("hits", "misses")))
"""


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    """In the folder that is the default; the micro configuration turns the cache off."""
    default = RuntimeConfig().compilation_cache
    assert default is not None and default.startswith("~/")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"HOME": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    counts, said = [], []
    for name in ("first", "second"):
        options = [f"workdir={tmp_path / name}", f"runtime.compilation_cache={default}", "sft.train.steps=1"]
        result = subprocess.run(
            [sys.executable, "-c", CHILD, "sft", MICRO, *options, "runtime.cpu_devices=1"],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        counts.append(tuple(map(int, result.stdout.splitlines()[-1].split())))
        said.append("found in the cache" in result.stdout)
        assert "compiles 2 programs" in result.stdout and "2 programs of the stage compiled" in result.stdout
    (hits, misses), (later_hits, later_misses) = counts
    assert hits == 0 and misses > 0 and said == [False, True]
    assert later_hits == misses and later_misses == 0
    assert list(Path(default.replace("~", str(tmp_path), 1)).iterdir())
